"""What the plan says of cards: memory counted once, and the work as a card runs it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.plans import of, plan_for, together

from wanflow.checkpoint.checkpoint import published
from wanflow.cli import main
from wanflow.hardware import cpu_name
from wanflow.opening import resolve
from wanflow.plan.calibration import Calibration
from wanflow.plan.cards import GPUS, Overheads
from wanflow.plan.estimate import by_way, estimate
from wanflow.plan.gpus import Machine, described
from wanflow.plan.measure import rated
from wanflow.plan.phases import COMPILED, EAGER
from wanflow.plan.solve import solve
from wanflow.plan.trace import fake
from wanflow.plan.traces import Traces
from wanflow.presets import T2V_A14B
from wanflow.runtime import Runtime
from wanflow.transforms.compile import UNMEASURED_S

GB = 10**9
QUICK = {"size": "832*480", "frame_num": 17}


def test_a_context_is_counted_once() -> None:
    """An A100 of 40 GB holds an expert: what CUDA says is free lacks the context that is needed."""
    card = described("a100-40gb", ram=64)
    context = Overheads().context
    after = replace(card, gpu_free=card.gpu - context, holds_context=True)
    assert after.gpu_room == card.gpu_room == card.gpu
    assert replace(after, holds_context=False).gpu_room == card.gpu - context  # another program's
    plan = plan_for(after, Runtime(keep_experts=False))
    assert plan.runtime.chunk_tokens == 0 and plan.runtime.resident_blocks == 40
    assert plan.need is not None and plan.need.device.device > card.gpu * 0.98 - context


def test_buffers_of_nccl_count_where_there_are_several_ranks() -> None:
    over = Overheads()
    alone, several = together(1, ram=256, **QUICK), together(8, ram=256, **QUICK)
    assert alone.need is not None and several.need is not None
    assert {phase.nccl for phase in alone.need.phases} == {0}
    for phase in several.need.phases:
        assert phase.nccl == over.nccl
        tensors = round(phase.tensors * (1 + over.gaps))
        assert phase.device == tensors + over.context + over.nccl + phase.workspace
    assert several.need.phases[-1].workspace == over.workspace


def test_ranks_of_a_machine_share_what_streams_and_what_is_read_ahead() -> None:
    """Eight GPUs ask for the RAM of one copy: 244.8 GB were asked for when each had its own."""
    one, eight = (together(count, ram=256, **QUICK) for count in (1, 8))
    assert one.need is not None and eight.need is not None
    assert one.runtime.prefetch and eight.runtime.prefetch
    per_rank = eight.need.ram.ram - one.need.ram.ram
    assert per_rank / 7 < 2.5 * GB and eight.need.ram.ram < 55 * GB
    windows = replace(eight.need.ram, copies=8)
    assert windows.ram - eight.need.ram.ram == 7 * eight.need.ram.shared > 180 * GB


def test_an_rms_norm_is_one_operation_on_a_gpu() -> None:
    x = torch.nn.functional.rms_norm
    traffic = {}
    for fused in (False, True):
        with fake(fused=fused) as trace:
            rows = torch.empty(100, 64)
            trace.mark()
            out = x(rows, (64,))
            assert out.shape == rows.shape
            traffic[fused] = trace.work.traffic, trace.work.kernels
            assert trace.peak == trace.live == 2 * rows.nbytes or not fused
            del out
            assert trace.live == rows.nbytes
    assert traffic[True] == (2 * 100 * 64 * 4, 1) < traffic[False]


def test_compiled_is_its_own_estimate() -> None:
    plan = plan_for(described("h100-80gb", ram=128), Runtime(keep_experts=False))
    assert plan.need is not None and plan.machine.rates is not None
    eager, compiled = estimate(plan, False), estimate(plan, True)
    step = plan.need.phases[1]
    numbers = 2 * 75_600 * 5120 * 40
    assert step.fused == (EAGER - COMPILED) * numbers
    saved = step.fused / plan.machine.rates.memory
    assert eager.stages[1].step - compiled.stages[1].step == pytest.approx(saved)
    assert compiled.compiling == UNMEASURED_S and eager.compiling == 0
    # A run weighs the two by the same rule, and the page shows both where that is left to it.
    assert estimate(plan) == compiled and by_way(plan) == {"eager": eager, "compiled": compiled}
    short = plan_for(described("h100-80gb", ram=128), Runtime(keep_experts=False), frame_num=5)
    assert estimate(short) == estimate(short, False)
    for way, found in (("off", eager), ("on", compiled)):
        asked = replace(plan, runtime=replace(plan.runtime, compile=way))
        assert estimate(asked) == found and not by_way(asked)
    assert not any(phase.fused for phase in (plan.need.phases[0], plan.need.phases[-1]))


@pytest.mark.parametrize(
    ("driver", "key"),
    [
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("Tesla V100-PCIE-32GB", "v100"),
        ("Tesla V100-SXM2-16GB", "v100-16gb"),
    ],
)
def test_cards_have_rows_of_their_own_by_the_drivers_names(driver: str, key: str) -> None:
    reported = int(GPUS[key].gib * 2**30)
    assert [name for name, card in GPUS.items() if card.same_as(driver, reported)] == [key]


def test_the_page_says_what_is_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--gpu", "h100-pcie", "--num_gpus", "2", "--size", "832*480"]
    assert main([*argv, "--frame_num", "5", "--sample_steps", "4"]) == 0
    page = capsys.readouterr().out
    assert (
        "besides tensors: 572 MiB of CUDA's context, 4% of gaps, 477 MiB for cuDNN in the VAE,"
        " 954 MiB for NCCL (assumed)" in page
    )


def test_a_block_moves_what_the_plan_counts() -> None:
    """Eager, in bfloat16, as a GPU runs it."""
    traces = Traces(published(), of(T2V_A14B), torch.bfloat16, torch.device("cpu"))
    work = traces.step("high", 2, Runtime(chunk_tokens=0), False).work
    assert work.traffic / traces.block_numbers(True) == pytest.approx(EAGER, rel=0.01)


# what was measured

H100 = Calibration(
    "NVIDIA H100 80GB HBM3",
    int(79.1 * 2**30),
    "bfloat16",
    matmul=6e14,
    attention=3e14,
    memory=2e12,
    compiled=0.5,
    context=800_000_000,
    workspace=2 * GB,
)
SHORT = ("--size", "832*480", "--frame_num", "5", "--sample_steps", "4")


def test_what_was_measured_replaces_what_is_assumed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "check.json"
    file.write_text(json.dumps({"parts": [], "calibration": H100.to_json()}))
    plan = plan_for(described("h100-80gb"), Runtime(calibration=str(file)), **QUICK)
    assumed = plan_for(described("h100-80gb"), **QUICK)
    rates, known = plan.machine.rates, GPUS["h100-80gb"].rates
    assert rates is not None and plan.need is not None and assumed.need is not None
    assert (rates.matmul, rates.attention, rates.memory) == (6e14, 3e14, 2e12)
    assert (rates.disk, rates.link) == (known.disk, known.link), "as assumed: not measured"
    vae, before = plan.need.phases[-1], assumed.need.phases[-1]
    assert vae.device - before.device == (800_000_000 - 600_000_000) + (2 * GB - 500_000_000)
    eager, compiled = estimate(plan, False), estimate(plan, True)
    assert eager.seconds > estimate(assumed, False).seconds
    assert compiled.stages[1].step == pytest.approx(0.5 * eager.stages[1].step)
    assert compiled.stages[-1] == eager.stages[-1]
    assert main(["plan", "--gpu", "h100-80gb", "--calibration", str(file), *SHORT]) == 0
    page = capsys.readouterr().out
    source = "measured on NVIDIA H100 80GB HBM3 by wanflow bench"
    assert f"4% of gaps, 1.9 GiB for cuDNN in the VAE ({source}; gaps: assumed)" in page
    assert f"(rates: {source}; attention by the fastest kernel there)" in page


@pytest.mark.parametrize(
    ("argv", "value", "words"),
    [
        (("--gpu", "h100-pcie"), {}, "measured on NVIDIA H100 80GB HBM3 with 79.1 GiB; this plan"),
        (("--gpu", "none", "--force"), {}, "measured on NVIDIA H100 80GB HBM3"),
        (("--gpu", "h100-80gb", "--dtype", "float16"), {}, "measured in bfloat16"),
        (("--gpu", "h100-80gb"), {"matmul": -1.0}, "calibration matmul"),
        (("--gpu", "h100-80gb"), {"fragmentation": 1e9}, "calibration fragmentation"),
        (("--gpu", "h100-80gb"), {"format": 7}, "calibration format"),
    ],
)
def test_a_file_of_another_card_is_refused_in_words(
    argv: tuple[str, ...],
    value: dict[str, Any],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "check.json"
    file.write_text(json.dumps({**H100.to_json(), **value}))
    assert main(["plan", *argv, *SHORT, "--calibration", str(file)]) == 2
    refusal = capsys.readouterr().err.splitlines()[-1]
    assert words in refusal and str(file) in refusal


def test_a_short_measurement_fills_what_a_file_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpu.json"
    some = Calibration(cpu_name() or "cpu", 0, "float32", matmul=7e9)
    file.write_text(json.dumps(some.to_json()))
    runtime = Runtime(device="cpu", calibration=str(file))
    model = resolve("nano")
    plan = rated(solve(model, of(model.spec), runtime, Machine(0, "", 2**34, 2**34, 10**11)))
    rates = plan.machine.rates
    assert rates is not None and rates.matmul == 7e9 and rates.attention > 1e6
    assert rates.source.endswith("by wanflow bench")
