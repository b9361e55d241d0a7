"""Load an expert whose blocks are streamed, or one that is prefetched into RAM."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from threading import Event

from torch import Tensor, nn

from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.checkpoint.containers import Report, TensorSource
from wanflow.checkpoint.load import load_module, materialize_param, place_of, stored_parts
from wanflow.checkpoint.structure import expert_structure, has_other_form, weight_names
from wanflow.hardware import thread_on
from wanflow.loaders.placement import Changes, Placement
from wanflow.models.dit import WanDiT
from wanflow.presets import Expert
from wanflow.transforms.block_streaming import (
    BlockBuffers,
    BlockReader,
    BufferLayout,
    HostBlocks,
    Streaming,
    evenly_spaced_resident,
    matmul_leaves,
)

REST = -1  # stands among blocks for what is not streamed


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
    source, device, from_ram = checkpoint.source(which), where.device, where.from_ram()
    resident = resident_blocks(where, checkpoint.spec.dit.num_layers)
    total, done = source.nbytes, 0
    if from_ram and device.type == "cpu":  # all of it waits where it is needed
        read = HostExpert(checkpoint, which, where, changes)
        read.blocks.fill_and_meet(read.fetch, _by_block(report, 0, total, len(read.blocks.layouts)))
        return read.stream(resident)
    model = _structure(checkpoint, which, where, changes)
    streamed = [n for n in range(checkpoint.spec.dit.num_layers) if n not in resident]
    waiting = _weights(model, streamed)

    def on_tensor(read: int, _: int) -> None:
        nonlocal done
        done = read
        if report is not None:
            report(read, total)

    load_module(model, source, device, on_tensor, changes, waiting, where.memory)
    fetch, buffers = block_reader(model, source, changes or {}), None
    if from_ram:
        layouts = {
            index: BlockBuffers(block).layout
            for index, block in enumerate(model.blocks)
            if index not in resident
        }
        blocks = HostBlocks(layouts, where.memory)
        blocks.fill_and_meet(fetch, _by_block(report, done, total, len(layouts)))
        buffers = blocks.buffers
    return Streaming(model, fetch, resident, device, buffers, memory=where.memory, placed=True)


class HostExpert:
    """An expert in RAM in its final form: one copy for the ranks of a machine.

    Make it where all ranks do the same; its blocks may then be filled in a thread.
    """

    def __init__(
        self, checkpoint: Checkpoint, which: Expert, where: Placement, changes: Changes | None
    ) -> None:
        self.where, self.model = where, _structure(checkpoint, which, where, changes)
        blocks = dict(enumerate(self.model.blocks))
        streamed = _weights(self.model, blocks)
        self._rest = _Rest(self.model, streamed)
        layouts = {index: BlockBuffers(block).layout for index, block in blocks.items()}
        self.blocks = HostBlocks({REST: self._rest.layout, **layouts}, where.memory)
        source = checkpoint.source(which)
        self._fetch = block_reader(self.model, source, changes or {})
        self._read_rest = self._rest.reader(source, changes or {})

    def fetch(self, index: int, views: Mapping[str, Tensor]) -> None:
        """Read a block, or the rest; see `BlockReader`."""
        if index == REST:
            self._read_rest(views)
        else:
            self._fetch(index, views)

    def place(self) -> WanDiT | Streaming:
        """Move the expert to its device."""
        streaming = self.stream(resident_blocks(self.where, len(list(self.model.blocks))))
        if streaming.streamed:
            return streaming
        streaming.close()
        return self.model

    def stream(self, resident: set[int]) -> Streaming:
        """Move all but the streamed blocks to the device."""
        device, buffers = self.where.device, self.blocks.buffers
        del buffers[REST]
        # A CPU uses it where it is. LoRAs may change it, in this process alone.
        values = self._rest.layout.views(self.blocks.copies[REST])
        self._rest.bind({name: value.to(device) for name, value in values.items()})
        self.blocks.copies.clear()
        return Streaming(
            self.model, self._fetch, resident, device, buffers, memory=self.where.memory
        )


class _Rest:
    """The parameters of an expert that are not streamed, in one buffer."""

    def __init__(self, model: WanDiT, streamed: Collection[str]) -> None:
        self.model = model
        self.names = [name for name in weight_names(model) if name not in streamed]
        self.layout = BufferLayout.of(
            {
                f"{name.rpartition('.')[0]}.{key}": value
                for name in self.names
                for key, value in stored_parts(*place_of(model, name)).items()
            }
        )

    def reader(
        self, source: TensorSource, changes: Changes
    ) -> Callable[[Mapping[str, Tensor]], None]:
        """Return what reads them into views."""
        places = [(name, *place_of(self.model, name)) for name in self.names]

        def read(views: Mapping[str, Tensor]) -> None:
            for name, holder, key in places:
                _read_into(views, name.rpartition(".")[0], holder, key, name, source, changes)

        return read

    def bind(self, values: Mapping[str, Tensor]) -> None:
        """Make these the model's parameters."""
        for name, value in values.items():
            holder, key = place_of(self.model, name)
            setattr(holder, key, nn.Parameter(value, requires_grad=False))


