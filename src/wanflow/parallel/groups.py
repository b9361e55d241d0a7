"""How the processes of one video share its work: the layouts there are, what each sends, and the
groups that talk to each other.

A layout is cfg x ring x ulysses processes. cfg: two groups take one branch of guidance each. Within
a group every process holds a contiguous range of the tokens; in self-attention, the only place
where tokens meet, Ulysses trades tokens for heads, and the ring passes keys and values on. Process
number = (cfg * rings + ring) * ulysses + place, so that Ulysses, which sends the most and waits for
it, stays among neighbours.

Nothing has to divide: what is cut comes in sizes that differ by at most one, some of which may be
zero.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from itertools import pairwise, product

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from wanflow.config import DiTConfig, RequestError
from wanflow.parallel.ranks import DistInfo

FLOAT32 = 4  # bytes


def bounds(length: int, parts: int) -> list[int]:
    """Where the parts of something cut evenly begin, and its end. Joining neighbours gives the
    bounds of fewer parts.
    """
    return [part * length // parts for part in range(parts + 1)]


def sizes(length: int, parts: int) -> list[int]:
    """How large the parts of something cut evenly are."""
    return [end - start for start, end in pairwise(bounds(length, parts))]


@dataclass(frozen=True)
class Layout:
    """How many processes share the branches of guidance (1 or 2), the keys and values (ring) and
    the heads (ulysses).
    """

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1

    def __post_init__(self) -> None:
        for name in ("cfg", "ring", "ulysses"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise RequestError(
                    f"{name} {value!r} is not a number of processes; 1 means not to split"
                )
        if self.cfg > 2:
            raise RequestError(f"cfg {self.cfg}: guidance has two branches, so it is 1 or 2")

    def __str__(self) -> str:
        named = [
            f"{name} {value}"
            for name, value in (("cfg", self.cfg), ("ring", self.ring), ("ulysses", self.ulysses))
            if value > 1
        ]
        return " x ".join(named) or "one process"

    @property
    def size(self) -> int:
        return self.cfg * self.sequence

    @property
    def sequence(self) -> int:
        """How many processes share the tokens of one forward."""
        return self.ring * self.ulysses

    def place(self, rank: int) -> tuple[int, int, int]:
        """(cfg, ring, ulysses) of a process."""
        return rank // self.sequence, rank // self.ulysses % self.ring, rank % self.ulysses


def layouts(size: int, guided: bool = True) -> list[Layout]:
    """All layouts of so many processes; without guidance there is nothing for two groups to
    split.
    """
    counts = [count for count in range(1, size + 1) if size % count == 0]
    wanted = product((2, 1) if guided else (1,), counts, counts)
    return [
        Layout(cfg, ring, ulysses) for cfg, ring, ulysses in wanted if cfg * ring * ulysses == size
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
    """The layout that sends the least and leaves no process idle, among those that have the given
    numbers.

    Two groups for guidance come first, which exchange one velocity a step. Ulysses comes next:
    beyond two processes it sends less than a ring and works with every kernel. The ring takes what
    is left: between machines, and where there are fewer heads than processes.

    Args:
        size: how many processes.
        heads: of the model's attention.
        guided: whether there is guidance to split; a step without it is computed twice by two
            groups.
        lse: whether the attention kernel says the log-sum-exp; without it a ring is taken only
            where it is asked for.
        machine: how many processes one machine has.

    Raises:
        RequestError: when the given numbers do not multiply to `size`.
    """
    given = {
        name: value
        for name, value in (("cfg", cfg), ("ring", ring), ("ulysses", ulysses))
        if value is not None
    }
    Layout(**given)
    options = [
        one
        for one in layouts(size, guided or cfg == 2)
        if all(getattr(one, name) == value for name, value in given.items())
    ]
    if not options:
        said = " x ".join(f"{name} {value}" for name, value in given.items())
        known = ", ".join(str(one) for one in layouts(size, guided))
        raise RequestError(f"{said} does not make {size} processes; these do: {known}")

    def rank(one: Layout) -> tuple[bool, int, bool, bool, int]:
        return (
            one.ring > 1 and not lse,
            -one.cfg,
            one.ulysses > heads,
            one.ulysses > machine,
            one.ring,
        )

    return min(options, key=rank)


def expected_bytes(
    layout: Layout,
    config: DiTConfig,
    tokens: int,
    rank: int = 0,
    batch: int = 1,
    itemsize: int = 2,
    guided: bool = True,
) -> dict[str, int]:
    """Bytes that one process sends to others in one forward, by what they are: the keys are those
    of `Traffic`.

    Args:
        tokens: of the whole video.
        rank: the process.
        batch: samples in the forward; two where one process group computes both branches at once.
        itemsize: bytes of a number of queries, keys and values.
        guided: whether the branches are exchanged after it.
    """
    _, ring, place = layout.place(rank)
    lengths, blocks = sizes(tokens, layout.sequence), sizes(tokens, layout.ring)
    own, heads = (
        lengths[ring * layout.ulysses + place],
        sizes(config.num_heads, layout.ulysses)[place],
    )
    row = batch * config.dim // config.num_heads * itemsize  # one head of one token
    passed = sum(blocks[(ring - step) % layout.ring] for step in range(layout.ring - 1))
    patch = batch * math.prod(config.patch_size) * config.out_dim * FLOAT32
    found = {
        "qkv": config.num_layers * 3 * own * (config.num_heads - heads) * row,
        "out": config.num_layers * (blocks[ring] - own) * heads * row,
        "ring": config.num_layers * 2 * passed * heads * row,
        "patches": (layout.sequence - 1) * max(lengths) * patch,
        "velocity": (layout.cfg - 1) * tokens * patch if guided else 0,
    }
    return {key: value for key, value in found.items() if value}


@dataclass
class CommStats:
    """What this rank sends to others: bytes and collectives by purpose, and all collectives.

    They are counted before they start: the watchdog compares the ranks' numbers.
    """

    sent: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    entered: int = 0

    def add(self, what: str, nbytes: int) -> None:
        self.sent[what] += nbytes
        self.calls[what] += 1
        self.entered += 1

    def reset(self) -> None:
        self.sent.clear()
        self.calls.clear()


class Group:
    """Some of the processes. All that they send each other goes through here, and is counted;
    `what` is what it is counted as.

    Without a handle and with a size above one it is imagined: nothing is sent, and what would
    arrive is of the right shape and holds anything. The plan runs the same code with such groups.
    """

    def __init__(
        self,
        traffic: CommStats,
        handle: dist.ProcessGroup | None = None,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        self.handle, self.traffic = handle, traffic
        self.rank = rank if handle is None else dist.get_rank(handle)
        self.size = size if handle is None else dist.get_world_size(handle)

    def all_to_all(
        self, what: str, values: Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> Tensor:
        """Flat and contiguous, [sum of sent] -> [sum of received]: so many numbers to each, and
        from each, in order of rank.
        """
        self.traffic.add(what, (sum(sent) - sent[self.rank]) * values.itemsize)
        got = values.new_empty(sum(received))
        if self.handle is not None:
            dist.all_to_all_single(got, values, list(received), list(sent), group=self.handle)
        return got

    def all_gather(self, what: str, values: Tensor) -> list[Tensor]:
        """Everybody's, in order of rank; of one shape."""
        self.traffic.add(what, (self.size - 1) * values.nbytes)
        got = list(values.new_empty(self.size, *values.shape))
        if self.handle is not None:
            dist.all_gather(got, values.contiguous(), group=self.handle)
        return got

    def pass_on(self, what: str, values: Tensor, arriving: Tensor) -> list[dist.Work]:
        """Begin to send to the next process and to receive from the one before; both are done when
        the works are waited for.
        """
        return self.exchange(
            what, [((self.rank + 1) % self.size, values)], [((self.rank - 1) % self.size, arriving)]
        )

    def exchange(
        self,
        what: str,
        leaving: Sequence[tuple[int, Tensor]],
        arriving: Sequence[tuple[int, Tensor]],
    ) -> list[dist.Work]:
        """Begin to send contiguous tensors to some processes and to fill others from some; done
        when the works are waited for.
        """
        self.traffic.add(what, sum(values.nbytes for _, values in leaving))
        if self.handle is None:
            return []
        operations = [
            dist.P2POp(dist.isend, values, group=self.handle, group_peer=rank)
            for rank, values in leaving
        ]
        operations += [
            dist.P2POp(dist.irecv, values, group=self.handle, group_peer=rank)
            for rank, values in arriving
        ]
        return dist.batch_isend_irecv(operations) if operations else []

    def from_first(self, what: str, values: Tensor) -> Tensor:
        """What the first process has; the others' is overwritten."""
        self.traffic.add(what, (self.size - 1) * values.nbytes if self.rank == 0 else 0)
        if self.handle is not None:
            dist.broadcast(values, group=self.handle, group_src=0)
        return values


