"""What becomes of each tensor in a conversion: its format, and the stream of its bytes.

fp8 is written as ComfyUI's older "fp8_scaled" files are: `X.weight` in float8_e4m3fn beside a
float32 scalar `X.scale_weight` (amax / 448), and an empty-handed `scaled_fp8` that says so. ComfyUI
of any age, its wrappers, musubi-tuner and wanflow read these; the newer `weight_scale` with
`comfy_quant` only recent ones do. `scaled_fp8` has two elements: then no reader quantises
activations too, for which the scales would be missing.

GGUF is written as city96's converter does: the matmuls of the blocks in the kind asked for, what
stands before and after them in float16, vectors, modulation, time embedding and the final layer in
float32; rows that are not whole blocks stay in float16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from wanflow.checkpoint.containers import DTYPES, NAMES, TensorInfo
from wanflow.checkpoint.fp8_scales import LARGEST
from wanflow.checkpoint.key_maps import Dialect, Kind, from_official
from wanflow.checkpoint.source import OfficialSource
from wanflow.checkpoint.values import extremes, finite
from wanflow.config import RequestError
from wanflow.convert.write import TensorSpec
from wanflow.convert.write_gguf import BLOCK, KINDS, quantised
from wanflow.runtime import dtype_name

FP8 = "F8_E4M3"
KEPT = ("F32", "F16", "BF16")  # what a tensor may be stored as and stay
LOOKED_UP = (
    "token_embedding.",
    "pos_embedding.",
)  # tables of the text encoder; what else it has in two dimensions is multiplied
ISLANDS = ("time_embedding.", "head.")  # computed in float32, and small


@dataclass(frozen=True)
class StorageFormat:
    """How tensors are stored.

    quant: what matmul weights become, "F8_E4M3" or a GGML type; None for nothing special.
    plain: the dtype of the rest; None leaves each as it is, and makes bfloat16 of what was packed.
    gguf: whether the container is GGUF, with its own rules for the rest.
    """

    quant: str | None = None
    plain: str | None = None
    gguf: bool = False


def form(kind: Kind, name: str, info: TensorInfo, coding: StorageFormat) -> str:
    """What a tensor, by its official name, is stored as: a dtype of safetensors or a GGML type."""
    stored = NAMES[info.dtype] if info.packing is None else "BF16"
    plain = coding.plain or (stored if stored in KEPT else "F32")
    table = kind == "vae" or len(info.shape) != 2 or not name.endswith(".weight")
    if not coding.gguf:
        linear = not table and not any(word in name for word in LOOKED_UP)
        return coding.quant if coding.quant and linear else plain
    if len(info.shape) in (0, 1, 3) or name.startswith(ISLANDS) or "pos_embedding." in name:
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
    """All tensors of a part, under a dialect's names, in the order in which they have to be
    written.
    """
    names = from_official(kind, dialect, source.tensors)
    made: list[TensorSpec] = []
    for name, info in source.tensors.items():
        stored = form(kind, name, info, coding)
        if stored == FP8:
            made += _scaled(source, name, names[name])
        elif stored in KINDS:
            made.append(
                TensorSpec(names[name], info.shape, stored, partial(_blocks, source, name, stored))
            )
        else:
            made.append(
                TensorSpec(
                    names[name], info.shape, stored, partial(_cast, source, name, DTYPES[stored])
                )
            )
    if coding.quant == FP8 and not coding.gguf and any(entry.kind == FP8 for entry in made):
        made.append(
            TensorSpec("scaled_fp8", (2,), FP8, lambda: iter([torch.zeros(2, dtype=DTYPES[FP8])]))
        )
    return made


def bytes_entry(name: str, data: bytes) -> TensorSpec:
    """A file inside a file."""
    return TensorSpec(
        name,
        (len(data),),
        "U8",
        lambda: iter([torch.frombuffer(bytearray(data), dtype=torch.uint8)]),
    )


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
            f"{source.path}: {name} holds NaN or infinity; the file is damaged (`wanflow inspect"
            " --check` tells all of it)"
        )
    return RequestError(
        f"{source.path}: {name} reaches {float(piece.abs().amax()):g}, which"
        f" {dtype_name(dtype)} cannot hold; use bfloat16"
    )


def _blocks(source: OfficialSource, name: str, kind: str) -> Iterator[Tensor]:
    info = source.tensors[name]
    if info.packing == kind:  # the same blocks: nothing is rounded twice
        yield source.packed(name).data
    else:
        yield from quantised(kind, _checked(source, name))


def _checked(source: OfficialSource, name: str) -> Iterator[Tensor]:
    """Pieces as float32, all of them finite; float16 scales of blocks are, too, for any weight
    below half a million.
    """
    for piece in source.stream(name):
        value = piece.float()
        if not finite(value):
            raise _unfit(source, name, value, torch.float32)
        yield value


def _scaled(source: OfficialSource, name: str, new: str) -> list[TensorSpec]:
    """A weight and its scale, which is known when the weight has been written."""
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
            scale.fill_(max(largest / LARGEST[FP8], torch.finfo(torch.float32).tiny))
        for piece in source.stream(name):
            yield (piece.float() / scale).clamp_(-LARGEST[FP8], LARGEST[FP8]).to(DTYPES[FP8])

    return [
        TensorSpec(new, source.tensors[name].shape, FP8, weight),
        TensorSpec(f"{path}.scale_weight", (), "F32", lambda: iter([scale])),
    ]
