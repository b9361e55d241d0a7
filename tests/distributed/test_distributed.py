"""One video on several processes: every layout gives what one process gives, and sends what the
plan says.

Real processes speak gloo; one set of them does all that is looked at, for every number of
processes, since starting them takes longest. Numbers of processes that would be slow here are
played by PyTorch's fake group, which sends nothing: shapes and counted bytes only.
"""

from __future__ import annotations

import copy
import math
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.expected_bytes import forward_bytes
from helpers.processes import CPU, Processes, played
from torch import Tensor, nn

from wanflow.config import DiTConfig, RequestError
from wanflow.models.dit import Conditioning, SelfAttention, WanDiT, run_blocks, sdpa
from wanflow.parallel import ranks
from wanflow.parallel.cfg import split_guidance
from wanflow.parallel.groups import (
    Layout,
    ParallelContext,
    bounds,
    choose_layout,
    layouts,
    make_groups,
    sizes,
)
from wanflow.parallel.sequence import connect, join, sharded
from wanflow.presets import NANO, T2V_A14B
from wanflow.transforms.attention_kernels import BACKENDS
from wanflow.transforms.block_streaming import Streaming, SyncExecutor, load_to_host
from wanflow.transforms.host_memory import HostMemory

KERNEL = BACKENDS["sdpa"]
GOLDEN = DiTConfig(
    dim=48, ffn_dim=96, num_heads=2, num_layers=2, text_dim=32, text_len=16, freq_dim=32
)
WIDE = replace(GOLDEN, dim=240, num_heads=40)
SMALL = replace(NANO.dit, num_layers=3)
QUICK, SLOW = (2,), (3, 4, 6, 8)
FAKE = (5, 7, 16)
pytestmark = pytest.mark.distributed


@dataclass(frozen=True)
class Case:
    """A forward. Text rows are as many as samples; `resident`: only this block is not streamed;
    `per_token`: timesteps differ.
    """

    config: DiTConfig = GOLDEN
    batch: int = 1
    grid: tuple[int, int, int] = (3, 3, 5)
    per_token: bool = False
    chunk: int = 0
    dtype: torch.dtype = torch.float32
    resident: int | None = None

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)


CASES = {
    "plain": Case(),
    "nano, timesteps per token": Case(SMALL, 1, (5, 3, 7), per_token=True),
    "batch, timesteps per token, chunks": Case(GOLDEN, 2, (1, 7, 7), per_token=True, chunk=4),
    "batch, nano": Case(SMALL, 2, (1, 4, 6)),
    "streamed": Case(SMALL, 1, (3, 3, 5), per_token=True, chunk=16, resident=1),
    "bfloat16": Case(SMALL, 1, (3, 5, 7), dtype=torch.bfloat16),
    "three tokens": Case(GOLDEN, 2, (1, 1, 3), per_token=True),
    "one token": Case(SMALL, 1, (1, 1, 1)),
}
EXACT = [name for name, case in CASES.items() if case.dtype == torch.float32]


@cache
def made(config: DiTConfig) -> WanDiT:
    """Random weights that keep every value near 1, as golden's do, so that attention is neither
    flat nor a choice of one.
    """
    generator = torch.Generator().manual_seed(1)
    model = WanDiT(config).requires_grad_(False)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.mul_(0.2).add_(1)
        else:
            parameter.mul_(
                {1: 0.1, 3: 0.5}.get(parameter.ndim, math.prod(parameter.shape[1:]) ** -0.5)
            )
    return model


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Latent, timesteps and text of a case."""
    generator = torch.Generator().manual_seed(2)
    frames, rows, columns = case.grid
    latent = torch.randn(case.batch, 16, frames, 2 * rows, 2 * columns, generator=generator)
    text = torch.randn(case.batch, case.config.text_len, case.config.text_dim, generator=generator)
    shape = (case.batch, case.tokens) if case.per_token else (case.batch,)
    return (
        latent,
        torch.tensor([999.0, 700.0, 37.5])[torch.randint(3, shape, generator=generator)],
        text,
    )


def model_of(case: Case) -> WanDiT | Streaming:
    model = copy.deepcopy(made(case.config)).to(case.dtype)
    for module in model.modules():
        if hasattr(module, "chunk"):
            module.chunk = case.chunk
    if case.resident is None:
        return model
    weights = [dict(block.named_parameters()) for block in copy.deepcopy(model).blocks]

    def fetch(index: int, views: Any) -> None:
        for name, view in views.items():
            view.copy_(weights[index][name])

    return Streaming(
        model,
        fetch,
        {case.resident},
        CPU,
        load_to_host(model, fetch, HostMemory(False), {case.resident}),
        SyncExecutor(),
    )


@cache
def alone(name: str) -> Tensor:
    """A case on one process, whole and plain; bfloat16's too."""
    case = CASES[name]
    return model_of(replace(case, chunk=0, resident=None))(*inputs(case))


