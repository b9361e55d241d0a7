"""Stream the blocks of an expert that do not fit the device's memory, one ahead of the current one.

A block's matmul weights form one flat buffer of bytes, with one layout on the host and on the
device, so that one copy moves a block. Two such buffers on the device take turns: while a block
runs from one, the next block is copied into the other. Small tensors (norms, biases, modulation,
LoRAs) stay on the device.

Streamed blocks wait in RAM (host buffers) or in their files, from which each pass reads and
converts them again. One thread reads and copies while the main thread computes. On a GPU the copies
have a stream of their own, and pinned memory as their source.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from wanflow.hardware import thread_on
from wanflow.models.dit import (
    Block,
    Conditioning,
    Head,
    Runs,
    TextStates,
    Trunk,
    WanDiT,
    run_blocks,
)
from wanflow.transforms.host_memory import HostMemory

ALIGN = 256  # bytes; suits every kernel
# Reads a block's tensors, by their names in the block, into these views on the host.
BlockReader = Callable[[int, Mapping[str, Tensor]], None]


class Worker(Protocol):
    """Runs reads and copies: an executor of `concurrent.futures`, or `SyncExecutor`."""

    def submit(self, work: Callable[[], None], /) -> Future[None]: ...
    def shutdown(self, wait: bool = True) -> None: ...


class SyncExecutor:
    """Runs work at once, in the caller's thread: for tracing and for tests."""

    def submit(self, work: Callable[[], None], /) -> Future[None]:
        done: Future[None] = Future()
        work()
        done.set_result(None)
        return done

    def shutdown(self, wait: bool = True) -> None:
        pass


