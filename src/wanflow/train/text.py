"""Train the text encoder of the miniature: tag every word of a caption with its slot and value.

States that tell "red, the object's" from "red, the background's" are all that the experts'
cross-attention needs.
"""

from __future__ import annotations

import random
import string
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from torch import Tensor, nn

from wanflow.config import TextConfig
from wanflow.models.tokenizer import Tokenizer
from wanflow.models.umt5 import UMT5Encoder
from wanflow.train import toy

VALUES: dict[str, tuple[str, ...]] = {
    "colour": tuple(toy.COLOURS),
    "background": tuple(toy.BACKGROUNDS),
    "shape": toy.SHAPES,
    "motion": toy.MOTIONS,
    "size": tuple(toy.SIZES),
    "speed": tuple(toy.SPEEDS),
}
TAGS = {("", ""): 0} | {
    (slot, value): n
    for n, (slot, value) in enumerate(
        ((s, v) for s, values in VALUES.items() for v in values), start=1
    )
}
# Words without meaning here. With random strings they teach the encoder to ignore the unknown.
_FILLERS = (
    "very lovely high quality scene shot camera please make show me one geometric shape "
    "coloured screen frame toward side slightly gentle flat minimal 2d it and its which while "
    "across"
)
FILLERS = tuple(_FILLERS.split())


def build_tokenizer(file: Path) -> None:
    """Write a unigram tokenizer.json with a piece for each word; other text is letters or bytes."""
    parts = {part for word in toy.vocabulary() for part in word.split("-") if part}
    words = sorted(parts)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    pieces += [(f"▁{word}", -2.0) for word in (*words, *FILLERS) if word]
    letters = string.ascii_lowercase + string.digits + string.punctuation + "▁"
    pieces += [(letter, -8.0) for letter in letters]
    pieces += [(f"<0x{byte:02X}>", -12.0) for byte in range(256)]
    unique = list(dict(pieces).items())
    engine = Engine(Unigram(unique, unk_id=2, byte_fallback=True))
    steps = [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("-", " - ")]
    engine.normalizer = normalizers.Sequence(steps)
    engine.pre_tokenizer = pre_tokenizers.Metaspace()
    back = [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    engine.decoder = decoders.Sequence(back)
    engine.add_special_tokens(["<pad>", "</s>", "<unk>"])
    # For other programs; wanflow's Tokenizer adds the mark itself.
    engine.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B:0 </s>:0", special_tokens=[("</s>", 1)]
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    engine.save(str(file))


def _noisy(words: list[toy.Word], rng: random.Random) -> list[toy.Word]:
    """Put fillers between the words, sometimes."""
    out: list[toy.Word] = []
    share = 0.08 if rng.random() < 0.4 else 0.0
    for word in words:
        if rng.random() < share:
            nonsense = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 5)))
            out.append(toy.Word(nonsense if rng.random() < 0.4 else rng.choice(FILLERS)))
        out.append(word)
    return out


def tagged(tokenizer: Tokenizer, rng: random.Random, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, mask and tags, [count, S] each, of random captions of scenes that may be seen."""
    ids = torch.full((count, tokenizer.length), tokenizer.pad)
    tags, mask = torch.zeros(2, count, tokenizer.length, dtype=torch.int64)
    for row in range(count):
        scene = toy.sample_scene(rng)
        words = toy.caption_words(scene, rng if rng.random() < 0.8 else None)
        text, ends = toy.spans(_noisy(words, rng))
        encoded = tokenizer.engine.encode(text, add_special_tokens=False)
        marks = []
        for _, stop in encoded.offsets[: tokenizer.length - 1]:
            word = next(word for end, word in ends if stop <= end)
            marks.append(TAGS[(word.slot, word.value)])
        marks.append(0)
        pieces = [*encoded.ids[: tokenizer.length - 1], tokenizer.end]
        ids[row, : len(pieces)] = torch.tensor(pieces)
        tags[row, : len(marks)] = torch.tensor(marks)
        mask[row, : len(pieces)] = 1
    return ids, mask, tags


class Tagger(nn.Module):
    """The encoder with a linear reader on top, which serves training only."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.encoder = UMT5Encoder(config)
        self.reader = nn.Linear(config.dim, len(TAGS))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if isinstance(module, nn.Embedding):  # position tables too, so that heads differ
                nn.init.normal_(module.weight, std=1.0)
        std = config.dim**-0.5 * (config.dim_attn / config.num_heads) ** -0.5
        for name, weight in self.encoder.named_parameters():
            if name.endswith("attn.q.weight"):
                nn.init.normal_(weight, std=std)

    def loss(self, ids: Tensor, mask: Tensor, tags: Tensor) -> Tensor:
        """Return the mean cross-entropy over the tokens; a scalar."""
        scores = self.reader(self.encoder(ids, mask)).float()
        return F.cross_entropy(scores[mask.bool()], tags[mask.bool()])

    @torch.no_grad()
    def accuracy(self, ids: Tensor, mask: Tensor, tags: Tensor) -> float:
        """Return the share of captions whose every token is tagged right."""
        right = (self.reader(self.encoder(ids, mask)).argmax(-1) == tags) | (mask == 0)
        return float(right.all(1).float().mean())
