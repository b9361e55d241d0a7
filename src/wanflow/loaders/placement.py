"""Hold what decides where an expert is placed, and in which form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from wanflow.checkpoint.load import Change
from wanflow.parallel.groups import ParallelContext
from wanflow.runtime import Runtime

Changes = Mapping[str, Change]  # by parameter: what the loader does to it


@dataclass(frozen=True)
class Placement:
    """Dtype, device, settings and ranks of an expert."""

    dtype: torch.dtype
    device: torch.device
    runtime: Runtime
    ctx: ParallelContext | None = None

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a shard of the weights."""
        return bool(self.runtime.dit_fsdp) and self.ctx is not None and self.ctx.layout.size > 1

    def from_ram(self) -> bool:
        """Return whether streamed blocks come from RAM; a CPU would only hold them twice."""
        source = self.runtime.stream_from or ("disk" if self.device.type == "cpu" else "ram")
        return source == "ram"
