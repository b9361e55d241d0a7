"""A GPU that hangs, by fakes: it looks hung to the watch, and the state is saved without it.
Torch's own limits come later. Buffers of collectives that end late live until then.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.common import PROMPT
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

import wanflow
from wanflow import cli
from wanflow.cli.keeping import StateKeeper
from wanflow.cli.output import Output
from wanflow.parallel import groups, ranks, vae_parallel
from wanflow.parallel.groups import CommStats, Group, Layout, simulated_groups
from wanflow.parallel.sequence import Ring, sharded
from wanflow.parallel.watchdog import Failure, Watchdog
from wanflow.pipeline import Run

GPU = torch.device("cuda", 1)


class Timeline:
    """The work of a GPU: how many of the events that the host has recorded are over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorded, self.over, self.broken = 0, 0, False
        self.devices: list[torch.device] = []
        timeline = self

        class Event:
            def record(self) -> None:
                timeline.recorded += 1
                self.number = timeline.recorded

            def query(self) -> bool:
                if timeline.broken:
                    raise RuntimeError("CUDA error: unspecified launch failure")
                return self.number <= timeline.over

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "set_device", self.devices.append)


def test_only_work_that_is_over_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Timeline(monkeypatch)
    stats = CommStats(device=GPU)
    for _ in range(5):
        stats.add("qkv", 8)  # the host runs ahead
    assert stats.progress() == (0, True) and gpu.devices == [GPU]
    gpu.over = 3
    assert stats.progress() == (3, True)
    gpu.broken = True
    assert stats.progress() == (3, True)  # the main thread says why
    gpu.broken, gpu.over = False, 5
    assert stats.progress() == (5, False)
    on_cpu = CommStats(device=torch.device("cpu"))
    on_cpu.add("qkv", 8)
    assert on_cpu.progress() == (1, False)


