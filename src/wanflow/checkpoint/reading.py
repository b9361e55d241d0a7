"""Read tensors at the speed of the disk: to a GPU, and once for the ranks of a machine."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wanflow.checkpoint.containers import TensorSource
from wanflow.config import RequestError
from wanflow.hardware import thread_on

if TYPE_CHECKING:
    from wanflow.parallel.groups import Group
    from wanflow.transforms.host_memory import HostMemory

PIECE = 64 << 20  # bytes of a file on their way to a GPU, twice on the host and twice there
AHEAD = 4  # tensors that a rank reads before their turn: most are small, next to a large one

Values = dict[str, Tensor]  # by the parameter of its leaf


class Upload:
    """Reads plain tensors to a GPU, which converts them.

    Two pinned buffers take turns: while one is copied, the other is filled from the file. So the
    file's bytes cross the bus as they are, and no core spends time on them.

    Args:
        device: of the tensors.
        memory: gives the buffers.
        piece: bytes of a buffer.
    """

    def __init__(self, device: torch.device, memory: HostMemory, piece: int = PIECE) -> None:
        self.device, self.piece = device, piece
        self._buffers = [memory.buffer(piece) for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def takes(self, source: TensorSource, name: str) -> bool:
        """Return whether a tensor is read this way: a plain one whose rows fit a buffer."""
        info = source.tensors[name]
        return (
            info.packing is None
            and math.prod(info.shape) > 0
            and _row(info.shape) <= (self.piece // info.dtype.itemsize)
        )

    def read(
        self, source: TensorSource, name: str, dtype: torch.dtype, rows: slice | None = None
    ) -> Tensor:
        """Return a tensor, or some of its rows, on the device in `dtype`."""
        info = source.tensors[name]
        shape = info.shape or (1,)
        first, last, _ = (rows or slice(None)).indices(shape[0])
        out = torch.empty((max(0, last - first), *shape[1:]), dtype=dtype, device=self.device)
        row = _row(info.shape)
        step = max(1, self.piece // (row * info.dtype.itemsize))
        for start in range(first, last, step):
            stop = min(start + step, last)
            staging = self._next()
            values = staging[: (stop - start) * row * info.dtype.itemsize].view(info.dtype)
            part = slice(start, stop) if info.shape else None
            piece = values.view(stop - start, *shape[1:])
            source.read(name, None, part, piece if info.shape else piece.view(()))
            out[start - first : stop - first].copy_(piece.to(self.device, non_blocking=True))
            self._copied[self._turn] = self._mark()
        return out if info.shape else out.view(())

    def _next(self) -> Tensor:
        """Return the buffer whose turn it is, once its last copy has ended."""
        self._turn = 1 - self._turn
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        return self._buffers[self._turn]

    def _mark(self) -> torch.cuda.Event | None:
        if self.device.type != "cuda":
            return None
        return torch.cuda.current_stream(self.device).record_event()


def _row(shape: Sequence[int]) -> int:
    return math.prod(shape[1:])


def read_in_turns(
    names: Sequence[str],
    sizes: Mapping[str, int],
    read: Callable[[str], Values],
    like: Callable[[str], Values],
    group: Group,
    device: torch.device,
) -> Iterator[tuple[str, Values]]:
    """Yield every tensor in its final form, each read by one rank of a group and sent to the rest.

    A rank reads its next tensors while those of the others arrive. All ranks end with the same
    bits, whatever a tensor went through: a fused LoRA, quantisation.

    Args:
        names: in one order on all ranks.
        sizes: bytes in the file.
        read: returns the parameters of a tensor.
        like: returns them on meta.
        group: of the ranks; each must call it.
        device: where they are sent from and to.

    Raises:
        RequestError: on all ranks, where one cannot read a tensor.
    """
    owners = share_out({name: sizes[name] for name in names}, group.size)
    own = deque(name for name in names if owners[name] == group.rank)
    reading: deque[Future[Values]] = deque()
    with thread_on(device, "wanflow-read") as thread:
        for name in names:
            while own and len(reading) < AHEAD:
                reading.append(thread.submit(read, own.popleft()))
            values, error = like(name), None
            if owners[name] == group.rank:
                mine = reading.popleft()
                error = mine.exception()
                values = {} if error is not None else mine.result()
            yield name, _send(values, error, name, owners[name], group, device)


def _send(
    values: Values,
    error: BaseException | None,
    name: str,
    owner: int,
    group: Group,
    device: torch.device,
) -> Values:
    """Send a tensor's parameters from its owner to the others; raise on all if it has none."""
    sound = torch.tensor([error is None], dtype=torch.uint8, device=device)
    if not int(group.broadcast("loading", sound, owner)):
        raise error or RequestError(f"{name}: rank {owner} cannot read it, and says why")
    sent: Values = {}
    for key, value in values.items():
        mine = value.to(device).contiguous() if owner == group.rank else None
        full = torch.empty(value.shape, dtype=value.dtype, device=device) if mine is None else mine
        group.broadcast("loading", full.view(-1).view(torch.uint8), owner)  # gloo has no float8
        sent[key] = full
    return sent


def share_out(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Return which of `count` readers reads each tensor: the one with the least bytes so far."""
    given, owners = [0] * count, {}
    for name, size in sizes.items():
        owners[name] = given.index(min(given))
        given[owners[name]] += size
    return owners