class Prefetcher:
    """Reads the next expert into RAM, in a thread, while the current one computes.

    Every rank must make it, and take or drop it, at the same step.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        which: Expert,
        where: Placement,
        changes: Changes | None,
        key: object,
    ) -> None:
        self.which, self.key = which, key
        self._stop = Event()
        self._expert = expert = HostExpert(checkpoint, which, where, changes)
        self._thread = thread_on(where.device, "wanflow-ahead")
        self._read = self._thread.submit(
            lambda: expert.blocks.fill(expert.fetch, stop=self._stop.is_set)
        )

    def take(self) -> WanDiT | Streaming:
        """Wait for the reading, and return the expert on its device."""
        error = self._read.exception()
        self._thread.shutdown()
        if error is not None and not isinstance(error, Exception):
            raise error
        self._expert.blocks.meet(error)
        return self._expert.place()

    def drop(self) -> None:
        """Stop reading, and free what was read."""
        self._stop.set()
        self._thread.shutdown()


def _structure(
    checkpoint: Checkpoint, which: Expert, where: Placement, changes: Changes | None
) -> WanDiT:
    """Return an expert on meta."""
    return expert_structure(
        checkpoint.spec.dit,
        checkpoint.source(which),
        where.runtime,
        where.dtype,
        where.device,
        changes or {},
    )


def _weights(model: WanDiT, blocks: Collection[int]) -> set[str]:
    """Return the file's names of these blocks' matmul weights."""
    return {
        f"blocks.{index}.{path}.weight"
        for index, block in enumerate(model.blocks)
        if index in blocks
        for path in {name.rpartition(".")[0] for name in matmul_leaves(block)}
    }


def block_reader(model: WanDiT, source: TensorSource, changes: Changes) -> BlockReader:
    """Return what reads a block's matmul weights, in the form that each leaf holds."""
    # The leaves before LoRAs wrap them.
    blocks = [
        {name.rpartition(".")[0]: leaf for name, (leaf, _) in matmul_leaves(block).items()}
        for block in model.blocks
    ]

    def fetch(index: int, views: Mapping[str, Tensor]) -> None:
        for path in dict.fromkeys(name.rpartition(".")[0] for name in views):
            leaf, name = blocks[index][path], f"blocks.{index}.{path}.weight"
            _read_into(views, path, leaf, "weight", name, source, changes)

    return fetch


def _read_into(
    views: Mapping[str, Tensor],
    path: str,
    holder: nn.Module,
    key: str,
    name: str,
    source: TensorSource,
    changes: Changes,
) -> None:
    """Read a tensor into views of a buffer: at once where it is plain, else by way of its form."""
    if name not in changes and not has_other_form(holder):
        view = views[f"{path}.{key}"]
        source.read(name, view.dtype, None, view)
        return
    for part, value in materialize_param(holder, key, name, source, changes).items():
        views[f"{path}.{part}"].copy_(value)


def _by_block(
    report: Report | None, before: int, total: int, blocks: int
) -> Callable[[int], None] | None:
    """Return what reports bytes for a number of blocks that are done."""
    if report is None:
        return None
    return lambda done: report(before + (total - before) * done // max(1, blocks), total)
