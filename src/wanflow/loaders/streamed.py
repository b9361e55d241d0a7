"""Load an expert whose blocks are streamed, or one that is prefetched into RAM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Event

import torch
from torch import Tensor, nn

from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.checkpoint.containers import Report, TensorSource
from wanflow.checkpoint.load import load_module, materialize_param
from wanflow.checkpoint.structure import expert_structure
from wanflow.hardware import thread_on
from wanflow.loaders.placement import Changes, Placement
from wanflow.models.dit import WanDiT
from wanflow.presets import Expert
from wanflow.transforms.block_streaming import (
    BlockReader,
    Streaming,
    evenly_spaced_resident,
    load_to_host,
    matmul_leaves,
)


@dataclass
class HostExpert:
    """An expert in RAM: its blocks' matmul weights in `host_buffers`, the rest in the model."""

    model: WanDiT
    fetch: BlockReader
    host_buffers: dict[int, Tensor]


def resident_blocks(where: Placement, layers: int) -> set[int]:
    """Return the blocks that stay on the device."""
    count = where.runtime.resident_blocks
    return evenly_spaced_resident(layers, layers if count is None else count)


def open_streamed(
    checkpoint: Checkpoint,
    which: Expert,
    where: Placement,
    report: Report | None,
    changes: Changes | None,
) -> Streaming:
    """Load an expert with some of its blocks streamed."""
    resident = resident_blocks(where, checkpoint.spec.dit.num_layers)
    model, fetch, total = _rest(checkpoint, which, where, where.device, changes or {})
    on_block = _block_reporter(report, total, len(list(model.blocks)))
    host_buffers = (
        load_to_host(model, fetch, where.device.type == "cuda", on_block, skip=resident)
        if where.from_ram()
        else None
    )
    return Streaming(
        model,
        fetch,
        resident,
        where.device,
        host_buffers,
        report=None if host_buffers is not None else on_block,
    )


def read_expert(
    checkpoint: Checkpoint,
    which: Expert,
    where: Placement,
    changes: Changes | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> HostExpert:
    """Read an expert into RAM in its final form; `place` moves it to its device."""
    model, fetch, _ = _rest(checkpoint, which, where, torch.device("cpu"), changes or {})
    return HostExpert(
        model, fetch, load_to_host(model, fetch, where.device.type == "cuda", stop=stop)
    )


def place(read: HostExpert, where: Placement) -> WanDiT | Streaming:
    """Move an expert from RAM to its device."""
    for module in read.model.modules():
        for key, value in list(module.named_parameters(recurse=False)):
            if not value.is_meta:
                setattr(module, key, nn.Parameter(value.to(where.device), requires_grad=False))
    resident = resident_blocks(where, len(list(read.model.blocks)))
    streaming = Streaming(read.model, read.fetch, resident, where.device, read.host_buffers)
    if streaming.streamed:
        return streaming
    streaming.close()
    return read.model


class Prefetcher:
    """Reads the next expert into RAM, in a thread, while the current one computes."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        which: Expert,
        where: Placement,
        changes: Changes | None,
        key: object,
    ) -> None:
        self.which, self.where, self.key = which, where, key
        self._stop = Event()
        self._thread = thread_on(where.device, "wanflow-ahead")
        self._read = self._thread.submit(
            lambda: read_expert(checkpoint, which, where, changes, self._stop.is_set)
        )

    def take(self) -> WanDiT | Streaming:
        """Wait for the reading, and return the expert on its device."""
        try:
            read = self._read.result()
        finally:
            self._thread.shutdown()
        return place(read, self.where)

    def drop(self) -> None:
        """Stop reading, and free what was read."""
        self._stop.set()
        self._thread.shutdown()


def _rest(
    checkpoint: Checkpoint, which: Expert, where: Placement, device: torch.device, changes: Changes
) -> tuple[WanDiT, BlockReader, int]:
    """Load all but the blocks' matmul weights, which stay on meta.

    Returns:
        The model, what reads a block's matmul weights, and their bytes in the file.
    """
    source = checkpoint.source(which)
    model = expert_structure(
        checkpoint.spec.dit, source, where.runtime, where.dtype, where.device, changes
    )
    streamed = {
        f"blocks.{index}.{path}.weight"
        for index, block in enumerate(model.blocks)
        for path in {name.rpartition(".")[0] for name in matmul_leaves(block)}
    }
    load_module(model, source, device, changes=changes, skip=streamed)
    return (
        model,
        block_reader(model, source, changes),
        sum(source.tensors[name].nbytes for name in streamed),
    )


def block_reader(model: WanDiT, source: TensorSource, changes: Changes) -> BlockReader:
    """Return what reads a block's matmul weights, in the form that each leaf holds."""
    # The leaves before LoRAs wrap them.
    blocks = [
        {name.rpartition(".")[0]: leaf for name, (leaf, _) in matmul_leaves(block).items()}
        for block in model.blocks
    ]

    def fetch(index: int, views: Mapping[str, Tensor]) -> None:
        for path in dict.fromkeys(name.rpartition(".")[0] for name in views):
            for key, value in materialize_param(
                blocks[index][path], "weight", f"blocks.{index}.{path}.weight", source, changes
            ).items():
                views[f"{path}.{key}"].copy_(value)

    return fetch


def _block_reporter(report: Report | None, total: int, layers: int) -> Callable[[int], None] | None:
    return None if report is None else lambda done: report(total * done // layers, total)