def test_every_block_counts_on_every_layout() -> None:
    """With sharded weights, too, whose collectives are FSDP's own."""
    for layout in (Layout(cfg=2), Layout(ulysses=2)):
        ctx = simulated_groups(layout)

        def run(given: Any, *rest: object) -> Tensor:
            assert list(given) == list(range(6))
            return torch.ones(1, 4, 2)

        part: Any = SimpleNamespace(part=lambda tokens: None)
        sharded(ctx, run)(range(6), None, torch.ones(1, 8, 2), part)  # type: ignore[arg-type]
        assert ctx.stats.progress()[0] >= 6


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ((9, 8), "rank 1 of 2: late to a collective by 60 s (--timeout)"),
        ((8, 8), "rank 0 of 2: its GPU, as all others, stands still for 60 s (--timeout)"),
    ],
    ids=["one hangs before a collective", "all hang in one"],
)
def test_a_hung_gpu_looks_hung(
    over: tuple[int, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both hosts have given their GPUs the whole step, so both have entered all collectives."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    store = HashStore()
    both = [Watchdog(store, rank, 2) for rank in range(2)]
    for watchdog, passed in zip(both, over, strict=True):
        watchdog.timeout_s = 60.0
        watchdog.progress = lambda passed=passed: (passed, True)  # type: ignore[misc]
    found = []
    for _ in range(130):
        now[0] += 0.5
        for watchdog in both:
            watchdog._turn()
        found.append(both[0]._judge())
    assert found[:110] == [None] * 110 and found[-1] == Failure(1, message)


def test_ranks_that_read_weights_for_long_are_not_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    store = HashStore()
    both = [Watchdog(store, rank, 2) for rank in range(2)]
    for _ in range(1000):
        now[0] += 1.0
        for watchdog in both:
            watchdog.progress = lambda: (8, False)
            watchdog._turn()
    assert both[0]._judge() is None


@pytest.mark.parametrize("seconds", ["0.5", "600", "100000"])
def test_the_limit_of_torch_is_a_day_later_than_ours(
    seconds: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any --timeout: NCCL counts from the host's side, and kills without a message."""

    class Joined(Exception):
        pass

    limits = []

    def init_process_group(*given: object, timeout: timedelta, **named: object) -> None:
        limits.append(timeout.total_seconds())
        raise Joined

    monkeypatch.setattr(ranks.dist, "init_process_group", init_process_group)
    monkeypatch.setattr(ranks, "connect_store", lambda *given: None)
    monkeypatch.setattr("wanflow.cli.checks.check", lambda args: None)
    for name in ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING"):
        monkeypatch.setenv(name, "1")
        monkeypatch.delenv(name)
    shared = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in shared.items():
        monkeypatch.setenv(name, value)
    words = ["generate", "--ckpt_dir", "nano", "--device", "cpu", "--prompt", PROMPT]
    logger = logging.getLogger("wanflow")
    level = logger.level
    try:
        with pytest.raises(Joined):
            cli.main([*words, "--timeout", seconds])
    finally:
        logger.setLevel(level)  # a rank that is not the first logs less
    assert limits == [float(seconds) + 86_400]
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert os.environ["TORCH_NCCL_ENABLE_MONITORING"] == "0"


class OnGpu(Tensor):
    """A tensor whose device hangs from some moment on: whatever touches it then never returns."""

    hangs = False

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert not OnGpu.hangs, f"{function} waits for a GPU that hangs"
        result = super().__torch_function__(function, types, args, kwargs or {})
        return result.as_subclass(Tensor) if function is Tensor.cpu else result


def test_the_state_is_saved_while_the_gpu_hangs(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step is lost: the copy on the CPU is that of the last step that ended."""
    pipe = wanflow.load("nano", device="cpu")
    run = pipe.begin(wanflow.Request(PROMPT, frame_num=5, sample_steps=3, seed=3))
    keeper = StateKeeper(run, Path("a.latent.safetensors"), lambda *given: "again", Output())

    def on_step(progress: Any) -> bool:
        state = progress.run.state
        tensors = {name: value.as_subclass(OnGpu) for name, value in state.tensors().items()}
        keeper(
            SimpleNamespace(  # type: ignore[arg-type]
                run=wanflow.pipeline.replace(
                    progress.run, state=type(state).from_tensors(state.index, tensors)
                )
            )
        )
        return progress.step < 2

    with pytest.raises(wanflow.Cancelled):
        pipe.resume(run, on_step)
    monkeypatch.setattr(OnGpu, "hangs", True)
    assert keeper.on_abort()
    assert Run.load("a.latent.safetensors").state.index == 2


# Collectives that return at once and end later


class Late:
    """What `batch_isend_irecv` gives: it looks at its buffers when it is waited for."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.buffers = [weakref.ref(tensor) for tensor in tensors]

    def wait(self) -> None:
        assert all(ref() is not None for ref in self.buffers), "a buffer is gone before the end"


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], Group]:
    """A group whose collectives end when they are waited for, and bring ones."""

    def p2p(start: Any, values: Tensor, group: Any, group_peer: int) -> Any:
        if start is groups.dist.irecv:
            values.fill_(1)
        return SimpleNamespace(values=values)

    monkeypatch.setattr(groups.dist, "P2POp", p2p)
    monkeypatch.setattr(
        groups.dist, "batch_isend_irecv", lambda operations: [Late([o.values for o in operations])]
    )

    def group(rank: int, size: int) -> Group:
        made = Group(CommStats(), None, rank, size)
        made.handle = object()  # type: ignore[assignment]
        return made

    return group


def test_a_buffer_that_is_not_held_is_seen(late: Callable[[int, int], Group]) -> None:
    """The proof that the tests below can fail."""
    arriving = torch.empty(3)
    (work,) = late(0, 2).shift("ring", torch.ones(3), arriving)
    with pytest.raises(AssertionError, match="gone before the end"):
        work.wait()


def test_a_ring_holds_its_blocks_until_they_have_arrived(late: Callable[[int, int], Group]) -> None:
    ctx = simulated_groups(Layout(ring=3))
    ctx.ring, ctx.tokens = late(0, 3), 9

    def with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return v.clone(), torch.zeros(q.shape[0], q.shape[2], q.shape[1])

    q = torch.ones(1, 3, 2, 4)
    assert torch.equal(Ring(with_lse, ctx)(q, q, q), q)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_strips_hold_their_borders_until_they_have_arrived(
    rank: int, late: Callable[[int, int], Group]
) -> None:
    group, strips = late(rank, 3), vae_parallel.Strips(12, 12, 3)
    x = torch.ones(1, 4, 1, *((4, 12) if strips.axis == 2 else (12, 4)))
    assert bool((vae_parallel.Halo(strips, group, 1)(x) == 1).all())
    keys = torch.ones(1, 1, strips.sizes[rank] * strips.across, 4)
    complete = vae_parallel.Attention(torch.nn.Identity(), strips, group)._complete(keys)  # type: ignore[arg-type]
    assert complete.shape[-2] == 144 and bool((complete == 1).all())
