"""The tokenizer, wherever it stands: the same ids that sentencepiece itself gives."""

from __future__ import annotations

import io
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from helpers.common import refusal
from safetensors.torch import save_file

from wanflow.checkpoint.source import open_source
from wanflow.checkpoint.tokenizers import carries_tokenizer, open_tokenizer
from wanflow.models.tokenizer import Tokenizer
from wanflow.train import toy

PROMPTS = [
    "a small red circle moves left quickly on a blue background",
    "A  LARGE green   cross",
    "turquoise, spins!",
    "五 stars — naïve façade",
    "",
    "   ",
    "ﬁne ½ Ｆｕｌｌ width",
    "emoji 🎬 and\ttabs",
    "</s> <pad> marks",
    "▁underline",
]


@pytest.fixture(scope="module", params=["bytes", "unknown"])
def model(request: pytest.FixtureRequest) -> bytes:
    """A unigram model as T5's: pad, end and unknown first; with pieces for bytes or without."""
    rng = random.Random(0)
    sentences = [toy.caption(toy.sample_scene(rng), rng) for _ in range(400)] + [
        "fine naïve façade ½ width tabs"
    ] * 3
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=out,
        vocab_size=420,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        byte_fallback=request.param == "bytes",
        hard_vocab_limit=False,
        user_defined_symbols=["<extra_id_0>"],
        minloglevel=2,
    )
    return out.getvalue()


def in_spiece(model: bytes, folder: Path) -> Path:
    (folder / "spiece.model").write_bytes(model)
    return folder / "spiece.model"


def in_safetensors(model: bytes, folder: Path) -> Path:
    """As ComfyUI's T5 files carry it."""
    tensor = torch.frombuffer(bytearray(model), dtype=torch.uint8)
    save_file(
        {"spiece_model": tensor, "shared.weight": torch.zeros(2, 2)}, folder / "t5.safetensors"
    )
    return folder / "t5.safetensors"


def in_gguf(model: bytes, folder: Path) -> Path:
    """As llama.cpp's converter writes it."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    parsed = proto.ModelProto.FromString(model)
    writer = gguf.GGUFWriter(folder / "t5.gguf", "t5encoder")
    writer.add_tokenizer_model("t5")
    writer.add_token_list([piece.piece for piece in parsed.pieces])
    writer.add_token_scores([piece.score for piece in parsed.pieces])
    writer.add_token_types([int(piece.type) for piece in parsed.pieces])
    writer.add_precompiled_charsmap(parsed.normalizer_spec.precompiled_charsmap)
    writer.add_add_space_prefix(parsed.normalizer_spec.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(parsed.normalizer_spec.remove_extra_whitespaces)
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "t5.gguf"


@pytest.mark.parametrize("place", [in_spiece, in_safetensors, in_gguf])
def test_ids_are_those_of_sentencepiece(model: bytes, place: object, tmp_path: Path) -> None:
    assert callable(place)
    file = place(model, tmp_path)
    engine, theirs = open_tokenizer(file), sentencepiece.SentencePieceProcessor(model_proto=model)
    assert engine.get_vocab_size() == theirs.vocab_size()
    for prompt in PROMPTS:
        if "</s>" in prompt:
            # marks in a prompt are text to sentencepiece, and marks to T5's tokenizer: as
            # transformers has it
            continue
        ours = engine.encode(prompt, add_special_tokens=False).ids
        assert ours == theirs.encode(prompt), prompt
    assert carries_tokenizer(open_source(file)) if file.suffix != ".model" else True
    ids, mask = Tokenizer(engine, 40)(["a red circle"])
    assert ids[0, int(mask.sum()) - 1] == 1 and not ids[0, int(mask.sum()) :].any()


def test_what_holds_no_tokenizer(tmp_path: Path) -> None:
    save_file({"shared.weight": torch.zeros(2, 2)}, tmp_path / "t5.safetensors")
    assert "holds no tokenizer" in refusal(lambda: open_tokenizer(tmp_path / "t5.safetensors"))
    assert not carries_tokenizer(open_source(tmp_path / "t5.safetensors"))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "not a readable tokenizer" in refusal(
        lambda: open_tokenizer(tmp_path / "tokenizer.json")
    )
    for data in (b"\n\x05\n\x01a", b"\n\xff\xff\xff\xff\x0f", b"\n" + bytes(range(200)), b"\n\x00"):
        (tmp_path / "spiece.model").write_bytes(data)
        assert "tokenizer" in refusal(lambda: open_tokenizer(tmp_path / "spiece.model"))
