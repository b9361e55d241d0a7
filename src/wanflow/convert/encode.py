"""Choose the format of each tensor in a conversion, and stream its bytes.

fp8 follows ComfyUI's older "fp8_scaled" files: `X.weight` in float8_e4m3fn, a float32 scalar
`X.scale_weight` (amax / 448), and a marker `scaled_fp8`. ComfyUI of any age and wanflow read these;
only recent versions read the newer `weight_scale` with `comfy_quant`, and musubi-tuner reads
neither. In an expert the marker has two elements, by which ComfyUI does not quantise activations,
whose scales are missing. In a text encoder it is empty: ComfyUI before 2026 loads it into an empty
parameter, and its text encoders quantise no activations.

GGUF follows city96's converter: the matmuls of the blocks in the requested type; the layers before
and after them in float16; vectors, modulation, time embedding and the final layer in float32. Rows
that are no multiple of the block stay in float16. The patch embedding, of five sides, is float32:
ComfyUI-GGUF and diffusers unpack other types in matmuls only, and would pass its bytes on as they
are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from wanflow.checkpoint.containers import DTYPES, NAMES, TensorInfo
from wanflow.checkpoint.key_maps import Dialect, Kind, from_official
from wanflow.checkpoint.scales import LARGEST, SMALLEST_SCALE
from wanflow.checkpoint.source import OfficialSource
from wanflow.checkpoint.values import extremes, finite
from wanflow.config import RequestError
from wanflow.convert.formats import GGML_TYPES, StorageFormat
from wanflow.convert.write import TensorSpec
from wanflow.convert.write_gguf import BLOCK, quantised
from wanflow.runtime import dtype_name

FP8 = "F8_E4M3"
FLOATS = ("F32", "F16", "BF16")  # formats that a tensor may keep
TABLES = ("token_embedding.", "pos_embedding.")  # of the text encoder; other matrices are matmuls
ISLANDS = ("time_embedding.", "head.")  # computed in float32, and small


def storage_dtype(kind: Kind, name: str, info: TensorInfo, coding: StorageFormat) -> str:
    """Return the new format of a tensor, by its official name: a dtype or a GGML type."""
    stored = NAMES[info.dtype] if info.packing is None else "BF16"
    plain = coding.plain or (stored if stored in FLOATS else "F32")
    table = kind == "vae" or len(info.shape) != 2 or not name.endswith(".weight")
    if not coding.gguf:
        linear = not table and not any(word in name for word in TABLES)
        return coding.quant if coding.quant and linear else plain
    if len(info.shape) in (0, 1, 3, 5) or name.startswith(ISLANDS) or "pos_embedding." in name:
        return "F32"
    if (
        table
        or coding.quant is None
        or (kind == "dit" and not name.startswith("blocks."))
        or info.shape[-1] % BLOCK
    ):
        return plain
    return coding.quant


def entries(
    kind: Kind, source: OfficialSource, coding: StorageFormat, dialect: Dialect
) -> list[TensorSpec]:
    """Return all tensors of a part, under a dialect's names, in the order to write them."""
    names = from_official(kind, dialect, source.tensors)
    made: list[TensorSpec] = []
    for name, info in source.tensors.items():
        stored = storage_dtype(kind, name, info, coding)
        if stored == FP8:
            made += _scaled(source, name, names[name])
            continue
        if stored in GGML_TYPES:
            chunks = partial(_blocks, source, name, stored)
        else:
            chunks = partial(_cast, source, name, DTYPES[stored])
        made.append(TensorSpec(names[name], info.shape, stored, chunks))
    if any(entry.kind == FP8 for entry in made):
        marker = torch.zeros(2 if kind == "dit" else 0, dtype=DTYPES[FP8])
        made.append(TensorSpec("scaled_fp8", tuple(marker.shape), FP8, lambda: iter([marker])))
    return made


def bytes_entry(name: str, data: bytes) -> TensorSpec:
    """Return a tensor that holds a file's bytes."""
    value = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return TensorSpec(name, (len(data),), "U8", lambda: iter([value]))


# streams


def _cast(source: OfficialSource, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
    for piece in source.stream(name):
        out = piece.to(dtype)
        if not finite(out):
            raise _unfit(source, name, piece, dtype)
        yield out


def _unfit(source: OfficialSource, name: str, piece: Tensor, dtype: torch.dtype) -> RequestError:
    if not finite(piece):
        return RequestError(
            f"{source.path}: {name} holds NaN or infinity; the file is damaged; run `wanflow"
            f" inspect --check {source.path}`"
        )
    return RequestError(
        f"{source.path}: {name} reaches {float(piece.abs().amax()):g}, which"
        f" {dtype_name(dtype)} cannot hold; use --dtype"
        " bfloat16"
    )


def _blocks(source: OfficialSource, name: str, kind: str) -> Iterator[Tensor]:
    info = source.tensors[name]
    if info.packing == kind:  # the same blocks, so values are not rounded twice
        yield source.packed(name).data
    else:
        yield from quantised(kind, _checked(source, name))


def _checked(source: OfficialSource, name: str) -> Iterator[Tensor]:
    """Yield finite pieces in float32.

    The float16 scales of blocks are then finite for any weight below half a million.
    """
    for piece in source.stream(name):
        value = piece.float()
        if not finite(value):
            raise _unfit(source, name, value, torch.float32)
        yield value


def _scaled(source: OfficialSource, name: str, new: str) -> list[TensorSpec]:
    """Return a weight and its scale, which is known only after the weight."""
    scale = torch.ones(())
    path = new.removesuffix(".weight")

    def weight() -> Iterator[Tensor]:
        if source.tensors[name].packing == FP8:
            packed = source.packed(name)
            if packed.scale is None or packed.scale.numel() == 1:
                scale.copy_(torch.ones(()) if packed.scale is None else packed.scale.reshape(()))
                yield packed.data
                return
        largest = 0.0
        for piece in source.stream(name):
            low, high = extremes(piece)
            if not math.isfinite(high - low):
                raise _unfit(source, name, piece, torch.float32)
            largest = max(largest, -low, high)
        if largest:
            scale.fill_(max(largest / LARGEST[FP8], SMALLEST_SCALE))
        for piece in source.stream(name):
            yield (piece.float() / scale).clamp_(-LARGEST[FP8], LARGEST[FP8]).to(DTYPES[FP8])

    return [
        TensorSpec(new, source.tensors[name].shape, FP8, weight),
        TensorSpec(f"{path}.scale_weight", (), "F32", lambda: iter([scale])),
    ]
