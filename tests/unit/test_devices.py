"""Simulated machines: plan, run and threads are on one device, whose memory and name they mean."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wanflow import hardware
from wanflow.assemble import assemble
from wanflow.checkpoint.checkpoint import published
from wanflow.choices import choose_device
from wanflow.cli import devices, grow_segments, main
from wanflow.config import RequestError
from wanflow.opening import load, resolve, settle
from wanflow.plan import measure
from wanflow.plan.cards import GPUS, Rates
from wanflow.plan.gpus import this_machine
from wanflow.plan.plan import set_up
from wanflow.plan.start import placed
from wanflow.presets import NANO
from wanflow.request import Request
from wanflow.runtime import Runtime
from wanflow.transforms import attention
from wanflow.transforms.attention_kernels import BACKENDS

GIB = 2**30


@dataclass
class Card:
    name: str
    gib: float
    free: float
    capability: tuple[int, int] = (8, 9)
    uuid: str = ""


RTX_3060 = Card("NVIDIA GeForce RTX 3060", 11.7, 11.2, (8, 6), "3060-a")
RTX_4090 = Card("NVIDIA GeForce RTX 4090", 23.5, 23.0, (8, 9), "4090-b")
BUSY_4090 = Card("NVIDIA GeForce RTX 4090", 23.5, 6.0, (8, 9), "4090-c")
T4 = Card("Tesla T4", 14.5, 14.4, (7, 5), "t4-d")
MIG = Card("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 19.5, 19.0, (8, 0), "MIG-e")

Simulate = Callable[..., list[int]]


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Simulate:
    """Make this a machine with these cards; return the devices that CUDA is asked about."""

    def simulate(*cards: Card, driver: bool = True) -> list[int]:
        asked: list[int] = []

        def properties(index: int) -> Any:
            card = cards[index]
            major, minor = card.capability
            return SimpleNamespace(
                name=card.name,
                total_memory=int(card.gib * GIB),
                uuid=card.uuid,
                major=major,
                minor=minor,
            )

        def mem_get_info(index: Any = 0) -> tuple[int, int]:
            asked.append(index)
            return int(cards[index].free * GIB), int(cards[index].gib * GIB)

        def run(*command: str) -> str:
            # In the order of the bus, which is not that of CUDA, and without MIG's instances.
            if not driver or "--query-gpu=uuid,memory.free" not in command:
                return ""
            whole = [card for card in reversed(cards) if not card.uuid.startswith("MIG")]
            return "".join(f"GPU-{card.uuid}, {int(card.free * 1024)}\n" for card in whole)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda which: cards[which.index or 0].capability
        )
        monkeypatch.setattr(hardware, "_run", run)
        monkeypatch.setattr(devices, "_cards", lambda: len(cards))
        return asked

    return simulate


@pytest.mark.parametrize("driver", [True, False])
@pytest.mark.parametrize(
    ("cards", "chosen"),
    [
        ((RTX_3060, RTX_4090), 1),
        ((RTX_4090, RTX_3060), 0),
        ((BUSY_4090, RTX_3060), 1),
        ((BUSY_4090, RTX_4090, RTX_3060), 1),
        ((MIG, RTX_4090), 1),
        ((RTX_3060, MIG), 1),
        ((RTX_3060,), 0),
    ],
)
def test_auto_takes_the_card_with_the_most_free_memory_and_plans_for_it(
    cards: tuple[Card, ...], chosen: int, driver: bool, simulated: Simulate, tmp_path: Path
) -> None:
    asked = simulated(*cards, driver=driver)
    for name in ("auto", "cuda"):
        assert choose_device(name) == torch.device("cuda", chosen)
    known = driver and MIG not in cards
    assert not asked or not known, "a question through CUDA makes a context on each card"
    runtime, machine = placed(Runtime(), tmp_path)
    assert runtime.device == machine.device == f"cuda:{chosen}"
    assert (machine.gpu_name, machine.gpu) == (cards[chosen].name, int(cards[chosen].gib * GIB))
    assert machine.gpu_free == int(cards[chosen].free * GIB) and machine.holds_context
    assert this_machine(tmp_path).device == machine.device


def test_the_run_is_where_its_plan_was_made(
    simulated: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another card has more room by the time that the weights are read."""
    simulated(RTX_3060, RTX_4090)
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(attention, "choose_kernel", lambda *_, **__: BACKENDS["sdpa"])
    checkpoint = resolve("nano")
    settled, _ = settle(checkpoint, Runtime())
    assert settled.device == "cuda:1"
    simulated(RTX_4090, RTX_3060)
    pipe = assemble(checkpoint, settled)
    assert pipe.engine.device == torch.device("cuda", 1) and current == [pipe.engine.device]
    assert load("nano").engine.device == torch.device("cuda", 0)


