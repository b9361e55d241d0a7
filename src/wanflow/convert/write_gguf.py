"""GGUF files: quantising into GGML's blocks, and the header by the `gguf` package (an extra), whose
data is streamed here.

Experts are of the architecture `wan`, as city96's and QuantStack's files are: official names, and
for the one tensor of five sides an array `comfy.gguf.orig_shape.<name>`. The text encoder is a
`t5encoder` with llama.cpp's names, and with its tokenizer where `tokenizer.json` describes one that
llama.cpp can express (the published one).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wanflow.config import RequestError, TextConfig
from wanflow.convert.write import Count, TensorSpec, write_tensor

KINDS = (
    "Q8_0",
    "Q5_1",
    "Q5_0",
    "Q4_1",
    "Q4_0",
)  # what the package quantises to, of what is read here
BLOCK = 32  # values, of all of them
# values the package takes for a row: it works on 16 rows at a time, and short ones cost it its
# speed
ROW = 4096
DIMENSIONS = 4  # the most that llama.cpp knows
FILE_TYPES = {
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    **{kind: f"MOSTLY_{kind}" for kind in KINDS},
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = (
    1,
    2,
    3,
    4,
    6,
)  # types of pieces, in sentencepiece's numbering

Note = Callable[[Any], None]  # writes key-value pairs into a gguf.GGUFWriter


def package() -> Any:
    """The gguf package; a RequestError where it is not installed."""
    try:
        return import_module("gguf")
    except ModuleNotFoundError:
        raise RequestError(
            "writing GGUF needs the package gguf: pip install 'wanflow[gguf]', or pip install gguf"
        ) from None


def quantised(kind: str, values: Iterator[Tensor]) -> Iterator[Tensor]:
    """Float pieces of whole blocks -> their blocks, as bytes."""
    gguf = package()
    for piece in values:
        flat = piece.float().numpy()
        whole = len(flat) // ROW * ROW
        for part, width in ((flat[:whole], ROW), (flat[whole:], BLOCK)):
            if len(part):
                blocks = gguf.quants.quantize(
                    part.reshape(-1, width), gguf.GGMLQuantizationType[kind]
                )
                yield torch.from_numpy(np.ascontiguousarray(blocks).view(np.uint8))


def write_gguf(
    path: Path, entries: Sequence[TensorSpec], count: Count, arch: str, kind: str, note: Note
) -> None:
    """A GGUF file, header first.

    Args:
        kind: what most of its weights are.
        note: adds to the header.
    """
    gguf = package()
    writer = gguf.GGUFWriter(path, arch)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
    note(writer)
    place, starts = 0, {}
    for entry in entries:
        shape = entry.shape or (1,)
        if (
            len(shape) > DIMENSIONS
            # ComfyUI goes by this note; diffusers and stable-diffusion.cpp by the five sides
            # themselves
        ):
            writer.add_array(f"comfy.gguf.orig_shape.{entry.name}", list(shape))
        writer.add_tensor_info(
            entry.name,
            shape,
            np.dtype(np.float32),
            entry.nbytes,
            gguf.GGMLQuantizationType[entry.kind],
        )
        starts[entry.name], place = (
            place,
            writer.ggml_pad(place + entry.nbytes, writer.data_alignment),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        begin = writer.ggml_pad(file.seek(0, 2), writer.data_alignment)
        for entry in entries:
            file.seek(begin + starts[entry.name])
            write_tensor(entry, file, count)
        file.truncate(begin + place)  # readers want the last tensor padded too


# the text encoder


def note_text(config: TextConfig, length: int, tokenizer: Mapping[str, Any] | None) -> Note:
    """What llama.cpp wants to know of a T5 encoder.

    Args:
        length: of a prompt, in tokens.
        tokenizer: what `pieces_in` gives; None leaves it out.
    """

    def note(writer: Any) -> None:
        writer.add_context_length(length)
        writer.add_embedding_length(config.dim)
        writer.add_feed_forward_length(config.dim_ffn)
        writer.add_block_count(config.num_layers)
        writer.add_head_count(config.num_heads)
        writer.add_key_length(config.dim_attn // config.num_heads)
        writer.add_value_length(config.dim_attn // config.num_heads)
        writer.add_layer_norm_rms_eps(config.eps)
        writer.add_relative_attn_buckets_count(config.num_buckets)
        if tokenizer is None:
            return
        writer.add_tokenizer_model("t5")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokenizer["tokens"])
        writer.add_token_scores(tokenizer["scores"])
        writer.add_token_types(tokenizer["types"])
        writer.add_add_space_prefix(True)
        writer.add_remove_extra_whitespaces(tokenizer["fold_spaces"])
        if tokenizer["charsmap"]:
            writer.add_precompiled_charsmap(tokenizer["charsmap"])
        writer.add_pad_token_id(tokenizer["tokens"].index("<pad>"))
        writer.add_eos_token_id(tokenizer["tokens"].index("</s>"))
        writer.add_unk_token_id(tokenizer["types"].index(UNKNOWN))
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(True)

    return note


def pieces_in(text: bytes) -> dict[str, Any] | None:
    """The pieces of a `tokenizer.json` in sentencepiece's words; None for one that does more than
    sentencepiece does (nano's).
    """
    said = json.loads(text)
    model, steps = said["model"], _steps(said.get("normalizer"))
    if model.get("type") != "Unigram" or steps is None:
        return None
    added = {token["id"]: token for token in said.get("added_tokens", ())}
    vocabulary = [
        *model["vocab"],
        *(
            [added[index]["content"], 0.0]
            for index in sorted(added)
            if index >= len(model["vocab"])
        ),
    ]

    def kind(index: int, piece: str) -> int:
        if index == model["unk_id"]:
            return UNKNOWN
        if index in added:
            return CONTROL if added[index]["special"] else USER_DEFINED
        return (
            BYTE
            if model.get("byte_fallback") and len(piece) == 6 and piece.startswith("<0x")
            else NORMAL
        )

    return {
        "tokens": [piece for piece, _ in vocabulary],
        "scores": [float(score) for _, score in vocabulary],
        "types": [kind(index, piece) for index, (piece, _) in enumerate(vocabulary)],
        "charsmap": next(
            (
                base64.b64decode(step["precompiled_charsmap"])
                for step in steps
                if step["type"] == "Precompiled"
            ),
            b"",
        ),
        "fold_spaces": any(step["type"] == "Replace" for step in steps),
    }


def _steps(normaliser: Mapping[str, Any] | None) -> list[Mapping[str, Any]] | None:
    """A normaliser's steps, where each is one that sentencepiece has: its table of characters, and
    folding of spaces.
    """
    if normaliser is None:
        return []
    steps = normaliser["normalizers"] if normaliser["type"] == "Sequence" else [normaliser]
    folds = {"type": "Replace", "pattern": {"Regex": " {2,}"}}
    known = all(
        step["type"] in ("Precompiled", "Strip") or folds.items() <= step.items() for step in steps
    )
    return list(steps) if known else None
