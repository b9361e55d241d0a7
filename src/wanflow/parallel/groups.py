"""The layouts in which ranks share one video, and the process groups that communicate.

A layout is cfg x ring x ulysses ranks. Each of two cfg groups computes one branch of guidance.
Within a cfg group each rank holds a contiguous range of the tokens. Tokens meet in self-attention
only: there Ulysses trades tokens for heads, and the ring passes keys and values on. The rank is
(cfg * rings + ring) * ulysses + place, so that Ulysses, which sends the most, stays among
neighbours.

Sizes need not divide: shards differ by at most one, and some may be empty.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from itertools import pairwise, product

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from wanflow.config import RequestError
from wanflow.parallel.ranks import DistInfo


def bounds(length: int, parts: int) -> list[int]:
    """Return where evenly cut parts begin, and the end; neighbours join to fewer even parts."""
    return [part * length // parts for part in range(parts + 1)]


def sizes(length: int, parts: int) -> list[int]:
    """Return the sizes of evenly cut parts."""
    return [end - start for start, end in pairwise(bounds(length, parts))]


@dataclass(frozen=True)
class Layout:
    """How many ranks share the branches of guidance (1 or 2), keys and values (ring), and heads."""

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1

    def __post_init__(self) -> None:
        for name in ("cfg", "ring", "ulysses"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise RequestError(f"{name} must be at least 1 (got {value!r})")
        if self.cfg > 2:
            raise RequestError(f"cfg must be 1 or 2, the branches of guidance (got {self.cfg})")

    def __str__(self) -> str:
        counts = {"cfg": self.cfg, "ring": self.ring, "ulysses": self.ulysses}
        names = [f"{name} {count}" for name, count in counts.items() if count > 1]
        return " x ".join(names) or "one process"

    @property
    def size(self) -> int:
        """All ranks."""
        return self.cfg * self.sequence

    @property
    def sequence(self) -> int:
        """The ranks that share the tokens of one forward."""
        return self.ring * self.ulysses

    def place(self, rank: int) -> tuple[int, int, int]:
        """Return (cfg, ring, ulysses) of a rank."""
        return rank // self.sequence, rank // self.ulysses % self.ring, rank % self.ulysses


def layouts(size: int, guided: bool = True) -> list[Layout]:
    """Return all layouts of `size` ranks; without guidance there are no branches to split."""
    counts = [count for count in range(1, size + 1) if size % count == 0]
    candidates = product((2, 1) if guided else (1,), counts, counts)
    return [
        Layout(cfg, ring, ulysses)
        for cfg, ring, ulysses in candidates
        if cfg * ring * ulysses == size
    ]


def choose_layout(
    size: int,
    heads: int,
    guided: bool = True,
    lse: bool = True,
    machine: int = 8,
    cfg: int | None = None,
    ring: int | None = None,
    ulysses: int | None = None,
) -> Layout:
    """Return the layout that sends the least and leaves no rank idle.

    Two cfg groups come first, which exchange one velocity a step. Ulysses comes next: beyond two
    ranks it sends less than a ring, and it works with every kernel. The ring takes the rest:
    between machines, and where there are fewer heads than ranks.

    Args:
        size: how many ranks.
        heads: of the model's attention.
        guided: whether there is guidance; steps without it are computed twice by two cfg groups.
        lse: whether the kernel returns the log-sum-exp; without it a ring must be requested.
        machine: how many ranks one machine has.
        cfg: the requested groups of guidance; None: any number.
        ring: the requested ranks of a ring; None: any number.
        ulysses: the requested ranks of Ulysses; None: any number.

    Raises:
        RequestError: when the requested numbers do not multiply to `size`.
    """
    numbers = {"cfg": cfg, "ring": ring, "ulysses": ulysses}
    requested = {name: value for name, value in numbers.items() if value is not None}
    Layout(**requested)
    options = [
        layout
        for layout in layouts(size, guided or cfg == 2)
        if all(getattr(layout, name) == value for name, value in requested.items())
    ]
    if not options:
        product_ = " x ".join(f"{name} {value}" for name, value in requested.items())
        known = ", ".join(str(layout) for layout in layouts(size, guided))
        raise RequestError(f"{product_} does not make {size} ranks; these do: {known}")

    def cost(layout: Layout) -> tuple[bool, int, bool, bool, int]:
        return (
            layout.ring > 1 and not lse,
            -layout.cfg,
            layout.ulysses > heads,
            layout.ulysses > machine,
            layout.ring,
        )

    return min(options, key=cost)


@dataclass
class CommStats:
    """What this rank sends to others: bytes and collectives by purpose; and how far the rank is.

    The watchdog compares how far the ranks are: their marks, around each collective and before each
    block. The host gives a GPU a whole step of work and goes on, so a mark counts there only when
    the GPU has come to it: a GPU that hangs comes to no more.
    """

    sent: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    device: torch.device | None = None
    _passed: int = 0
    _ahead: deque[torch.cuda.Event] = field(default_factory=deque)  # marks that a GPU is to come to

    def add(self, purpose: str, nbytes: int) -> None:
        self.sent[purpose] += nbytes
        self.calls[purpose] += 1
        self.mark()

    def mark(self) -> None:
        """Leave a mark, in the current stream of a GPU."""
        if self.device is not None and self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self._ahead.append(event)
        else:
            self._passed += 1

    def progress(self) -> tuple[int, bool]:
        """Return how many marks are passed, and whether a GPU has others ahead; for a thread.

        A GPU that failed passes no more; the main thread gets its error.
        """
        with suppress(RuntimeError):
            if self._ahead and self.device is not None:
                torch.cuda.set_device(self.device)
            while self._ahead and self._ahead[0].query():
                self._ahead.popleft()
                self._passed += 1
        return self._passed, bool(self._ahead)

    def reset(self) -> None:
        self.sent.clear()
        self.calls.clear()


class Group:
    """Some of the ranks. All that they send each other goes through here and is counted.

    A group without a handle and with more than one rank is simulated: it sends nothing, and
    returns uninitialised tensors of the right shape. The plan runs the same code with such groups.
    """

    def __init__(
        self,
        stats: CommStats,
        handle: dist.ProcessGroup | None = None,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        self.handle, self.stats = handle, stats
        self.rank = rank if handle is None else dist.get_rank(handle)
        self.size = size if handle is None else dist.get_world_size(handle)

    def all_to_all(
        self, purpose: str, values: Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> Tensor:
        """Trade flat, contiguous values: [sum of sent] -> [sum of received].

        Args:
            purpose: under which it is counted.
            values: what this rank sends.
            sent: how many numbers go to each rank, in order.
            received: how many numbers come from each rank, in order.
        """
        self.stats.add(purpose, (sum(sent) - sent[self.rank]) * values.itemsize)
        arrived = values.new_empty(sum(received))
        if self.handle is not None:
            dist.all_to_all_single(arrived, values, list(received), list(sent), group=self.handle)
            self.stats.mark()
        return arrived

    def all_gather(self, purpose: str, values: Tensor) -> list[Tensor]:
        """Return the values of all ranks, in order; they have one shape."""
        self.stats.add(purpose, (self.size - 1) * values.nbytes)
        arrived = list(values.new_empty(self.size, *values.shape))
        if self.handle is not None:
            dist.all_gather(arrived, values.contiguous(), group=self.handle)
            self.stats.mark()
        return arrived

    def shift(self, purpose: str, values: Tensor, arriving: Tensor) -> list[dist.Work]:
        """Begin to send to the next rank and receive from the one before; wait for the works."""
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        return self.exchange(purpose, [(after, values)], [(before, arriving)])

    def exchange(
        self,
        purpose: str,
        leaving: Sequence[tuple[int, Tensor]],
        arriving: Sequence[tuple[int, Tensor]],
    ) -> list[dist.Work]:
        """Begin to send contiguous tensors to ranks and fill others; wait for the works."""
        self.stats.add(purpose, sum(values.nbytes for _, values in leaving))
        if self.handle is None:
            return []
        operations = [
            dist.P2POp(start, values, group=self.handle, group_peer=rank)
            for start, pairs in ((dist.isend, leaving), (dist.irecv, arriving))
            for rank, values in pairs
        ]
        return dist.batch_isend_irecv(operations) if operations else []

    def broadcast(self, purpose: str, values: Tensor, source: int = 0) -> Tensor:
        """Return the values of one rank, by default the first; those of the others are lost."""
        self.stats.add(purpose, (self.size - 1) * values.nbytes if self.rank == source else 0)
        if self.handle is not None:
            dist.broadcast(values, group=self.handle, group_src=source)
            self.stats.mark()
        return values


@dataclass
class ParallelContext:
    """This rank in a layout, and its groups: all ranks, those of its tokens, ring, heads and cfg.

    `machine` holds the ranks of this machine once `machine.machine_group` has found them.

    `tokens` is the number of tokens of the running forward. The trunk sets it, and attention, whose
    slot takes nothing but q, k and v, reads it.
    """

    layout: Layout
    info: DistInfo
    stats: CommStats
    world: Group
    sequence: Group
    ring: Group
    ulysses: Group
    cfg: Group
    tokens: int = 0
    machine: Group | None = None

    @cached_property
    def mesh(self) -> DeviceMesh:
        """All ranks in a row, for FSDP. Every rank must ask for it."""
        return init_device_mesh(self.info.device.type, (self.layout.size,))

    @property
    def lengths(self) -> list[int]:
        """How many tokens each rank of `sequence` holds."""
        return sizes(self.tokens, self.layout.sequence)

    @property
    def shard(self) -> slice:
        """This rank's tokens."""
        return slice(*bounds(self.tokens, self.layout.sequence)[self.sequence.rank :][:2])

    def from_rank0(self, number: int) -> int:
        """Return rank 0's number, such as a seed that it drew. Every rank must call it."""
        if self.layout.size == 1:
            return number
        values = torch.tensor([number], dtype=torch.int64, device=self.info.device)
        return int(self.world.broadcast("first", values))


