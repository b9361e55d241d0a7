"""A model as far as a plan needs to know it: from its files' headers, or from the published shapes
alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from wanflow.checkpoint.containers import TensorInfo, weight_files
from wanflow.checkpoint.load import Checkpoint, Headers, build
from wanflow.checkpoint.source import open_part
from wanflow.models.dit import WanDiT
from wanflow.models.umt5 import UMT5Encoder
from wanflow.models.vae import WanVAE
from wanflow.presets import T2V_A14B, ModelSpec
from wanflow.runtime import is_small

Which = str  # the name of an expert, "t5" or "vae"
PUBLISHED_DISK = 126_200_000_000  # bytes of the official folder
PUBLISHED = {
    "high": torch.float32,
    "low": torch.float32,
    "t5": torch.bfloat16,
    "vae": torch.float32,
}  # what its files hold


@dataclass(frozen=True)
class Model:
    """Shapes, files by their headers, and sizes. `sources` is None where only the official files'
    form is known.

    parameters: of each part, a count. file_bytes: what loading a part reads. disk: of all files.
    """

    preset: ModelSpec
    sources: Mapping[Which, Headers] | None
    parameters: Mapping[Which, int]
    file_bytes: Mapping[Which, int]
    disk: int

    def small(self, dtype: torch.dtype) -> bool:
        """Whether `assemble` keeps all of it in memory."""
        return is_small(self.parameters["high"] * dtype.itemsize)

    def source(self, which: Which) -> Headers | None:
        return None if self.sources is None else self.sources[which]

    def module(self, which: Which) -> nn.Module:
        """A part, plain and on meta."""
        return _module(self.preset, which)


def _module(preset: ModelSpec, which: Which) -> nn.Module:
    if which == "t5":
        return build(UMT5Encoder, preset.text)
    return build(WanVAE, preset.vae) if which == "vae" else build(WanDiT, preset.dit)


def _counts(preset: ModelSpec) -> dict[Which, int]:
    parts: tuple[Which, ...] = ("high", "t5", "vae")
    counts: dict[Which, int] = {
        which: sum(value.numel() for value in _module(preset, which).parameters())
        for which in parts
    }
    return {**counts, "low": counts["high"]}


def published(preset: ModelSpec = T2V_A14B) -> Model:
    """The official model, or one of other shapes in the same kind of files, without having it."""
    counts = _counts(preset)
    return Model(
        preset,
        None,
        counts,
        {which: counts[which] * PUBLISHED[which].itemsize for which in counts},
        PUBLISHED_DISK,
    )


def describe(checkpoint: Checkpoint) -> Model:
    """A model on disk."""
    paths: dict[Which, Path] = {
        "high": checkpoint.experts["high"],
        "low": checkpoint.experts["low"],
        "t5": checkpoint.t5,
        "vae": checkpoint.vae,
    }
    sources = {
        which: open_part(cast(Any, "dit" if which in ("high", "low") else which), path)
        for which, path in paths.items()
    }
    sizes = {
        which: sum(info.nbytes for info in source.tensors.values())
        for which, source in sources.items()
    }
    files = {
        file
        for path in paths.values()
        for file in (weight_files(path) if path.is_dir() else [path])
        if file.exists()
    }
    return Model(
        checkpoint.preset,
        sources,
        _counts(checkpoint.preset),
        sizes,
        sum(file.stat().st_size for file in files),
    )


@dataclass(frozen=True)
class FirstBlocks:
    """A file of which only the first blocks are looked at."""

    inner: Headers
    layers: int

    @property
    def path(self) -> Path:
        return self.inner.path

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: info for name, info in self.inner.tensors.items() if self._stays(name)}

    def _stays(self, name: str) -> bool:
        head, _, rest = name.partition(".")
        return head != "blocks" or int(rest.partition(".")[0]) < self.layers
