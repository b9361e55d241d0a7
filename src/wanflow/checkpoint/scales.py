"""fp8 and int8 weights and their scales, in every spelling of ComfyUI and its relatives.

A scaled weight is `X.weight` in float8 or int8 times a scale, `X.scale_weight` (old) or
`X.weight_scale` (new, and LightX2V). A file declares scaled weights by an empty tensor `scaled_fp8`
(old), by `X.comfy_quant` (new: JSON as bytes) or by `_quantization_metadata` in its header (new).
Without its scale a weight is wrong by a factor of hundreds, and the video is white or noise, so a
missing scale is an error. A file whose weights were only rounded to fp8 has no scales.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from wanflow.checkpoint.block_scales import pair_blocks
from wanflow.checkpoint.containers import AGAIN, TensorInfo, TensorSource, stream_packed
from wanflow.config import RequestError
from wanflow.transforms.blocks import BLOCKS, ROTATED
from wanflow.transforms.packed import CODES, Packed

KINDS = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "int8"}
FORMATS = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8_tensorwise": torch.int8,
}
SCALES = (".scale_weight", ".weight_scale")
# Scales of activations and notes for fp8 matmuls, which wanflow does not use.
ASIDE = (".scale_input", ".input_scale", ".output_scale", ".comfy_quant")
SENTINEL = "scaled_fp8"
HEADER = "_quantization_metadata"
LARGEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}
# A weight that is scaled to fill fp8's range exceeds this; no published weight comes near it.
SUSPICIOUS = 100.0
# Between these lie the scales of published weights, with much room.
SMALLEST_SCALE, LARGEST_SCALE = 1e-12, 1e6
NOTE_LIMIT = 1 << 16  # bytes of a `comfy_quant` note; real ones have under a hundred


@dataclass(frozen=True)
class ScaledSource(TensorSource):
    """A source whose fp8 and int8 weights are packed with their scales, which it hides."""

    inner: TensorSource
    scales: Mapping[str, str]  # weight -> its scale's name in `inner`

    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        rows: slice | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        if self.tensors[name].packing not in CODES:
            return self.inner.read(name, dtype, rows, out)
        value = self.packed(name, rows).dense(dtype or self.tensors[name].dtype)
        return value if out is None else out.copy_(value)

    def packed(self, name: str, rows: slice | None = None) -> Packed:
        info = self.tensors[name]
        if info.packing not in CODES:
            return self.inner.packed(name, rows)
        data = self.inner.read(name, rows=rows)
        if name not in self.scales:
            self._refuse_if_scaled(name, data)
            return Packed(info.packing, tuple(data.shape), data)
        scale = self.inner.read(self.scales[name], torch.float32)
        self._refuse_wild(self.scales[name], scale, data)
        if scale.ndim == 1:
            scale = scale.view(()) if scale.numel() == 1 else scale.view(-1, 1)
        if rows is not None and scale.numel() > 1:
            scale = scale[rows]
        return Packed(info.packing, tuple(data.shape), data, scale)

    def stream(self, name: str) -> Iterator[Tensor]:
        if self.tensors[name].packing not in CODES:
            return self.inner.stream(name)
        return stream_packed(self.packed(name))

    def _refuse_wild(self, name: str, scale: Tensor, data: Tensor) -> None:
        """Raise a RequestError for scales that no weight has: the video would be noise."""
        if not scale.numel():
            return
        low, high = (float(value) for value in torch.aminmax(scale))
        if not 0 < low <= high < math.inf:
            raise RequestError(
                f"{self.path}: the scale {name} is zero, negative, NaN or infinite; the file is"
                f" damaged; {AGAIN}"
            )
        if high > LARGEST_SCALE or (high < SMALLEST_SCALE and bool(data.float().any())):
            raise RequestError(
                f"{self.path}: the scale {name} is {high:g}, as no weight has it (expected between"
                f" {SMALLEST_SCALE:g} and {LARGEST_SCALE:g}); the file is damaged; {AGAIN}"
            )

    def _refuse_if_scaled(self, name: str, data: Tensor) -> None:
        if not data.numel():
            return
        largest = float(data.float().nan_to_num(posinf=LARGEST["F8_E5M2"]).abs().amax())
        if largest > SUSPICIOUS:
            raise RequestError(
                f"{self.path}: the fp8 weight {name} reaches {largest:g}, as only scaled weights"
                f" do, and its scale is missing ({name.removesuffix('.weight')}{SCALES[0]} or"
                f" {SCALES[1]}); {AGAIN}, or take another file"
            )


def pair_scales(source: TensorSource) -> TensorSource:
    """Return a source that joins packed weights with their scales; the same source without any.

    Raises:
        RequestError: for a scale that is missing, does not fit or has no weight, and for weights in
            an unknown format.
    """
    declared = notes(source)
    source = pair_blocks(source, declared)
    others = {name: note for name, note in declared.items() if note["format"] not in BLOCKS}
    found = source.tensors
    sentinel = [name for name in found if name == SENTINEL or name.endswith("." + SENTINEL)]
    scale_of = {
        name.removesuffix(ending) + ".weight": name
        for ending in SCALES
        for name in found
        if name.endswith(ending)
    }
    kinds = {
        name: KINDS[info.dtype]
        for name, info in found.items()
        if info.dtype in KINDS
        and (info.dtype != torch.int8 or name.endswith(".weight"))
        and info.shape
        and not info.packing
        and name not in sentinel
    }
    if not kinds and not scale_of and not declared and not sentinel:
        return source
    _refuse_foreign(source, others, scale_of)
    if sentinel or scale_of or declared or "int8" in kinds.values():
        _refuse_unscaled(source, kinds, scale_of)
    kinds |= _rotated(source, others)
    aside = {*scale_of.values(), *sentinel, *(name for name in found if name.endswith(ASIDE))}
    tensors = {
        name: _described(info, kinds.get(name), found.get(scale_of.get(name, "")))
        for name, info in found.items()
        if name not in aside
    }
    return ScaledSource(
        source.path,
        tensors,
        source,
        {weight: name for weight, name in scale_of.items() if weight in kinds},
        files=source.files,
        container=source.container,
        metadata=source.metadata,
    )


def _rotated(source: TensorSource, notes: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the kinds of int8 weights whose rows are rotated, in groups of a known size."""
    kinds = {}
    for layer, note in notes.items():
        if not note.get("convrot"):
            continue
        name, size = f"{layer}.weight", note.get("convrot_groupsize", 256)
        kind, shape = f"int8_convrot{size}", source.tensors[name].shape
        if kind not in ROTATED or len(shape) != 2 or shape[1] % ROTATED[kind]:
            raise RequestError(
                f"{source.path}: {name} {list(shape)} is rotated (convrot) in groups of {size};"
                f" read are groups of {', '.join(map(str, ROTATED.values()))} that fill its rows;"
                " take the model's fp8, GGUF or 16-bit file"
            )
        kinds[name] = kind
    return kinds


