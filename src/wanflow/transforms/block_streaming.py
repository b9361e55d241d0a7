"""An expert whose blocks are not all in the device's memory: those that are not are streamed, one
ahead of the one at work.

The weights of a block's matmuls lie in one flat buffer of bytes, laid out the same way on the host
and on the device, so that a block moves in one copy. Two such buffers on the device take turns:
while a block works in one, the next block is copied into the other. Small tensors (norms, biases,
modulation, what LoRAs add) stay on the device.

Streamed blocks wait in RAM (`homes`) or in their files, from which they are read and converted
again in each pass. Reading and copying are done by one thread beside the one that works; on a GPU
the copies have a stream of their own, and pinned memory to come from.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from wanflow.models.dit import (
    Block,
    Conditioning,
    Head,
    SelfAttention,
    TextStates,
    Trunk,
    WanDiT,
    run_blocks,
)

logger = logging.getLogger("wanflow")

ALIGN = 256  # bytes: what every kernel is content with
# Writes tensors of a block, by their names within it, into these views on the host.
BlockReader = Callable[[int, Mapping[str, Tensor]], None]


class Worker(Protocol):
    """What does the copying; `concurrent.futures` has the usual ones."""

    def submit(self, work: Callable[[], None], /) -> Future[None]: ...
    def shutdown(self, wait: bool = True) -> None: ...


class SyncExecutor:
    """A worker that is the caller: for tracing and for tests."""

    def submit(self, work: Callable[[], None], /) -> Future[None]:
        done: Future[None] = Future()
        work()
        done.set_result(None)
        return done

    def shutdown(self, wait: bool = True) -> None:
        pass


# layout


@dataclass(frozen=True)
class Layout:
    """Where the tensors of one block lie in its buffer: (name, dtype, shape, first byte) each."""

    entries: tuple[tuple[str, torch.dtype, torch.Size, int], ...]
    nbytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        entries, end = [], 0
        for name, value in tensors.items():
            entries.append((name, value.dtype, value.shape, end))
            end += -(-value.nbytes // ALIGN) * ALIGN
        return cls(tuple(entries), end)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The tensors in a buffer: uint8 [at least nbytes]."""
        return {
            name: buffer[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for name, dtype, shape, start in self.entries
        }


def matmul_leaves(block: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The parameters that are streamed, as {name: (leaf, its name there)}: all that matmuls have,
    but for their biases.
    """
    return {
        f"{path}.{name}": (leaf, name)
        for path, leaf in block.named_modules()
        if hasattr(leaf, "in_features") and hasattr(leaf, "out_features")
        for name, value in leaf.named_parameters(recurse=False)
        if name != "bias" and value is not None
    }


class BlockBuffers:
    """A block's streamed parameters: bound to a buffer while it works, and stand-ins of no memory
    while it waits.
    """

    def __init__(self, block: nn.Module) -> None:
        self.leaves = matmul_leaves(block)
        self.layout = Layout.of(
            {name: getattr(leaf, key) for name, (leaf, key) in self.leaves.items()}
        )

    def bind(self, views: Mapping[str, Tensor]) -> None:
        for name, view in views.items():
            leaf, key = self.leaves[name]
            setattr(leaf, key, nn.Parameter(view, requires_grad=False))

    def release(self, device: torch.device) -> None:
        """Put stand-ins: of the right shape, dtype and device, which those ask for who attach
        LoRAs, and one element large.
        """
        for name, dtype, shape, _ in self.layout.entries:
            leaf, key = self.leaves[name]
            setattr(
                leaf,
                key,
                nn.Parameter(
                    torch.empty((), dtype=dtype, device=device).expand(shape), requires_grad=False
                ),
            )


# host memory


def host_buffer(nbytes: int, pin: bool) -> Tensor:
    """uint8 [nbytes] on the host; pinned where asked for and possible.

    PyTorch's own pinned allocator rounds up to powers of two, which for blocks of 703 MB would
    waste 45 %; so ordinary memory is registered with the driver instead.
    """
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    if pin and nbytes:
        runtime = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(buffer.data_ptr(), nbytes, 0)) == 0:
            weakref.finalize(
                buffer.untyped_storage(), runtime.cudaHostUnregister, buffer.data_ptr()
            )
        else:
            logger.warning(
                "the system did not let %d MB be pinned: copies to the GPU will not pass beside its"
                " work",
                nbytes >> 20,
            )
    return buffer


def load_to_host(
    model: WanDiT,
    fetch: BlockReader,
    pin: bool,
    report: Callable[[int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    skip: Collection[int] = (),
) -> dict[int, Tensor]:
    """Blocks' buffers, filled on the host.

    Args:
        report: told how many are filled.
        stop: asked before each; where it says so, what is filled by then is returned.
        skip: blocks that are left out.
    """
    homes: dict[int, Tensor] = {}
    for index, block in enumerate(model.blocks):
        if index in skip:
            continue
        if stop():
            break
        layout = BlockBuffers(block).layout
        homes[index] = host_buffer(layout.nbytes, pin)
        fetch(index, layout.views(homes[index]))
        if report is not None:
            report(len(homes))
    return homes


def evenly_spaced_resident(layers: int, resident: int) -> set[int]:
    """Which blocks stay, so that those that are streamed stand as far apart as can be: a copy then
    hides behind several blocks.
    """
    streamed = layers - max(0, min(resident, layers))
    return set(range(layers)) - {(2 * n + 1) * layers // (2 * streamed) for n in range(streamed)}


# streaming


class CopyStream:
    """Where copies to a device run: on a GPU in a stream of their own, beside its work; elsewhere
    in line.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(
        self, target: Tensor, source: Tensor, after: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        """Copy when `after` has happened; returns what tells that it is done."""
        if self.stream is None:
            target.copy_(source)
            return None
        with torch.cuda.stream(self.stream):
            if after is not None:
                self.stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Let the device's work wait for a copy."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def mark(self) -> torch.cuda.Event | None:
        """What tells that the work given to the device until now is done."""
        return (
            None if self.stream is None else torch.cuda.current_stream(self.device).record_event()
        )


@dataclass
class _Slot:
    """A buffer on the device, and the one on the host through which files reach a GPU."""

    buffer: Tensor
    staging: Tensor | None
    copied: torch.cuda.Event | None = None
    used: torch.cuda.Event | None = None


class Streaming(nn.Module):
    """An expert with some of its blocks streamed; it is called like the `WanDiT` within.

    Args:
        model: on the device, but for the matmul weights of its blocks, which may be on meta.
        fetch: reads a block's tensors.
        resident: which blocks stay on the device.
        homes: blocks' buffers on the host, as `read_homes` makes them; resident blocks are taken
            out of it, the others stay in it and are streamed from there. None: all are read with
            `fetch`, those that are streamed in each pass.
        worker: who reads and copies.
        report: told the number of resident blocks that are in place.
    """

    def __init__(
        self,
        model: WanDiT,
        fetch: BlockReader,
        resident: Collection[int],
        device: torch.device,
        homes: dict[int, Tensor] | None = None,
        worker: Worker | None = None,
        report: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.device = model, device
        self._fetch, self._homes = fetch, homes
        self._frames = [BlockBuffers(block) for block in model.blocks]
        self._lane = CopyStream(device)
        self._place_resident(sorted(resident), report)
        self.streamed = [index for index in range(len(self._frames)) if index not in resident]
        for index in self.streamed:
            self._frames[index].release(device)
        largest = max((self._frames[index].layout.nbytes for index in self.streamed), default=0)
        staged = homes is None and device.type == "cuda"
        self._free = [
            _Slot(
                torch.empty(largest, dtype=torch.uint8, device=device),
                host_buffer(largest, True) if staged else None,
            )
            for _ in range(2 if self.streamed else 0)
        ]
        self._ahead: deque[tuple[int, _Slot, Future[None]]] = (
            deque()
        )  # blocks that are on their way, in order
        self._worker = worker or ThreadPoolExecutor(1, thread_name_prefix="wanflow-blocks")

    def forward(
        self, latent: Tensor, timestep: Tensor, text: Tensor | TextStates, trunk: Trunk = run_blocks
    ) -> Tensor:
        """As `WanDiT.forward`."""

        def flowing(
            blocks: object, head: Head, tokens: Tensor, conditioning: Conditioning
        ) -> Tensor:
            return trunk(self.flow(), head, tokens, conditioning)

        states = self.text_states(text) if isinstance(text, Tensor) else text
        return cast(Tensor, self.model(latent, timestep, states, flowing))

    def text_states(self, text: Tensor) -> TextStates:
        """As `WanDiT.text_states`. Of a streamed block only the two weights that make keys and
        values are fetched.
        """
        return self.model.text_states(text, self._text_blocks())

    def close(self) -> None:
        """Wait for what is on its way, and let go of all buffers."""
        self._drain()
        self._worker.shutdown()
        if self._lane.stream is not None:
            self._lane.stream.synchronize()
        self._free.clear()
        self._homes = None

    def flow(self) -> Iterator[Block]:
        """The blocks in order, each whole while it is the current one."""
        for index, block in enumerate(self.model.blocks):
            if index not in self._places:
                yield block
                continue
            slot = self._take(index)
            frame = self._frames[index]
            frame.bind(frame.layout.views(slot.buffer))
            try:
                yield block
            finally:  # also when the pass is given up
                frame.release(self.device)
                slot.used = self._lane.mark()
                self._free.append(slot)
                self._send_ahead(index)

    @property
    def _places(self) -> dict[int, int]:
        return {index: place for place, index in enumerate(self.streamed)}

    def _place_resident(self, indexes: list[int], report: Callable[[int], None] | None) -> None:
        staging = None
        for count, index in enumerate(indexes):
            frame = self._frames[index]
            home = None if self._homes is None else self._homes.pop(index, None)
            if self.device.type == "cpu":
                buffer = home if home is not None else host_buffer(frame.layout.nbytes, False)
                if home is None:
                    self._fetch(index, frame.layout.views(buffer))
            else:
                buffer = torch.empty(frame.layout.nbytes, dtype=torch.uint8, device=self.device)
                if home is None:
                    if staging is None or staging.nbytes < frame.layout.nbytes:
                        staging = host_buffer(frame.layout.nbytes, self.device.type == "cuda")
                    home = staging[: frame.layout.nbytes]
                    self._fetch(index, frame.layout.views(home))
                buffer.copy_(home)
            frame.bind(frame.layout.views(buffer))
            if report is not None:
                report(count + 1)

    def _text_blocks(self) -> Iterator[Block]:
        for index, block in enumerate(self.model.blocks):
            if index not in self._places:
                yield block
                continue
            frame = self._frames[index]
            wanted = Layout.of(
                {
                    name: torch.empty(shape, dtype=dtype, device="meta")
                    for name, dtype, shape, _ in frame.layout.entries
                    if name.startswith(("cross_attn.k.", "cross_attn.v."))
                }
            )
            views = wanted.views(torch.empty(wanted.nbytes, dtype=torch.uint8))
            if self._homes is None:
                self._fetch(index, views)
            else:
                views = {
                    name: view
                    for name, view in frame.layout.views(self._homes[index]).items()
                    if name in views
                }
            frame.bind({name: view.to(self.device) for name, view in views.items()})
            try:
                yield block
            finally:
                frame.release(self.device)

    def _take(self, index: int) -> _Slot:
        """The slot that holds a block, when it does. A pass that was given up has left others on
        their way: they are dropped.
        """
        if not self._ahead or self._ahead[0][0] != index:
            self._drain()
            self._send(index)
        _, slot, sent = self._ahead.popleft()
        try:
            sent.result()
        except BaseException:
            self._free.append(slot)
            raise
        self._lane.wait(slot.copied)
        self._send_ahead(index)
        return slot

    def _send_ahead(self, index: int) -> None:
        """Use free slots for what comes next: after the last block the first one of the next
        pass.
        """
        last = self._ahead[-1][0] if self._ahead else index
        while self._free:
            last = self.streamed[(self._places[last] + 1) % len(self.streamed)]
            self._send(last)

    def _send(self, index: int) -> None:
        slot = self._free.pop()
        self._ahead.append((index, slot, self._worker.submit(lambda: self._fill(slot, index))))

    def _drain(self) -> None:
        while self._ahead:
            _, slot, sent = self._ahead.popleft()
            sent.exception()
            self._free.append(slot)

    @torch.no_grad()
    def _fill(self, slot: _Slot, index: int) -> None:
        layout = self._frames[index].layout
        if self._homes is not None:
            home = self._homes[index]
        elif slot.staging is None and self.device.type == "cpu":
            self._fetch(index, layout.views(slot.buffer))
            return
        else:
            home = (
                slot.staging
                if slot.staging is not None
                else torch.empty(layout.nbytes, dtype=torch.uint8)
            )
            if slot.copied is not None:
                slot.copied.synchronize()  # the copy before this one may still read from it
            self._fetch(index, layout.views(home))
        slot.copied = self._lane.copy(
            slot.buffer[: layout.nbytes], home[: layout.nbytes], slot.used
        )


def set_chunk(model: nn.Module, tokens: int) -> None:
    """How many tokens go at a time through all that works token by token (0: all); results are
    equal to rounding.
    """
    for module in model.modules():
        if isinstance(module, SelfAttention | Block | Head):
            module.chunk = tokens