# what the processes do


def work(info: ranks.DistInfo) -> dict[str, Any]:
    """What came out on every layout."""
    assert ranks.least(40 + info.rank, CPU) == 40  # as all ranks' free memory
    return {
        str(layout): on_layout(make_groups(layout, info, 60)) for layout in layouts(info.world_size)
    }


def on_layout(ctx: ParallelContext) -> dict[str, Any]:
    """{case: output}, what was sent for each, both branches of guidance, and a number that all
    agree on.
    """
    found: dict[str, Any] = {"sent": {}, "first": ctx.from_rank0(40 + ctx.info.rank)}
    for name, case in CASES.items():
        model = model_of(case)
        connect(model, ctx, KERNEL.attend, KERNEL.with_lse)
        latent, timestep, text = inputs(case)
        states = model.text_states(text)
        ctx.stats.reset()
        found[name] = model(latent, timestep, states, sharded(ctx))
        found["sent"][name] = dict(ctx.stats.sent)
        if case.batch == 2:
            first, row = latent[:1], timestep[:1]
            guidance = split_guidance(ctx)
            assert (guidance is None) == (ctx.layout.cfg == 1)
            if guidance is not None:
                states = model.text_states(guidance.select(text))
                predict = partial(model, trunk=sharded(ctx))
                found[f"branches of {name}"] = guidance.branches(predict, first, row, states)
            else:
                found[f"branches of {name}"] = tuple(
                    model(
                        first,
                        row,
                        tuple((k[i : i + 1], v[i : i + 1]) for k, v in states),
                        sharded(ctx),
                    )
                    for i in range(2)
                )
    return found


def left_alone(info: ranks.DistInfo) -> tuple[str, float]:
    """What a process is told, and when, that waits for one which does not come."""
    ctx = make_groups(Layout(ulysses=2), info, timeout_s=2)
    case = CASES["plain"]
    model = model_of(case)
    connect(model, ctx, KERNEL.attend)
    ctx.from_rank0(0)
    store = dist.distributed_c10d._get_default_store()
    began = time.monotonic()
    if info.rank == 1:
        store.wait(["failed"], timedelta(seconds=250))
        return "", 0
    with pytest.raises(RuntimeError) as error:
        model(*inputs(case), sharded(ctx))
    store.set("failed", "")
    return str(error.value), time.monotonic() - began


Worked = Callable[[int], Sequence[dict[str, Any]]]


@pytest.fixture
def worked(processes: Processes) -> Worked:
    """What each of so many processes found."""
    return lambda size: processes(work, size)


CROWD = (pytest.mark.slow, pytest.mark.crowded)
SIZES = [*QUICK, *(pytest.param(size, marks=CROWD) for size in SLOW)]


# what came out


@pytest.mark.parametrize("size", SIZES)
def test_every_layout_gives_what_one_process_gives(size: int, worked: Worked) -> None:
    for rank, found in enumerate(worked(size)):
        assert list(found) == [str(layout) for layout in layouts(size)]
        for layout, values in found.items():
            for name in EXACT:
                expected = alone(name)
                torch.testing.assert_close(
                    values[name],
                    expected,
                    atol=1e-5,
                    rtol=0,
                    msg=lambda text, where=(layout, rank, name): f"{where}: {text}",
                )


