"""The plan of one video on several GPUs: the layout, the shares of weights, what a process holds
and sends, and the time that follows.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.expected_bytes import forward_bytes
from helpers.plans import SMALL_DIT, of, together

from wanflow.assemble import layout_of
from wanflow.checkpoint.checkpoint import published
from wanflow.checkpoint.structure import expert_structure
from wanflow.cli import main
from wanflow.config import RequestError
from wanflow.opening import resolve
from wanflow.parallel import sharding as shares
from wanflow.parallel.groups import Layout, sizes
from wanflow.plan.cards import GPUS, PCIE
from wanflow.plan.estimate import estimate
from wanflow.plan.gpus import described
from wanflow.plan.phases import on_device
from wanflow.plan.plan import with_layout
from wanflow.plan.solve import solve
from wanflow.plan.start import make_plan, raise_if_unfit
from wanflow.plan.traces import Traces
from wanflow.presets import NANO, T2V_A14B
from wanflow.request import Request, with_settings
from wanflow.runtime import Runtime

GB = 10**9
CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"size": "832*480", "frame_num": 17}


def chosen(processes: int, runtime: Runtime | None = None, here: int = 8, **options: Any) -> Layout:
    request = of(T2V_A14B, **options)
    return with_layout(published(), request, runtime or Runtime(), processes, here)[1]


# the layout


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (1, Layout()),
        (2, Layout(2)),
        (3, Layout(ulysses=3)),
        (4, Layout(2, 1, 2)),
        (6, Layout(2, 1, 3)),
        (7, Layout(ulysses=7)),
        (8, Layout(2, 1, 4)),
        (16, Layout(2, 1, 8)),
        (32, Layout(2, 2, 8)),
    ],
)
def test_layouts_that_are_chosen(processes: int, layout: Layout) -> None:
    assert chosen(processes) == layout


def test_guidance_is_split_only_where_every_step_has_it() -> None:
    """A step without it would be computed twice, by both groups."""
    assert chosen(8, cfg_high=1.0, cfg_low=1.0) == chosen(8, cfg_low=1.0) == Layout(ulysses=8)
    for name, runs in (
        ("lightning4", Layout(ulysses=4)),
        ("lightning8", Layout(ulysses=4)),
        ("lightning-motion", Layout(ulysses=4)),
    ):
        request = with_settings(Request("any", seed=0), name).complete(T2V_A14B)
        assert with_layout(published(), request, Runtime(), 4, 8)[1] == runs, name
    assert chosen(2, Runtime(cfg_parallel=True), cfg_low=1.0) == Layout(2), "what is set stays"


def test_what_is_set_stays_and_the_rest_follows() -> None:
    assert chosen(4, Runtime(ulysses_size=4)) == Layout(ulysses=4)
    assert chosen(8, Runtime(cfg_parallel=False)) == Layout(ulysses=8)
    assert chosen(8, Runtime(ring_size=2)) == Layout(2, 2, 2)
    assert chosen(16, here=4) == Layout(2, 2, 4)
    assert chosen(64, Runtime(attention="sage")).ring == 1, (
        "a ring needs the log-sum-exp, which not every version of this kernel says"
    )
    for processes, runtime in (
        (4, Runtime(ulysses_size=3)),
        (1, Runtime(ulysses_size=4)),
        (3, Runtime(cfg_parallel=True)),
    ):
        with pytest.raises(RequestError, match="does not make"):
            chosen(processes, runtime)
    with pytest.raises(RequestError, match="processes"):
        chosen(0)


def test_a_small_model_is_settled_without_a_trace() -> None:
    plan = make_plan(resolve("nano"), Runtime(device="cpu"), processes=4)
    assert plan.need is None and plan.layout == layout_of(plan.runtime) == Layout(2, 1, 2)
    assert (
        plan.runtime.dit_fsdp is False and plan.runtime.vae_tile == 0 and plan.runtime.keep_experts
    )
    assert any("5 heads on 2" in reason for reason in plan.reasons)
    assert make_plan(
        resolve("nano"), Runtime(device="cpu", dit_fsdp=True), processes=2
    ).runtime.dit_fsdp


# what is chosen


def test_nothing_is_left_open() -> None:
    plan = together(8, **QUICK)
    left = {name for name, value in vars(plan.runtime).items() if value is None}
    assert plan.fits and left == {"cfg_batch", "text_cache", "machine_cache", "calibration"}
    assert (
        plan.runtime.vae_tile == 0
        and not plan.runtime.dit_fsdp
        and plan.runtime.keep_experts
        and plan.runtime.resident_blocks == 40
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpu", "processes", "keep"), [("rtx4090", 2, False), ("rtx4090", 4, True)]
)
def test_shares_where_a_whole_expert_does_not_fit(gpu: str, processes: int, keep: bool) -> None:
    plan = together(processes, gpu, **QUICK)
    assert plan.fits, plan.short
    assert (
        plan.runtime.dit_fsdp and plan.runtime.resident_blocks == 40 and not plan.runtime.prefetch
    )
    assert plan.runtime.keep_experts is keep
    assert any("a shard" in reason and "26.6 GiB" in reason for reason in plan.reasons)


@pytest.mark.slow
def test_whole_experts_come_first_and_streaming_last() -> None:
    one = together(2, "l40s", **QUICK)
    assert (
        one.fits
        and not one.runtime.dit_fsdp
        and not one.runtime.keep_experts
        and one.runtime.resident_blocks == 40
    )
    streamed = together(2, "rtx4090", runtime=Runtime(dit_fsdp=False), **QUICK)
    assert (
        streamed.fits
        and not streamed.runtime.dit_fsdp
        and 0 < (streamed.runtime.resident_blocks or 0) < 40
    )


def test_the_official_command_stays_as_it_is() -> None:
    plan = together(4, runtime=Runtime(dit_fsdp=True, ulysses_size=4, keep_experts=False), **QUICK)
    assert (
        plan.fits
        and plan.layout == Layout(ulysses=4)
        and plan.runtime.dit_fsdp
        and not plan.runtime.keep_experts
    )


def test_several_that_are_too_small_are_refused_in_three_lines() -> None:
    small = replace(described("rtx4090", 2), gpu_free=13 * GB)
    plan = solve(published(), of(T2V_A14B, **QUICK), Runtime(dit_fsdp=True), small, processes=2)
    with pytest.raises(RequestError) as refusal:
        raise_if_unfit(plan)
    needed, here, do = str(refusal.value).splitlines()
    assert "on each GPU" in needed and "2 x NVIDIA RTX 4090" in here and do.startswith("  do:")
    assert any("fp8" in offer for offer in plan.offers)


@pytest.mark.slow
def test_processes_of_a_machine_share_its_ram() -> None:
    """One pinned copy of what is streamed serves all; what a process takes is its own."""
    runtime = Runtime(
        dit_fsdp=False,
        resident_blocks=20,
        keep_experts=False,
        stream_from="ram",
        chunk_tokens=0,
        t5_cpu=False,
        prefetch=False,
        vae_tile=0,
    )
    one, two = (together(processes, "rtx4090", 128, runtime, **QUICK) for processes in (1, 2))
    assert one.need is not None and two.need is not None
    each = [phase.ram for phase in one.need.phases[1:3]]
    assert each[0] > 14 * GB
    own = [phase.ram - phase.shared for phase in one.need.phases[1:3]]
    both = [ram + its for ram, its in zip(each, own, strict=True)]
    assert [phase.ram for phase in two.need.phases[1:3]] == both
    assert all(1.5 * GB <= its < 2.5 * GB for its in own)
    assert two.need.phases[0].ram - one.need.phases[0].ram == pytest.approx(1.5 * GB), (
        "the second one waits while the first encodes"
    )
    machine = described("rtx4090", 2, ram=128)
    apart = solve(
        published(), of(T2V_A14B, **QUICK), two.runtime, machine, processes=2, per_machine=1
    )
    assert apart.need is not None and apart.need.phases[1].ram == each[0], "on a machine each"


# what a process holds and sends


@pytest.mark.parametrize(
    "layout", [Layout(2), Layout(ulysses=3), Layout(2, 1, 4), Layout(1, 2, 2), Layout(2, 2, 2)]
)
def test_bytes_at_full_size_are_the_layouts_own(layout: Layout) -> None:
    """Counted in the code that sends; attention stays one operation, with its share of the
    heads.
    """
    traced = Traces(published(), of(T2V_A14B), torch.bfloat16, CPU, layout).step(
        "high", 2, Runtime(chunk_tokens=0), False
    )
    passes, tokens = 2 // layout.cfg, 75_600
    found = {
        what: count * (1 if what == "velocity" else passes)
        for what, count in forward_bytes(layout, T2V_A14B.dit, tokens, layout.size - 1).items()
    }
    assert dict(traced.sent) == found
    heads, own = sizes(40, layout.ulysses)[-1], tokens // layout.ring
    attention = sum(count for (kind, _), count in traced.work.flops.items() if kind == "attention")
    scores = 4 * own * tokens * heads * 128 + 4 * sizes(tokens, layout.sequence)[-1] * 512 * 5120
    assert attention == passes * 40 * scores
    assert traced.activations < 1.05 * 10.6 * GB / layout.sequence**0.5, (
        "and has no matrix of scores"
    )


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(2, 1, 2), Layout(ulysses=3), Layout(1, 2, 2)])
def test_one_block_stands_for_all(layout: Layout) -> None:
    preset = replace(NANO, dit=SMALL_DIT)
    sides = [
        Traces(published(preset), of(preset, size="256*256"), torch.bfloat16, CPU, layout)
        for _ in range(2)
    ]
    sides[1].TRACED_BLOCKS = SMALL_DIT.num_layers
    reckoned, traced = (side.step("high", 2, Runtime(cfg_batch=False), False) for side in sides)
    assert reckoned.activations == traced.activations
    assert (
        reckoned.work == traced.work
        and reckoned.sent == traced.sent
        and reckoned.messages == traced.messages > 0
    )


@pytest.mark.parametrize("quantize", ["", "int8"])
def test_shares_are_rows(quantize: Any) -> None:
    """ceil(rows / N) of every matmul weight of a block, and all of everything else."""
    preset, layout = replace(NANO, dit=replace(SMALL_DIT, dim=320, ffn_dim=1000)), Layout(ulysses=3)
    runtime = Runtime(quantize=quantize, quantize_layers="all", chunk_tokens=0, dit_fsdp=True)
    traces = Traces(published(preset), of(preset), torch.bfloat16, CPU, layout)
    model = expert_structure(preset.dit, None, runtime, torch.bfloat16, "cpu")
    cut = {
        value
        for block in model.blocks
        for leaf in block.modules()
        for value in shares.rows_of(leaf)
    }
    held = sum(
        -(-len(value) // 3) * (value.nbytes // len(value)) if value in cut else value.nbytes
        for value in model.parameters()
    )
    assert on_device(traces, "high", runtime) == held
    block = (
        sum(3 * -(-len(value) // 3) * (value.nbytes // len(value)) for value in cut)
        / preset.dit.num_layers
    )
    # A block at work is there twice: gathered, and as the message it arrived in. gloo copies that
    # message while it arrives.
    plain = traces.step("high", 2, replace(runtime, dit_fsdp=False), False).activations
    ours, gloos = (
        traces.step("high", 2, runtime, False, gloo=gloo).activations for gloo in (False, True)
    )
    assert (
        max(plain, 2 * block) <= ours <= plain + 2 * block
        and max(ours, 3 * block) <= gloos <= plain + 3 * block
    )


def test_strips_share_a_decode() -> None:
    """Of the rank with the most to do; the full frame is tested in test_vae_parallel.py."""
    full, part = (
        Traces(published(), of(T2V_A14B), torch.bfloat16, CPU, layout).decode(0)
        for layout in (Layout(), Layout(2, 1, 4))
    )
    assert part.activations < 1.06 * full.activations / 8
    assert part.work.total() < 1.06 * full.work.total() / 8
    assert set(part.sent) == {"halo", "kv", "frames"} and not full.sent


# time


def test_sending_is_added_and_gathering_overlaps() -> None:
    plan = together(4, runtime=Runtime(dit_fsdp=True, ulysses_size=4), **QUICK)
    assert plan.need is not None and plan.machine.rates is not None
    phase, fast = plan.need.phases[1], plan.machine.rates
    slow = replace(fast, link=PCIE)
    ours, theirs = (
        estimate(replace(plan, machine=replace(plan.machine, rates=each))).stages[1]
        for each in (fast, slow)
    )
    assert ours.bound == "computing" and ours.sending == pytest.approx(
        sum(phase.sent.values()) / fast.link + phase.messages * fast.message
    )
    assert theirs.bound == "gathering the other ranks' shards" and theirs.step == pytest.approx(
        phase.gathered / PCIE + theirs.sending
    )
    assert phase.gathered == 3 * sum(
        -(-len(value) // 4) * (value.nbytes // len(value))
        for block in expert_structure(T2V_A14B.dit, None, Runtime(), torch.bfloat16, "cpu").blocks
        for leaf in block.modules()
        for value in shares.rows_of(leaf)
    )


@pytest.mark.slow
def test_more_gpus_take_less_time_but_not_by_as_much() -> None:
    seconds = {count: estimate(together(count, **QUICK)).denoising for count in (1, 3, 8)}
    assert seconds[1] > seconds[3] > seconds[8]
    assert seconds[8] > seconds[1] / 8
    # 14 of 40 heads are 5 % more than a third.
    assert 1.01 < seconds[3] * 3 / seconds[1] < 1.2


def test_every_card_has_a_link() -> None:
    link = {key: card.rates.link for key, card in GPUS.items()}
    assert link["a100-80gb"] < link["h100-80gb"] == link["h200"]
    assert link["rtx4090"] == link["l40s"] == PCIE < link["a100-80gb"]


# the command


@pytest.mark.slow
def test_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--gpu", "rtx4090", "--num_gpus", "3", "--size", "832*480", "--frame_num", "17"]
    assert main(argv) == 0
    page = capsys.readouterr().out
    for words in (
        "3 x NVIDIA RTX 4090",
        "3 processes as ulysses 3",
        "40 heads on 3",
        "memory of each process",
        "on each",
        "of all 3",
        "queries, keys and values",
        "GB of weights",
        "of it sending",
        "by the first process",
    ):
        assert words in page, words


@pytest.mark.slow
def test_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "plan",
        "--num_gpus",
        "4",
        "--dit_fsdp",
        "--t5_fsdp",
        "--ulysses_size",
        "4",
        "--size",
        "832*480",
        "--frame_num",
        "17",
        "--json",
    ]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["layout"] == {"cfg": 1, "ring": 1, "ulysses": 4, "processes": 4}
    assert (
        found["runtime"]["dit_fsdp"] is True
        and found["runtime"]["ulysses_size"] == 4
        and found["machine"]["rates"]["link"] == 200e9
    )
    text, step, *_, vae = found["phases"]
    assert (
        text["alone"]
        and step["processes_here"] == 4
        and set(step["sent"]) == {"qkv", "out", "patches"}
        and step["gathered"] > 20 * GB
    )
    assert set(vae["sent"]) == {"halo", "kv", "frames"}
    assert found["estimate"]["stages"][1]["sending"] > 0


def test_a_layout_of_another_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--num_gpus", "4", "--ulysses_size", "3"]) == 2
    assert "does not make 4" in capsys.readouterr().err