@dataclass(frozen=True)
class BufferLayout:
    """The tensors of one block in its buffer: (name, dtype, shape, first byte) each."""

    entries: tuple[tuple[str, torch.dtype, torch.Size, int], ...]
    nbytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> BufferLayout:
        """Lay tensors out one after the other."""
        entries, end = [], 0
        for name, value in tensors.items():
            entries.append((name, value.dtype, value.shape, end))
            end += -(-value.nbytes // ALIGN) * ALIGN
        return cls(tuple(entries), end)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return the tensors in a buffer, uint8 [at least nbytes]."""
        return {
            name: buffer[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for name, dtype, shape, start in self.entries
        }


def matmul_leaves(block: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return the parameters that are streamed: {name: (leaf, name in the leaf)}, no biases."""
    return {
        f"{path}.{name}": (leaf, name)
        for path, leaf in block.named_modules()
        if hasattr(leaf, "in_features") and hasattr(leaf, "out_features")
        for name, value in leaf.named_parameters(recurse=False)
        if name != "bias" and value is not None
    }


class BlockBuffers:
    """A block's streamed parameters: views of a buffer while it runs, else stand-ins."""

    def __init__(self, block: nn.Module) -> None:
        self.leaves = matmul_leaves(block)
        self.layout = BufferLayout.of(
            {name: getattr(leaf, key) for name, (leaf, key) in self.leaves.items()}
        )

    def bind(self, views: Mapping[str, Tensor]) -> None:
        """Make these tensors the block's parameters."""
        for name, view in views.items():
            leaf, key = self.leaves[name]
            setattr(leaf, key, nn.Parameter(view, requires_grad=False))

    def release(self, device: torch.device) -> None:
        """Put stand-ins of one element, with the shape, dtype and device that LoRAs ask for."""
        for name, dtype, shape, _ in self.layout.entries:
            leaf, key = self.leaves[name]
            stand_in = torch.empty((), dtype=dtype, device=device).expand(shape)
            setattr(leaf, key, nn.Parameter(stand_in, requires_grad=False))


class HostBlocks:
    """Blocks in RAM, in one copy for the ranks of a machine.

    Make it where all ranks do the same, as they meet here; `fill` may run in a thread.

    Args:
        layouts: of each block, by its index.
        memory: gives the buffers.

    Attributes:
        buffers: what `fill` writes and a GPU copies from.
        copies: the same memory, in which a change stays in this process. Not before `meet`.
    """

    def __init__(self, layouts: Mapping[int, BufferLayout], memory: HostMemory) -> None:
        self.layouts, self._memory = dict(layouts), memory
        shared = memory.shared([layout.nbytes for layout in layouts.values()])
        self.buffers = dict(zip(layouts, shared.buffers, strict=True))
        self.copies = dict(zip(layouts, shared.copies, strict=True))
        self._rank, self._ranks = shared.rank, shared.ranks

    def fill(
        self,
        fetch: BlockReader,
        report: Callable[[int], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Pin the buffers, and read this rank's share of the blocks.

        Args:
            report: called with the number of buffers that are done.
            stop: called before each block; True ends the reading early.
        """
        for number, (index, buffer) in enumerate(self.buffers.items()):
            if stop():
                break
            self._memory.pin_buffer(buffer)
            if number % self._ranks == self._rank:
                fetch(index, self.layouts[index].views(buffer))
            if report is not None:
                report(number + 1)

    def meet(self, error: Exception | None = None) -> None:
        """Wait until every rank has filled its share; raise on all if one has an error."""
        self._memory.agree(error, "blocks in RAM")

    def fill_and_meet(
        self, fetch: BlockReader, report: Callable[[int], None] | None = None
    ) -> None:
        """Read on this thread, and wait for the other ranks."""
        try:
            self.fill(fetch, report)
        except Exception as error:
            self.meet(error)
        self.meet()


def load_to_host(
    model: WanDiT, fetch: BlockReader, memory: HostMemory, skip: Collection[int] = ()
) -> dict[int, Tensor]:
    """Read blocks, but for those in `skip`, into RAM; return their buffers by the block's index."""
    layouts = {
        index: BlockBuffers(block).layout
        for index, block in enumerate(model.blocks)
        if index not in skip
    }
    blocks = HostBlocks(layouts, memory)
    blocks.fill_and_meet(fetch)
    return blocks.buffers


def evenly_spaced_resident(layers: int, resident: int) -> set[int]:
    """Return which blocks stay resident, with the streamed ones spread evenly between them.

    A copy then overlaps with the work of several blocks.
    """
    streamed = layers - max(0, min(resident, layers))
    return set(range(layers)) - {(2 * n + 1) * layers // (2 * streamed) for n in range(streamed)}


class CopyStream:
    """Copies to a device: on a GPU in a stream next to its work, elsewhere at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(
        self, target: Tensor, source: Tensor, after: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        """Copy once `after` has happened; return the event of its end."""
        if self.stream is None:
            target.copy_(source)
            return None
        with torch.cuda.stream(self.stream):
            if after is not None:
                self.stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Make the device's work wait for a copy."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def mark(self) -> torch.cuda.Event | None:
        """Return the event of the end of all work that the device has been given."""
        if self.stream is None:
            return None
        return torch.cuda.current_stream(self.device).record_event()


@dataclass
class _Slot:
    """A buffer on the device, with the host buffer that carries files to a GPU.

    copied: the end of the copy into it. used: the end of the work on what it held.
    """

    buffer: Tensor
    staging: Tensor | None
    copied: torch.cuda.Event | None = None
    used: torch.cuda.Event | None = None


class Streaming(nn.Module):
    """An expert with some of its blocks streamed; call it like its `WanDiT`.

    Args:
        model: on the device, but for the matmul weights of its blocks, which may be on meta.
        fetch: reads a block's tensors.
        resident: blocks that stay on the device.
        host_buffers: of `HostBlocks`. Resident blocks are taken out; the others are streamed from
            there, which on a CPU takes no copy. None: `fetch` reads every block, and streamed ones
            again in each pass.
        worker: runs the reads and copies.
        memory: gives the buffers between files and a GPU.
        placed: whether the resident blocks have their weights already.
        report: called with the number of resident blocks in place.
    """

    def __init__(
        self,
        model: WanDiT,
        fetch: BlockReader,
        resident: Collection[int],
        device: torch.device,
        host_buffers: dict[int, Tensor] | None = None,
        worker: Worker | None = None,
        report: Callable[[int], None] | None = None,
        memory: HostMemory | None = None,
        placed: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.device = model, device
        self._fetch, self._host_buffers = fetch, host_buffers
        self._block_buffers = [BlockBuffers(block) for block in model.blocks]
        self._copies = CopyStream(device)
        self._memory = memory or HostMemory(device.type == "cuda")
        if not placed:
            self._load_resident(sorted(resident), report)
        self.streamed = [
            index for index in range(len(self._block_buffers)) if index not in resident
        ]
        self._position = {index: position for position, index in enumerate(self.streamed)}
        for index in self.streamed:
            self._block_buffers[index].release(device)
        largest = max(
            (self._block_buffers[index].layout.nbytes for index in self.streamed), default=0
        )
        staged = host_buffers is None and device.type == "cuda"
        # On a CPU a block in RAM is where it is needed.
        self._in_place = (
            host_buffers is not None and device.type == "cpu" and self._copies.stream is None
        )
        self._free = [
            _Slot(
                torch.empty(largest, dtype=torch.uint8, device=device),
                self._memory.buffer(largest) if staged else None,
                # Work that the device still has may use the memory that this buffer is given.
                used=self._copies.mark(),
            )
            for _ in range(2 if self.streamed and not self._in_place else 0)
        ]
        self._in_flight: deque[tuple[int, _Slot, Future[None]]] = deque()
        self._worker = worker or thread_on(device, "wanflow-blocks")

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        text: Tensor | TextStates,
        trunk: Trunk = run_blocks,
        rope: Tensor | None = None,
        runs: Runs = (),
    ) -> Tensor:
        """As `WanDiT.forward`."""

        def streamed_trunk(
            blocks: object, head: Head, tokens: Tensor, conditioning: Conditioning
        ) -> Tensor:
            return trunk(self.stream(), head, tokens, conditioning)

        states = self.text_states(text) if isinstance(text, Tensor) else text
        return cast(Tensor, self.model(latent, timestep, states, streamed_trunk, rope, runs))

    def text_states(self, text: Tensor) -> TextStates:
        """As `WanDiT.text_states`; of a streamed block only the two weights it needs are read."""
        return self.model.text_states(text, self._text_blocks())

    def close(self) -> None:
        """Wait for blocks in flight, and free all buffers."""
        self._drain()
        self._worker.shutdown()
        if self._copies.stream is not None:
            self._copies.stream.synchronize()
        self._free.clear()
        self._host_buffers = None

    def stream(self) -> Iterator[Block]:
        """Yield the blocks in order, each with its weights while it is the current one."""
        for index, block in enumerate(self.model.blocks):
            if index not in self._position:
                yield block
                continue
            buffers = self._block_buffers[index]
            if self._in_place and self._host_buffers is not None:
                buffers.bind(buffers.layout.views(self._host_buffers[index]))
                try:
                    yield block
                finally:
                    buffers.release(self.device)
                continue
            slot = self._acquire(index)
            buffers.bind(buffers.layout.views(slot.buffer))
            try:
                yield block
            finally:  # also when the pass is abandoned
                buffers.release(self.device)
                slot.used = self._copies.mark()
                self._free.append(slot)
                self._prefetch(index)

    def _load_resident(self, indexes: list[int], report: Callable[[int], None] | None) -> None:
        staging = None
        for count, index in enumerate(indexes):
            buffers = self._block_buffers[index]
            layout = buffers.layout
            source = None if self._host_buffers is None else self._host_buffers.pop(index, None)
            if self.device.type == "cpu":
                target = source
                if target is None:
                    target = torch.empty(layout.nbytes, dtype=torch.uint8)
                    self._fetch(index, layout.views(target))
            else:
                target = torch.empty(layout.nbytes, dtype=torch.uint8, device=self.device)
                if source is None:
                    if staging is None or staging.nbytes < layout.nbytes:
                        staging = self._memory.buffer(layout.nbytes)
                    source = staging[: layout.nbytes]
                    self._fetch(index, layout.views(source))
                target.copy_(source)
            buffers.bind(layout.views(target))
            if report is not None:
                report(count + 1)

    def _text_blocks(self) -> Iterator[Block]:
        """The blocks, streamed ones with no more than the weights of the text's keys and values."""
        for index, block in enumerate(self.model.blocks):
            if index not in self._position:
                yield block
                continue
            buffers = self._block_buffers[index]
            text_only = BufferLayout.of(
                {
                    name: torch.empty(shape, dtype=dtype, device="meta")
                    for name, dtype, shape, _ in buffers.layout.entries
                    if name.startswith(("cross_attn.k.", "cross_attn.v."))
                }
            )
            views = text_only.views(torch.empty(text_only.nbytes, dtype=torch.uint8))
            if self._host_buffers is None:
                self._fetch(index, views)
            else:
                stored = buffers.layout.views(self._host_buffers[index])
                views = {name: view for name, view in stored.items() if name in views}
            buffers.bind({name: view.to(self.device) for name, view in views.items()})
            try:
                yield block
            finally:
                buffers.release(self.device)

    def _acquire(self, index: int) -> _Slot:
        """The slot with a block's weights, once they are there.

        An abandoned pass leaves other blocks in flight: they are dropped.
        """
        if not self._in_flight or self._in_flight[0][0] != index:
            self._drain()
            self._submit(index)
        _, slot, sent = self._in_flight.popleft()
        try:
            sent.result()
        except BaseException:
            self._free.append(slot)
            raise
        self._copies.wait(slot.copied)
        self._prefetch(index)
        return slot

    def _prefetch(self, index: int) -> None:
        """Fill free slots with the next blocks; the first block follows the last."""
        last = self._in_flight[-1][0] if self._in_flight else index
        while self._free:
            last = self.streamed[(self._position[last] + 1) % len(self.streamed)]
            self._submit(last)

    def _submit(self, index: int) -> None:
        slot = self._free.pop()
        work = self._worker.submit(lambda: self._fill(slot, index))
        self._in_flight.append((index, slot, work))

    def _drain(self) -> None:
        while self._in_flight:
            _, slot, sent = self._in_flight.popleft()
            sent.exception()
            self._free.append(slot)

    @torch.no_grad()
    def _fill(self, slot: _Slot, index: int) -> None:
        """Read a block and copy it into a slot; runs in the worker."""
        layout = self._block_buffers[index].layout
        if self._host_buffers is not None:
            source = self._host_buffers[index]
        elif slot.staging is None and self.device.type == "cpu":
            self._fetch(index, layout.views(slot.buffer))
            return
        else:
            source = (
                slot.staging
                if slot.staging is not None
                else torch.empty(layout.nbytes, dtype=torch.uint8)
            )
            if slot.copied is not None:
                slot.copied.synchronize()  # the copy before this one may still read from it
            self._fetch(index, layout.views(source))
        slot.copied = self._copies.copy(
            slot.buffer[: layout.nbytes], source[: layout.nbytes], slot.used
        )