@pytest.mark.parametrize("size", SIZES)
def test_every_process_has_the_same_bits(size: int, worked: Worked) -> None:
    """Within a group for guidance they hold what they gathered; between groups the same was
    computed twice.
    """
    first, *others = worked(size)
    for found in others:
        for layout, values in found.items():
            assert values["first"] == 40
            for name in CASES:
                assert torch.equal(values[name], first[layout][name]), (layout, name)


@pytest.mark.parametrize("size", SIZES)
def test_bfloat16_differs_by_its_rounding(size: int, worked: Worked) -> None:
    """As far from float32 as one process in bfloat16 is: sharing the work adds no loss of its
    own.
    """
    case = CASES["bfloat16"]
    exact = model_of(replace(case, dtype=torch.float32))(*inputs(case))
    one = float((alone("bfloat16") - exact).norm() / exact.norm())
    assert one > 1e-3
    for layout, values in worked(size)[0].items():
        assert float((values["bfloat16"] - exact).norm() / exact.norm()) < 1.05 * one, layout


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.batch == 2])
@pytest.mark.parametrize(
    "size", [2, *(pytest.param(size, marks=CROWD) for size in SLOW if size != 3)]
)
def test_two_groups_give_the_bits_of_two_passes(size: int, name: str, worked: Worked) -> None:
    """Two passes of one group of the same layout."""
    half = {} if size == 2 else worked(size // 2)[0]
    compared = 0
    for found in worked(size):
        for layout in layouts(size):
            if layout.cfg == 1:
                continue
            branches = found[str(layout)][f"branches of {name}"]
            expected = (
                two_passes(name)
                if size == 2
                else half[str(replace(layout, cfg=1))][f"branches of {name}"]
            )
            for got, wanted in zip(branches, expected, strict=True):
                assert torch.equal(got, wanted), layout
            assert not torch.equal(*branches)
            compared += 1
    assert compared == size * len([layout for layout in layouts(size) if layout.cfg == 2])


def two_passes(name: str) -> list[Tensor]:
    case = CASES[name]
    latent, timestep, text = inputs(case)
    model = model_of(case)
    return [model(latent[:1], timestep[:1], text[row : row + 1]) for row in range(2)]


@pytest.mark.parametrize("size", SIZES)
def test_what_is_sent_is_what_the_plan_says(size: int, worked: Worked) -> None:
    for rank, found in enumerate(worked(size)):
        for layout in layouts(size):
            for name, case in CASES.items():
                wanted = forward_bytes(
                    layout,
                    case.config,
                    case.tokens,
                    rank,
                    case.batch,
                    case.dtype.itemsize,
                    guided=False,
                )
                assert {
                    key: value for key, value in found[str(layout)]["sent"][name].items() if value
                } == wanted, (layout, rank, name)


def test_a_process_left_alone_fails_in_time(processes: Processes) -> None:
    error, took = processes(left_alone, 2)[0]
    assert "imed out" in error and 1.5 < took < 200  # the group's own timeout is 300 s


# one process that plays many


@pytest.mark.parametrize("size", FAKE)
def test_shapes_and_bytes_of_sizes_that_are_not_run(size: int) -> None:
    """Of 40 heads and odd numbers of tokens. (A process without heads sends nothing and receives,
    which the fake group cannot play.)
    """
    for rank in (0, 1, size - 1):
        with played(rank, size) as info, torch.no_grad():
            for layout in layouts(size):
                ctx = make_groups(layout, info, 60)
                for case in (Case(WIDE), Case(WIDE, 2, (3, 1, 7), per_token=True, chunk=4)):
                    model = model_of(case)
                    connect(model, ctx, KERNEL.attend, KERNEL.with_lse)
                    ctx.stats.reset()
                    latent, timestep, text = inputs(case)
                    velocity = model(latent, timestep, text, sharded(ctx))
                    assert velocity.shape == latent.shape
                    guidance = split_guidance(ctx)
                    if guidance is not None:
                        branches = guidance.branches(lambda *_: velocity, latent, timestep, ())  # noqa: B023
                        assert [branch.shape for branch in branches] == [latent.shape] * 2
                    wanted = forward_bytes(layout, case.config, case.tokens, rank, case.batch, 4)
                    assert {key: value for key, value in ctx.stats.sent.items() if value} == wanted
                    layers = case.config.num_layers
                    calls = {
                        "ring": layers * (layout.ring - 1),
                        "patches": int(layout.sequence > 1),
                        "velocity": layout.cfg - 1,
                    }
                    calls |= dict.fromkeys(("qkv", "out"), layers * (layout.ulysses > 1))
                    assert dict(ctx.stats.calls) == {
                        key: value for key, value in calls.items() if value
                    }


def test_a_14b_video_on_eight_sends_what_is_known() -> None:
    """The volumes of Ulysses at 720p, 81 frames, by hand: four of tokens x width move, but for a
    process' own share.
    """
    tokens = 21 * 45 * 80
    for size in (2, 4, 8):
        found = forward_bytes(Layout(ulysses=size), T2V_A14B.dit, tokens)
        moved = 40 * 4 * tokens * 5120 * 2 * (size - 1) // size**2
        assert found["qkv"] + found["out"] == moved
        assert found["patches"] == (size - 1) * tokens // size * 64 * 4
    assert forward_bytes(Layout(cfg=2), T2V_A14B.dit, tokens) == {
        "velocity": 16 * 21 * 90 * 160 * 4
    }
    assert forward_bytes(Layout(cfg=2), T2V_A14B.dit, tokens, guided=False) == {}


# layouts


def test_layouts_of_all_sizes() -> None:
    for size in range(1, 17):
        for guided in (False, True):
            found = layouts(size, guided)
            assert len(set(found)) == len(found) and all(layout.size == size for layout in found)
            assert {layout.cfg for layout in found} == ({1, 2} if guided and size % 2 == 0 else {1})
        for layout in found:
            assert len({layout.place(rank) for rank in range(size)}) == size
    assert [str(layout) for layout in layouts(4)] == [
        "cfg 2 x ulysses 2",
        "cfg 2 x ring 2",
        "ulysses 4",
        "ring 2 x ulysses 2",
        "ring 4",
    ]
    assert str(Layout()) == "one process"


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        (1, {}, Layout()),
        (2, {}, Layout(2)),
        (3, {}, Layout(1, 1, 3)),
        (4, {}, Layout(2, 1, 2)),
        (6, {}, Layout(2, 1, 3)),
        (8, {}, Layout(2, 1, 4)),
        (16, {}, Layout(2, 1, 8)),
        (2, {"guided": False}, Layout(1, 1, 2)),
        (8, {"guided": False}, Layout(1, 1, 8)),
        (16, {"guided": False}, Layout(1, 2, 8)),
        (8, {"guided": False, "machine": 4}, Layout(1, 2, 4)),
        (7, {"heads": 5}, Layout(1, 7, 1)),
        (7, {"heads": 5, "lse": False}, Layout(1, 1, 7)),
        (16, {"guided": False, "lse": False}, Layout(1, 1, 16)),
        (4, {"ulysses": 4}, Layout(1, 1, 4)),
        (4, {"ring": 2}, Layout(2, 2, 1)),
        (4, {"ring": 2, "lse": False}, Layout(2, 2, 1)),
        (4, {"cfg": 1}, Layout(1, 1, 4)),
        (4, {"cfg": 2, "guided": False}, Layout(2, 1, 2)),
    ],
)
def test_the_layout_that_is_chosen(size: int, options: dict[str, Any], expected: Layout) -> None:
    assert choose_layout(size, **{"heads": 40, **options}) == expected