def _refuse_unscaled(
    source: TensorSource, kinds: Mapping[str, str], scale_of: Mapping[str, str]
) -> None:
    found = source.tensors
    bare = sorted(name for name in kinds if name.endswith(".weight") and name not in scale_of)
    if bare:
        raise RequestError(
            f"{source.path}: {len(bare)} int8 or fp8 weights lack their scales"
            f" ({', '.join(bare[:3])}{', ...' if len(bare) > 3 else ''}), and unscaled they would"
            f" give noise; {AGAIN}, or take another file"
        )
    for weight, name in scale_of.items():
        if weight not in found:
            raise RequestError(
                f"{source.path}: the scale {name} has no weight; the file is damaged; {AGAIN}"
            )
        if not _fits(found[weight].shape, found[name].shape):
            raise RequestError(
                f"{source.path}: the scale {name} has the shape {list(found[name].shape)} for a"
                f" weight of {list(found[weight].shape)}, which fits no known way of scaling"
            )


def _described(info: TensorInfo, kind: str | None, scale: TensorInfo | None) -> TensorInfo:
    if kind is None:
        return info
    dtype, shape = (torch.bfloat16, None) if scale is None else (torch.float32, scale.shape)
    return replace(info, dtype=dtype, packing=kind, packed_bytes=info.nbytes, scale=shape)


def _fits(weight: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    """Return whether a scale is one for all, one for each row, or one for each block of a row."""
    if scale in ((), (1,)):
        return True
    if len(weight) != 2 or scale[0] != weight[0]:
        return False
    return scale[1:] in ((), (1,)) or (
        len(scale) == 3 and scale[2] == 1 and scale[1] > 0 and weight[1] % scale[1] == 0
    )


def notes(source: TensorSource) -> dict[str, dict[str, Any]]:
    """Return what a file declares of its layers: {layer: {"format": its name, ...}}.

    Raises:
        RequestError: for notes that cannot be read.
    """
    found: dict[str, dict[str, Any]] = {}
    try:
        layers = json.loads(source.metadata.get(HEADER, "{}"))
        for layer, note in layers.get("layers", {}).items():
            found[layer] = _note(note)
        for name, info in source.tensors.items():
            if name.endswith(".comfy_quant"):
                if info.nbytes > NOTE_LIMIT or info.dtype != torch.uint8:
                    raise ValueError(f"{name} is no note")
                note = json.loads(bytes(source.read(name).tolist()))
                found[name.removesuffix(".comfy_quant")] = _note(note)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(
            f"{source.path}: its notes on quantisation cannot be read ({error}); the file is"
            f" damaged; {AGAIN}"
        ) from None
    return found


def _note(note: dict[str, Any]) -> dict[str, Any]:
    """Return a note with its parameters, which may stand one level lower, beside its format."""
    if not isinstance(note["format"], str):
        raise ValueError(f"{note['format']!r} is no format's name")
    lower = note.get("params")
    return {**(lower if isinstance(lower, dict) else {}), **note}


def _refuse_foreign(
    source: TensorSource, notes: Mapping[str, Mapping[str, Any]], scale_of: Mapping[str, str]
) -> None:
    found = source.tensors
    for layer, note in notes.items():
        weight, name = found.get(f"{layer}.weight"), note["format"]
        if name not in FORMATS:
            raise RequestError(
                f"{source.path} holds weights in the unknown format {name!r} ({layer}); known"
                f" are {', '.join((*FORMATS, *BLOCKS))}, GGUF, and 16 and 32 bits"
            )
        if weight is None or weight.dtype != FORMATS[name]:
            has = "has none" if weight is None else f"is {weight.dtype}"
            raise RequestError(
                f"{source.path}: {layer} should have a weight in {name}, and {has}; the file is"
                f" damaged; {AGAIN}"
            )
    for weight_name, name in scale_of.items():
        packed = weight_name in found and found[weight_name].dtype == torch.uint8
        if packed or found[name].dtype in (torch.uint8, torch.float8_e8m0fnu):
            raise RequestError(
                f"{source.path} holds weights of 4 to 8 bits with scales of blocks ({name}) and"
                " nothing that tells their format: nvfp4 and mxfp8 are read with ComfyUI's notes,"
                " nvfp4 with LightX2V's factors too; take one of these, or the fp8, GGUF or 16-bit"
                " file"
            )
        if not found[name].dtype.is_floating_point:
            raise RequestError(
                f"{source.path}: the scale {name} is {found[name].dtype}; the file is damaged;"
                f" {AGAIN}"
            )
