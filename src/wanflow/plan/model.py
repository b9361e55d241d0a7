"""What a plan asks of a checkpoint: whether it is small, and its first blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.checkpoint.containers import Headers, TensorInfo
from wanflow.runtime import is_small


def small(model: Checkpoint, dtype: torch.dtype) -> bool:
    """Return whether `assemble` keeps all of a model in memory."""
    return is_small(model.parameters("high") * dtype.itemsize)


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