def test_what_is_no_layout() -> None:
    with pytest.raises(
        RequestError, match=r"cfg 2 x ulysses 3 does not make 4 ranks; these do: cfg 2 x ulysses 2,"
    ):
        choose_layout(4, 40, cfg=2, ulysses=3)
    with pytest.raises(RequestError, match="ring must be at least 1"):
        choose_layout(4, 40, ring=0)
    with pytest.raises(RequestError, match="cfg must be 1 or 2"):
        Layout(cfg=3)
    with pytest.raises(RequestError, match=r"cfg 2 x ring 1 x ulysses 2 = 4 needs .* 3"):
        make_groups(Layout(2, 1, 2), ranks.DistInfo(0, 3, CPU))


def test_even_parts_join() -> None:
    for length in range(40):
        for parts in range(1, 17):
            found = sizes(length, parts)
            assert sum(found) == length and max(found) - min(found) <= 1
            for step in (step for step in range(1, parts + 1) if parts % step == 0):
                assert bounds(length, parts)[::step] == bounds(length, parts // step)


def test_one_process_is_left_as_it_is() -> None:
    ctx = make_groups(Layout(), ranks.DistInfo(0, 1, CPU))
    model = WanDiT(GOLDEN)
    connect(model, ctx, sdpa)
    assert sharded(ctx) is run_blocks
    assert all(
        module.attend is sdpa for module in model.modules() if isinstance(module, SelfAttention)
    )
    assert ctx.from_rank0(3) == 3


# attention


def test_only_attention_among_tokens_is_sharded() -> None:
    with played(0, 4) as info:
        model = WanDiT(GOLDEN)
        connect(model, make_groups(Layout(ring=2, ulysses=2), info), KERNEL.attend, KERNEL.with_lse)
        assert all(
            block.self_attn.attend is not sdpa and block.cross_attn.attend is sdpa
            for block in model.blocks
        )


def test_a_ring_needs_the_log_sum_exp() -> None:
    with played(0, 2) as info:
        with pytest.raises(RequestError, match="ring 2: ring attention needs the log-sum-exp"):
            connect(
                WanDiT(GOLDEN),
                make_groups(Layout(ring=2), info),
                BACKENDS["sage_3"].attend,
                BACKENDS["sage_3"].with_lse,
            )
        connect(WanDiT(GOLDEN), make_groups(Layout(ulysses=2), info), BACKENDS["sage_3"].attend)


@pytest.mark.parametrize("layout", [Layout(ring=2), Layout(ulysses=2)])
def test_a_model_called_without_its_trunk_says_so(layout: Layout) -> None:
    with played(0, 2) as info:
        case, ctx = CASES["plain"], make_groups(layout, info)
        model = model_of(case)
        connect(model, ctx, KERNEL.attend, KERNEL.with_lse)
        with pytest.raises(ValueError, match=r"attention got 45 tokens, .* trunk=sharded\(ctx\)"):
            model(*inputs(case))


@pytest.mark.parametrize("scale", [1, 30])
def test_parts_of_attention_join_to_the_whole(scale: float) -> None:
    """Also where scores are so large that all weight lies in one part."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, length, 3, 8, generator=generator) for length in (5, 13, 13))
    parts, joined_parts = [0, 4, 5, 13], None
    for start, end in pairwise(parts):
        joined_parts = join(
            joined_parts, *KERNEL.with_lse(q * scale, k[:, start:end], v[:, start:end])
        )
    out, lse = joined_parts
    expected = KERNEL.with_lse((q * scale).double(), k.double(), v.double())
    # A log-sum-exp of 90 is known to 4e-6 in float32, and so is each part's weight.
    torch.testing.assert_close(out.double(), expected[0], atol=2e-6 if scale == 1 else 1e-5, rtol=0)
    torch.testing.assert_close(lse[..., 0].transpose(1, 2), expected[1], atol=1e-4, rtol=1e-6)


def test_the_whole_tokens_are_let_go() -> None:
    """1.5 GB at 720p: while the blocks work only this process' part is held."""
    held = []

    def trunk(blocks: Any, head: Any, tokens: Tensor, conditioning: Conditioning) -> Tensor:
        held.append(whole() is None)
        return torch.zeros(len(tokens), tokens.shape[1], 64)

    with played(1, 2) as info:
        model = made(GOLDEN)
        shared = sharded(make_groups(Layout(ulysses=2), info), trunk)
        tokens = torch.zeros(1, 45, 48)
        whole = weakref.ref(tokens)
        arguments = [tokens]
        del tokens
        conditioning = Conditioning(
            torch.zeros(1, 1, 48), torch.zeros(1, 1, 6, 48), None, torch.zeros(45, 12), ()
        )
        shared(
            model.blocks, model.head, arguments.pop(), conditioning
        )  # in no assert: pytest would hold what it is given
    assert held == [True]