def test_a_card_that_is_named_is_planned_for(simulated: Simulate, tmp_path: Path) -> None:
    simulated(RTX_4090, T4)
    _, machine = placed(Runtime(device="cuda:1"), tmp_path)
    assert machine.gpu_name == "Tesla T4" and machine.gpu_free == int(14.4 * GIB)
    assert machine.rates == GPUS["t4"].rates and not machine.bfloat16
    assert machine.words().startswith("Tesla T4 with 14 GiB (cuda:1 of 2 GPUs)")
    with pytest.raises(RequestError, match="cuda:2.*2 GPUs"):
        placed(Runtime(device="cuda:2"), tmp_path)
    on_cpu, machine = placed(Runtime(device="cpu"), tmp_path)
    assert on_cpu.device == "cpu" and machine.device == ""


def test_a_card_that_another_process_holds_for_itself_is_not_taken(
    simulated: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated(RTX_4090, RTX_3060, driver=False)

    def mem_get_info(index: int) -> tuple[int, int]:
        if index == 0:
            raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")
        return 11 * GIB, 12 * GIB

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    assert choose_device("auto") == torch.device("cuda", 1)


def test_ranks_have_a_card_each_and_the_least_free_counts(
    simulated: Simulate, tmp_path: Path
) -> None:
    asked = simulated(RTX_4090, BUSY_4090, RTX_3060)
    runtime, machine = placed(Runtime(), tmp_path, (0, 1))
    assert runtime.device == "cuda" and machine.device == "", "each rank takes its own"
    assert machine.gpu_name == RTX_4090.name and machine.gpu_free == int(6.0 * GIB)
    assert not asked and not machine.holds_context
    _, machine = placed(Runtime(), tmp_path, (0, 2))
    assert machine.gpu_name == RTX_3060.name
    # Ranks that have begun have found it, with a context of each.
    _, machine = placed(Runtime(device="cuda:0"), tmp_path, range(8), least_free=5 * GIB)
    assert machine.gpu_free == 5 * GIB and machine.holds_context and not asked


def test_gpus_names_cards_by_their_numbers_also_where_cuda_has_counted_them(
    simulated: Simulate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """CUDA reads CUDA_VISIBLE_DEVICES once: later changes would leave the run on GPU 0."""
    simulated(RTX_3060, RTX_4090, BUSY_4090)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    args = SimpleNamespace(gpus="2", device="auto")
    assert devices.parse_gpus(args) is None and args.device == "cuda:2"  # type: ignore[arg-type]
    assert "CUDA_VISIBLE_DEVICES" not in devices.os.environ
    found = devices.parse_gpus(SimpleNamespace(gpus="2,1", device="auto"))  # type: ignore[arg-type]
    assert found is not None and found.devices == (2, 1)
    assert found.environment["CUDA_VISIBLE_DEVICES"] == "2,1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-x,GPU-y,GPU-z")  # and of a scheduler
    found = devices.parse_gpus(SimpleNamespace(gpus="2,0", device="auto"))  # type: ignore[arg-type]
    assert found is not None and found.environment["CUDA_VISIBLE_DEVICES"] == "GPU-z,GPU-x"
    argv = ["plan", "--ckpt_dir", "nano", "--seed", "1", "--json", "--force"]
    assert main([*argv, "--gpus", "2"]) == 0
    machine = json.loads(capsys.readouterr().out)["machine"]
    assert machine["device"] == "cuda:2" and machine["gpu_free"] == int(6.0 * GIB)


def test_threads_work_on_the_device_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    current: dict[str, torch.device] = {}
    monkeypatch.setattr(
        torch.cuda,
        "set_device",
        lambda device: current.update({threading.current_thread().name: device}),
    )
    for device in (torch.device("cuda", 1), torch.device("cpu")):
        with hardware.thread_on(device, f"wanflow-{device.type}") as pool:
            assert pool.submit(lambda: 7).result() == 7
    assert current == {"wanflow-cuda_0": torch.device("cuda", 1)}


def test_a_card_that_no_table_knows_is_measured_with_the_kernel_of_the_run(
    simulated: Simulate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On the CPU in its place: a convolution that a GPU takes longer to do than to launch."""
    simulated(Card("NVIDIA Future 1", 23.5, 23.0))
    seen: list[str] = []
    monkeypatch.setattr(
        measure, "choose_kernel", lambda *_: seen.append("chosen") or BACKENDS["math"]
    )
    rates = Rates(*[1e12] * 5, 1e10, 1e9, 1e-5, "measured")
    monkeypatch.setattr(
        measure, "measured", lambda *how: seen.append(how[-1] is BACKENDS["math"].attend) or rates
    )
    request = Request("any", seed=0, size="64*64", frame_num=5).complete(NANO)
    plan = set_up(published(NANO), request, *placed(Runtime(), tmp_path))
    assert measure.rated(plan).machine.rates == replace(rates, kernel="math")
    assert seen == ["chosen", True]


def test_segments_of_the_allocator_grow_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "max_split_size_mb:64")
        grow_segments()
        assert os.environ[name] == "max_split_size_mb:64"
        monkeypatch.delenv(name)
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    for system, expected in (("win32", None), ("linux", "expandable_segments:True")):
        monkeypatch.setattr(sys, "platform", system)
        grow_segments()
        assert os.environ.get("PYTORCH_ALLOC_CONF") == expected
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
