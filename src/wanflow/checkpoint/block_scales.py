"""nvfp4 and mxfp8 weights, as ComfyUI and LightX2V write them: blocks of a row that share a scale.

`X.weight` holds two E2M1 values a byte (nvfp4) or E4M3 values (mxfp8), `X.weight_scale` a scale for
each 16 or 32 of a row, in a tensor core's order. ComfyUI pads both sides of the weight to that
number, says which format it is (see `scales.notes`), and gives nvfp4 a factor for all,
`X.weight_scale_2`. LightX2V's nvfp4 has the first of two values in the low bits, no note, and the
factor as `X.alpha` times `X.input_global_scale`, or as the inverse of `X.weight_global_scale`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wanflow.checkpoint.containers import (
    AGAIN,
    TensorInfo,
    TensorSource,
    stream_memory,
    stream_packed,
)
from wanflow.config import RequestError
from wanflow.transforms.blocks import BLOCKS, in_rows
from wanflow.transforms.packed import Packed

STORED = {"nvfp4": (torch.uint8, 2), "mxfp8": (torch.float8_e4m3fn, 1)}  # dtype, values in one
SCALES = {  # of blocks; ComfyUI reads bytes as either
    "nvfp4": (torch.float8_e4m3fn, torch.uint8),
    "mxfp8": (torch.float8_e8m0fnu, torch.uint8),
}
# Of LightX2V: names whose product, or the inverse of whose product, is the factor for all values.
FACTORS = ((("alpha", "input_global_scale"), False), (("weight_global_scale",), True))
BESIDE = ("alpha", "input_global_scale", "weight_global_scale", "input_absmax", "weight_scale_2")


class Parts(NamedTuple):
    """How a weight is stored, and the tensors that belong to it."""

    kind: str
    scales: str
    factors: tuple[str, ...] = ()
    inverse: bool = False
    low_first: bool = False


@dataclass(frozen=True)
class BlockSource(TensorSource):
    """A source whose nvfp4 and mxfp8 weights are packed in blocks; it hides what belongs to them.

    Padding is cut off. Where that leaves incomplete blocks, a weight can be read and not `packed`.
    """

    inner: TensorSource
    weights: Mapping[str, Parts]

    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        rows: slice | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        if name not in self.weights:
            return self.inner.read(name, dtype, rows, out)
        info = self.tensors[name]
        value = self._blocks(name, rows).dense(dtype or info.dtype)[:, : info.shape[1]].contiguous()
        return value if out is None else out.copy_(value)

    def packed(self, name: str, rows: slice | None = None) -> Packed:
        if name not in self.weights:
            return self.inner.packed(name, rows)
        kind, shape = self.weights[name].kind, self.tensors[name].shape
        if shape[1] % BLOCKS[kind].values:
            raise ValueError(f"a row of {list(shape)} is no multiple of {kind} blocks")
        return self._blocks(name, rows)

    def stream(self, name: str) -> Iterator[Tensor]:
        if name not in self.weights:
            return self.inner.stream(name)
        if self.tensors[name].shape[1] % BLOCKS[self.weights[name].kind].values:
            return stream_memory(self.read(name))
        return stream_packed(self.packed(name))

    def _blocks(self, name: str, rows: slice | None) -> Packed:
        """Return rows of a weight with its padding to the right."""
        parts, layout = self.weights[name], BLOCKS[self.weights[name].kind]
        stored = self.inner.tensors[name].shape
        start, stop, _ = (rows or slice(None)).indices(self.tensors[name].shape[0])
        data = self.inner.read(name, rows=slice(start, stop)).view(torch.uint8)
        if parts.low_first:
            data = data << 4 | data >> 4
        columns = stored[1] // (layout.nbytes - 1)
        scales = in_rows(self.inner.read(parts.scales).view(torch.uint8), stored[0], columns)
        self._refuse_wild(parts, scales)
        blocks = torch.cat([scales[start:stop, :, None], data.unflatten(1, (columns, -1))], 2)
        shape = (len(data), columns * layout.values)
        return Packed(parts.kind, shape, blocks.flatten(1), self._factor(parts))

    def _factor(self, parts: Parts) -> Tensor | None:
        if not parts.factors:
            return None
        values = [self.inner.read(name, torch.float32).view(()) for name in parts.factors]
        factor = torch.stack(values).prod()
        factor = 1 / factor if parts.inverse else factor
        if not 0 < float(factor) < math.inf:
            raise self._damaged(" times ".join(parts.factors), f"is {float(factor):g}")
        return factor

    def _refuse_wild(self, parts: Parts, scales: Tensor) -> None:
        """Raise a RequestError for scales of blocks that are negative, NaN or infinite."""
        if scales.numel() and int(scales.max()) > (126 if parts.kind == "nvfp4" else 254):
            raise self._damaged(parts.scales, "holds negative ones or NaN")

    def _damaged(self, name: str, what: str) -> RequestError:
        return RequestError(
            f"{self.path}: the scale {name} {what}, as no weight has it; the file is damaged;"
            f" {AGAIN}"
        )


def pair_blocks(source: TensorSource, notes: Mapping[str, Mapping[str, Any]]) -> TensorSource:
    """Return a source that joins nvfp4 and mxfp8 weights with their scales; the same without any.

    Args:
        notes: what the file declares of each layer.

    Raises:
        RequestError: for a weight or a scale that is missing or does not fit.
    """
    found = source.tensors
    layers = {layer: _comfy(layer, note["format"]) for layer, note in notes.items()}
    layers |= {
        layer: _lightx2v(source, layer)
        for layer in (name.removesuffix(".weight") for name in found if name.endswith(".weight"))
        if layer not in notes
    }
    weights = {f"{layer}.weight": parts for layer, parts in layers.items() if parts is not None}
    if not weights:
        return source
    infos = {
        name: _described(source, name, parts, notes.get(name.removesuffix(".weight"), {}))
        for name, parts in weights.items()
    }
    hidden = {parts.scales for parts in weights.values()}
    hidden |= {f"{name.removesuffix('weight')}{end}" for name in weights for end in BESIDE}
    tensors = {name: infos.get(name, info) for name, info in found.items() if name not in hidden}
    return BlockSource(
        source.path,
        tensors,
        source,
        weights,
        files=source.files,
        container=source.container,
        metadata=source.metadata,
    )


def _comfy(layer: str, kind: str) -> Parts | None:
    if kind not in BLOCKS:
        return None
    factors = (f"{layer}.weight_scale_2",) if kind == "nvfp4" else ()
    return Parts(kind, f"{layer}.weight_scale", factors)


def _lightx2v(source: TensorSource, layer: str) -> Parts | None:
    if source.tensors[f"{layer}.weight"].dtype != torch.uint8:
        return None
    for ends, inverse in FACTORS:
        names = tuple(f"{layer}.{end}" for end in ends)
        if all(name in source.tensors for name in names):
            return Parts("nvfp4", f"{layer}.weight_scale", names, inverse, low_first=True)
    return None


def _described(
    source: TensorSource, name: str, parts: Parts, note: Mapping[str, Any]
) -> TensorInfo:
    """Return what a weight unpacks into; RequestError where its tensors do not fit together."""
    found, layout = source.tensors, BLOCKS[parts.kind]
    dtype, each = STORED[parts.kind]
    info, scales = found.get(name), found.get(parts.scales)
    missing = [part for part in (name, parts.scales, *parts.factors) if part not in found]
    if info is None or scales is None or missing:
        raise RequestError(
            f"{source.path}: of the {parts.kind} weight {name}, {', '.join(missing)} is missing;"
            f" {AGAIN}, or take another file"
        )
    rows, columns = info.shape if len(info.shape) == 2 else (0, 0)
    columns *= each
    padded = _up(rows, 128) * _up(columns // layout.values, 4)
    if (
        (info.dtype != dtype or not rows or not columns or columns % layout.values)
        or (scales.dtype not in SCALES[parts.kind] or math.prod(scales.shape) != padded)
        or any(
            math.prod(found[one].shape) != 1 or not found[one].dtype.is_floating_point
            for one in parts.factors
        )
    ):
        each_has = ", ".join(
            f"{one} {list(found[one].shape)} of {found[one].dtype}"
            for one in (name, parts.scales, *parts.factors)
        )
        raise RequestError(
            f"{source.path}: these do not make up a weight in {parts.kind}: {each_has}; the file"
            f" is damaged, or in another format of that name; {AGAIN}, or take another file"
        )
    shape = _without_padding(source, name, (rows, columns), layout.values, note)
    size = shape[0] * columns // layout.values * layout.nbytes
    return TensorInfo(shape, torch.float32, parts.kind, size, scale=() if parts.factors else None)


def _without_padding(
    source: TensorSource, name: str, stored: tuple[int, int], step: int, note: Mapping[str, Any]
) -> tuple[int, int]:
    """Return the shape before padding: as the note says; rows as the bias has them; as stored."""
    written = note.get("orig_shape")
    bias = source.tensors.get(f"{name.removesuffix('weight')}bias")
    rows, columns = stored
    if isinstance(written, list) and [type(side) for side in written] == [int, int]:
        rows, columns = written
    elif bias is not None and len(bias.shape) == 1:
        rows = bias.shape[0]
    if (rows, columns) == stored or (_up(rows, step), _up(columns, step)) == stored:
        return rows, columns
    raise RequestError(
        f"{source.path}: {name} is stored as {list(stored)} and should be {[rows, columns]}; the"
        f" file is damaged; {AGAIN}"
    )


def _up(count: int, step: int) -> int:
    return -(-count // step) * step
