"""A tensor in a file as a stream of flat pieces, so that what reads all of 57 GB keeps megabytes of
it in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from wanflow.checkpoint.containers import (
    SafetensorsFile,
    ShardedFolder,
    TensorSource,
    TorchFile,
    fill,
    reading,
)
from wanflow.checkpoint.fp8_scales import ScaledSource
from wanflow.checkpoint.gguf import GGUFFile
from wanflow.checkpoint.source import OfficialSource
from wanflow.transforms.ggml import LAYOUTS
from wanflow.transforms.packed import Packed

VALUES = (
    1 << 20
)  # of a piece: 4 MB in float32; larger ones leave the processor's cache, and are slower


def stream(source: TensorSource, name: str) -> Iterator[Tensor]:
    """The values of a tensor in order: 1-D, `VALUES` at most, as stored; packed ones unpacked to
    float32.

    Each piece but the last is whole blocks of any packed kind (a multiple of 256 values), or whole
    rows. A piece may be overwritten by the next. Memory is a piece, and for a packed tensor its
    packed data.

    Raises:
        RequestError: when the file breaks off, or a scale is damaged.
    """
    if source.tensors[name].packing is not None:
        yield from _unpacked(source.packed(name))
        return
    while isinstance(source, OfficialSource | ScaledSource):
        name = source.names[name] if isinstance(source, OfficialSource) else name
        source = source.inner
    if isinstance(source, ShardedFolder):
        source = source.shards[name]
    if isinstance(source, SafetensorsFile | GGUFFile):
        yield from _streamed(source, name)
    elif isinstance(source, TorchFile):
        yield from source.mapped[name].flatten().split(VALUES)
    else:
        yield from source.read(name).flatten().split(VALUES)


def _streamed(source: SafetensorsFile | GGUFFile, name: str) -> Iterator[Tensor]:
    info = source.tensors[name]
    count = math.prod(info.shape)
    room = torch.empty(min(count, VALUES), dtype=info.dtype)
    with reading(source.path), source.path.open("rb", buffering=0) as file:
        file.seek(source.starts[name])
        for start in range(0, count, VALUES):
            piece = room[: count - start]
            fill(piece, file, source.path)
            yield piece


def _unpacked(packed: Packed) -> Iterator[Tensor]:
    count = math.prod(packed.shape)
    if not packed.shape or not count:
        yield packed.dense().flatten()
        return
    if packed.kind in LAYOUTS:  # blocks follow one another whatever the shape is
        layout = LAYOUTS[packed.kind]
        packed = Packed(
            packed.kind,
            (count // layout.values, layout.values),
            packed.data.reshape(-1, layout.nbytes),
        )
    step = max(1, VALUES // math.prod(packed.shape[1:]))
    for start in range(0, packed.shape[0], step):
        yield packed.dense(rows=slice(start, start + step)).flatten()


def extremes(piece: Tensor) -> tuple[float, float]:
    """The least and the largest value of a piece, both NaN where it holds one; 0 and 0 for an empty
    one.

    It tells whether all are finite in a twentieth of the time that `isfinite` takes.
    """
    if not len(piece):
        return 0.0, 0.0
    low, high = torch.aminmax(piece)
    return float(low), float(high)


def finite(piece: Tensor) -> bool:
    return all(map(math.isfinite, extremes(piece)))