@dataclass
class ParallelContext:
    """This process in a layout, and its groups: all processes, those of its tokens, its ring, its
    heads, and its partner in guidance.
    """

    layout: Layout
    ranks: DistInfo
    traffic: CommStats
    world: Group
    sequence: Group
    ring: Group
    ulysses: Group
    cfg: Group
    # How many tokens the forward at work has. The trunk says so, and attention, whose slot is given
    # nothing but q, k and v, asks.
    tokens: int = 0

    @cached_property
    def mesh(self) -> DeviceMesh:
        """All processes in a row, for FSDP. Every process must ask for it."""
        return init_device_mesh(self.ranks.device.type, (self.layout.size,))

    @property
    def lengths(self) -> list[int]:
        """How many tokens each process of `sequence` holds."""
        return sizes(self.tokens, self.layout.sequence)

    @property
    def part(self) -> slice:
        """This process' tokens."""
        return slice(*bounds(self.tokens, self.layout.sequence)[self.sequence.rank :][:2])

    def first(self, number: int) -> int:
        """The number that process 0 has, for all: a seed that it drew, or whether it was told to
        stop. Every process must call it.
        """
        if self.layout.size == 1:
            return number
        return int(
            self.world.from_first(
                "first", torch.tensor([number], dtype=torch.int64, device=self.ranks.device)
            )
        )


