"""Turn prompts into token ids, with the official cleaning, by the `tokenizers` library."""

from __future__ import annotations

import html
import logging
import re

import torch
from tokenizers import Tokenizer as Engine
from torch import Tensor

from wanflow.config import RequestError

logger = logging.getLogger("wanflow")


def clean(prompt: str) -> str:
    """Repair broken Unicode, undo (doubled) HTML escapes, and fold white space."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """T5's tokenizer: pads to a fixed length, and truncates longer prompts with a warning."""

    def __init__(self, engine: Engine, length: int) -> None:
        """Take an engine; `length` is the model's text_len.

        Raises:
            RequestError: when it is not T5's.
        """
        self.engine = engine
        self.engine.no_padding()
        self.engine.no_truncation()
        self.length = length
        end, pad = self.engine.token_to_id("</s>"), self.engine.token_to_id("<pad>")
        if end is None or pad is None:
            raise RequestError("the tokenizer has no </s> or <pad> token: it is not T5's")
        self.end, self.pad = end, pad

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Return ids and mask, int64 [B, length] each; every prompt ends in </s>."""
        ids = torch.full((len(prompts), self.length), self.pad)
        mask = torch.zeros(len(prompts), self.length, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens = self.engine.encode(clean(prompt), add_special_tokens=False).ids
            kept = tokens[: self.length - 1]
            if len(kept) < len(tokens):
                lost = self.engine.decode(tokens[len(kept) :])
                logger.warning(
                    "the prompt is %d tokens long and the model reads %d; not read: %r",
                    len(tokens) + 1,
                    self.length,
                    lost if len(lost) < 120 else lost[:117] + "...",
                )
            ids[row, : len(kept) + 1] = torch.tensor([*kept, self.end])
            mask[row, : len(kept) + 1] = 1
        return ids, mask
