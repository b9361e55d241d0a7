"""Write GGUF files: the `gguf` package (an extra) quantises and writes the header.

Experts have the architecture `wan`, as city96's and QuantStack's files do: official names, and the
one 5-D tensor with its five sides. The array `comfy.gguf.orig_shape.<name>` of some files is left
out: stable-diffusion.cpp, whose own reader takes files of five sides, misreads any array, and no
other reader needs it. The text encoder is a `t5encoder` with
llama.cpp's names, and with its tokenizer if llama.cpp can express it (as the published one).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wanflow.checkpoint.tokenizers import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Pieces
from wanflow.config import TextConfig
from wanflow.convert.formats import GGML_TYPES, package
from wanflow.convert.write import Count, TensorSpec, write_tensor

BLOCK = 32  # values, of each of these types
ROW = 4096  # values to quantise as a row: the package takes 16 rows at a time, short ones slowly
FILE_TYPES = {
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    **{kind: f"MOSTLY_{kind}" for kind in GGML_TYPES},
}

Note = Callable[[Any], None]  # writes key-value pairs into a gguf.GGUFWriter


def quantised(kind: str, values: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield the packed blocks, as bytes, of float pieces of complete blocks."""
    gguf = package()
    for piece in values:
        flat = piece.float().numpy()
        end = len(flat) // ROW * ROW
        for part, width in ((flat[:end], ROW), (flat[end:], BLOCK)):
            if len(part):
                blocks = gguf.quants.quantize(
                    part.reshape(-1, width), gguf.GGMLQuantizationType[kind]
                )
                yield torch.from_numpy(np.ascontiguousarray(blocks).view(np.uint8))


def write_gguf(
    path: Path, entries: Sequence[TensorSpec], count: Count, arch: str, kind: str, note: Note
) -> None:
    """Write a GGUF file, header first: `kind` is the format of most weights."""
    gguf = package()
    writer = gguf.GGUFWriter(path, arch)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
    note(writer)
    place, starts = 0, {}
    for entry in entries:
        shape = entry.shape or (1,)
        writer.add_tensor_info(
            entry.name,
            shape,
            np.dtype(np.float32),
            entry.nbytes,
            gguf.GGMLQuantizationType[entry.kind],
        )
        starts[entry.name] = place
        place = writer.ggml_pad(place + entry.nbytes, writer.data_alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        begin = writer.ggml_pad(file.seek(0, 2), writer.data_alignment)
        for entry in entries:
            file.seek(begin + starts[entry.name])
            write_tensor(entry, file, count)
        file.truncate(begin + place)  # the last tensor is padded too


# the text encoder


def note_text(config: TextConfig, length: int, tokenizer: Pieces | None) -> Note:
    """Return a function that writes llama.cpp's metadata of a T5 encoder.

    `length` is that of a prompt, in tokens; `tokenizer` is from `pieces_in`, or None.
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
        tokens = [piece for piece, _ in tokenizer.pieces]
        writer.add_token_list(tokens)
        writer.add_token_scores([score for _, score in tokenizer.pieces])
        writer.add_token_types(tokenizer.types)
        writer.add_add_space_prefix(True)
        writer.add_remove_extra_whitespaces(tokenizer.fold_spaces)
        if tokenizer.charsmap:
            writer.add_precompiled_charsmap(tokenizer.charsmap)
        writer.add_pad_token_id(tokens.index("<pad>"))
        writer.add_eos_token_id(tokens.index("</s>"))
        writer.add_unk_token_id(tokenizer.types.index(UNKNOWN))
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(True)

    return note


def pieces_in(text: bytes) -> Pieces | None:
    """Return the pieces of a `tokenizer.json` as sentencepiece has them.

    None for a tokenizer that does more than sentencepiece (nano's).
    """
    parsed = json.loads(text)
    model, steps = parsed["model"], _steps(parsed.get("normalizer"))
    if model.get("type") != "Unigram" or steps is None:
        return None
    added = {token["id"]: token for token in parsed.get("added_tokens", ())}
    beyond = [index for index in sorted(added) if index >= len(model["vocab"])]
    vocabulary = [*model["vocab"], *([added[index]["content"], 0.0] for index in beyond)]

    def kind(index: int, piece: str) -> int:
        if index == model["unk_id"]:
            return UNKNOWN
        if index in added:
            return CONTROL if added[index]["special"] else USER_DEFINED
        hexadecimal = len(piece) == 6 and piece.startswith("<0x")
        return BYTE if model.get("byte_fallback") and hexadecimal else NORMAL

    charsmaps = [step["precompiled_charsmap"] for step in steps if step["type"] == "Precompiled"]
    return Pieces(
        [(piece, float(score)) for piece, score in vocabulary],
        [kind(index, piece) for index, (piece, _) in enumerate(vocabulary)],
        base64.b64decode(charsmaps[0]) if charsmaps else b"",
        fold_spaces=any(step["type"] == "Replace" for step in steps),
    )


def _steps(normaliser: Mapping[str, Any] | None) -> list[Mapping[str, Any]] | None:
    """Return a normaliser's steps if sentencepiece has each: a character map, folded spaces."""
    if normaliser is None:
        return []
    steps = normaliser["normalizers"] if normaliser["type"] == "Sequence" else [normaliser]
    folds = {"type": "Replace", "pattern": {"Regex": " {2,}"}}
    known = all(
        step["type"] in ("Precompiled", "Strip") or folds.items() <= step.items() for step in steps
    )
    return list(steps) if known else None