def make_groups(layout: Layout, ranks: DistInfo, timeout_s: float | None = None) -> ParallelContext:
    """Make the groups. Every process must call it, with the same layout.

    Args:
        ranks: what `mesh.start` returned.
        timeout_s: a collective that one of a group does not join fails in the others after this
            time; without it that of `ranks`.

    Raises:
        RequestError: when the layout is of another number of processes than there are.
    """
    if layout.size != ranks.size:
        parts = f"cfg {layout.cfg} x ring {layout.ring} x ulysses {layout.ulysses} = {layout.size}"
        raise RequestError(
            f"the layout {parts} needs as many processes, and there are {ranks.size}: change it, or"
            f" start {layout.size}"
        )
    traffic = CommStats()
    numbers = torch.arange(layout.size).view(layout.cfg, layout.ring, layout.ulysses)

    def group(*rows: list[int]) -> Group:
        if len(rows[0]) == 1:
            return Group(traffic)
        handle, _ = dist.new_subgroups_by_enumeration(
            [list(row) for row in rows],
            timeout=timedelta(seconds=ranks.timeout_s if timeout_s is None else timeout_s),
        )
        return Group(traffic, handle)

    ring = group(*numbers.movedim(1, 2).flatten(0, 1).tolist())
    ulysses = group(*numbers.flatten(0, 1).tolist())
    # A communicator takes a GPU's memory: no second one where it would be the same.
    sequence = (
        ring
        if layout.ulysses == 1
        else ulysses
        if layout.ring == 1
        else group(*numbers.flatten(1).tolist())
    )
    cfg = group(*numbers.movedim(0, 2).flatten(0, 1).tolist())
    world = Group(traffic) if layout.size == 1 else Group(traffic, dist.group.WORLD)
    return ParallelContext(layout, ranks, traffic, world, sequence, ring, ulysses, cfg)


def simulated_groups(
    layout: Layout, rank: int = 0, device: torch.device | str = "cpu"
) -> ParallelContext:
    """The team that a process would be part of, without the others: it works on its share, and what
    they would send holds anything.
    """
    traffic, (cfg, ring, place) = CommStats(), layout.place(rank)

    def group(own: int, size: int) -> Group:
        return Group(traffic, rank=own, size=size)

    ranks, sequence = (
        DistInfo(rank, layout.size, torch.device(device)),
        group(ring * layout.ulysses + place, layout.sequence),
    )
    parts = group(ring, layout.ring), group(place, layout.ulysses), group(cfg, layout.cfg)
    return ParallelContext(layout, ranks, traffic, group(rank, layout.size), sequence, *parts)
