"""Hold what decides where an expert is placed, and in which form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from wanflow.checkpoint.load import Change
from wanflow.runtime import Runtime

if TYPE_CHECKING:
    from wanflow.parallel.groups import ParallelContext
    from wanflow.transforms.host_memory import HostMemory

Changes = Mapping[str, Change]  # by parameter: what the loader does to it


def host_copies(ranks: int, system: str = "linux") -> int:
    """Return how many copies of streamed or prefetched blocks the RAM of a machine holds.

    Its ranks share one, in memory that the kernel frees with the last of them. Other systems than
    Linux have none like it, and there each rank holds its own.

    Args:
        ranks: of one run on this machine.
        system: of the machine, as in `sys.platform`.
    """
    return 1 if system == "linux" else ranks


@dataclass(frozen=True)
class Placement:
    """Where an expert is placed, and in which form.

    Attributes:
        ctx: this rank among several; None: the process is alone.
    """

    dtype: torch.dtype
    device: torch.device
    runtime: Runtime
    ctx: ParallelContext | None = None

    def from_ram(self) -> bool:
        """Return whether streamed blocks come from RAM; a CPU would only hold them twice."""
        source = self.runtime.stream_from or ("disk" if self.device.type == "cpu" else "ram")
        return source == "ram"

    def shares(self) -> bool:
        """Return whether loading needs `memory`: for a GPU, or for several ranks."""
        return self.device.type == "cuda" or (self.ctx is not None and self.ctx.layout.size > 1)

    @cached_property
    def memory(self) -> HostMemory:
        """RAM for weights on their way to the device, or that wait for it."""
        from wanflow.transforms.host_memory import HostMemory

        return HostMemory(self.device.type == "cuda", self.ctx)