def make_groups(layout: Layout, info: DistInfo, timeout_s: float | None = None) -> ParallelContext:
    """Make the groups. Every rank must call it, with the same layout.

    Args:
        layout: of as many ranks as there are.
        info: from `ranks.join_group`.
        timeout_s: of each group's collectives; by default that of `info`.

    Raises:
        RequestError: when the layout has another number of ranks.
    """
    if layout.size != info.world_size:
        parts = f"cfg {layout.cfg} x ring {layout.ring} x ulysses {layout.ulysses} = {layout.size}"
        raise RequestError(
            f"the layout {parts} needs {layout.size} ranks (there are {info.world_size}): change"
            f" it, or start {layout.size}"
        )
    stats = CommStats(device=info.device)
    numbers = torch.arange(layout.size).view(layout.cfg, layout.ring, layout.ulysses)
    timeout = timedelta(seconds=info.timeout_s if timeout_s is None else timeout_s)

    def group(numbers: Tensor) -> Group:
        rows = numbers.flatten(0, -2).tolist()
        if len(rows[0]) == 1:
            return Group(stats)
        return Group(stats, dist.new_subgroups_by_enumeration(rows, timeout=timeout)[0])

    ring = group(numbers.movedim(1, 2))
    ulysses = group(numbers)
    # A communicator takes a GPU's memory, so there is no second one for the same ranks.
    if layout.ulysses == 1:
        sequence = ring
    else:
        sequence = ulysses if layout.ring == 1 else group(numbers.flatten(1))
    cfg = group(numbers.movedim(0, 2))
    world = Group(stats) if layout.size == 1 else Group(stats, dist.group.WORLD)
    return ParallelContext(layout, info, stats, world, sequence, ring, ulysses, cfg)


def simulated_groups(
    layout: Layout, rank: int = 0, device: torch.device | str = "cpu"
) -> ParallelContext:
    """Return the context of a rank without the others.

    The rank computes its shard, and what the others would send is uninitialised.
    """
    stats, (cfg, ring, place) = CommStats(), layout.place(rank)

    def group(rank: int, size: int) -> Group:
        return Group(stats, rank=rank, size=size)

    return ParallelContext(
        layout,
        DistInfo(rank, layout.size, torch.device(device)),
        stats,
        group(rank, layout.size),
        group(ring * layout.ulysses + place, layout.sequence),
        group(ring, layout.ring),
        group(place, layout.ulysses),
        group(cfg, layout.cfg),
    )
