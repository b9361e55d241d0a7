"""How quantised layers multiply: by bytes and FLOPs of each generation, on simulated machines, and
only after a small product was right.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.common import scales_rows
from torch import Tensor

from wanflow.plan.cards import GPUS, capability_of
from wanflow.runtime import QUANTIZATIONS, Quantization
from wanflow.transforms import rounding, ways
from wanflow.transforms.ways import GENERATIONS, ROUNDING, Gpu, Reached, choose_way, way_of

with_rows = pytest.mark.skipif(
    not scales_rows(), reason="no fp8 product with a scale for each row on a CPU"
)

BF16, FP16 = torch.bfloat16, torch.float16
GPU = torch.device("cuda:0")
SIDES = ((5120, 5120), (5120, 13824), (13824, 5120))
TRIAL = ways.fault_of


def chosen(gpu: Gpu | None, dtype: torch.dtype = BF16, sides: tuple[int, int] = SIDES[1]) -> Any:
    return [way_of(mode, dtype, gpu, *sides) for mode in QUANTIZATIONS]


# the table


@pytest.mark.parametrize(
    ("capability", "fp8", "int8"),
    [
        ((7, 0), "weight-only", "weight-only"),
        ((7, 5), "weight-only", "weight-only"),
        ((8, 0), "weight-only", "int_mm"),
        ((8, 6), "weight-only", "int_mm"),
        ((8, 7), "weight-only", "int_mm"),
        ((8, 9), "scaled_mm", "int_mm"),
        ((9, 0), "scaled_mm", "int_mm"),
        ((10, 0), "scaled_mm", "int_mm"),
        ((10, 3), "scaled_mm", "weight-only"),
        ((12, 0), "scaled_mm", "int_mm"),
        ((12, 1), "scaled_mm", "int_mm"),
    ],
)
def test_every_generation_at_the_widths_of_the_model(
    capability: tuple[int, int], fp8: str, int8: str
) -> None:
    for sides in SIDES:
        assert chosen(Gpu(capability), sides=sides) == [fp8, int8, "weight-only"]
        assert set(chosen(Gpu(capability, triton=False), sides=sides)) == {"weight-only"}
        assert chosen(Gpu(capability), FP16, sides) == ["weight-only", int8, "weight-only"]
        assert set(chosen(Gpu(capability), torch.float32, sides)) == {"weight-only"}
        windows = Gpu(capability, platform="win32")
        assert chosen(windows, sides=sides) == ["weight-only", int8, "weight-only"]


def test_sides_decide_too() -> None:
    assert chosen(None) == ["weight-only"] * 3
    # Kernels take multiples of 16 and of 8; narrow layers compute too little to pay for rounding.
    assert chosen(Gpu((9, 0)), sides=(5128, 5128)) == ["weight-only", "int_mm", "weight-only"]
    assert chosen(Gpu((9, 0)), sides=(5124, 5120))[:2] == ["weight-only"] * 2
    assert chosen(Gpu((9, 0)), sides=(160, 320)) == ["weight-only"] * 3


def own_rates(key: str) -> Reached:
    rates = GPUS[key].rates
    return Reached(rates.matmul, rates.low, rates.low, rates.memory)


@pytest.mark.parametrize("key", [key for key in GPUS if capability_of(GPUS[key].name)])
def test_no_known_card_is_slower_by_its_own_rates(key: str) -> None:
    capability = capability_of(GPUS[key].name)
    assert capability
    for mode in ("fp8", "int8"):
        for sides in (*SIDES, (1536, 1536), (1536, 8960), (3072, 3072), (640, 640)):
            way = way_of(mode, BF16, Gpu(capability), *sides)  # type: ignore[arg-type]
            if way != "weight-only":
                both = [
                    ways.seconds(mode, each, own_rates(key), *sides)
                    for each in (way, "weight-only")
                ]  # type: ignore[arg-type]
                assert both[0] < both[1], (mode, sides)
    best = GENERATIONS[max(each for each in GENERATIONS if each <= capability)]
    beside = [rates.bfloat16 / rates.memory for rates in (best, own_rates(key))]
    assert beside[0] >= beside[1] * 0.99 or not best.int8  # the slowest memory of its generation


def test_cards_have_a_capability() -> None:
    assert capability_of("NVIDIA H100 PCIe") == capability_of("H20") == (9, 0)
    assert capability_of("A100") == (8, 0) and capability_of("NVIDIA A10") == (8, 6)
    assert capability_of("AMD MI300X") is capability_of("GPU") is None
    without = {card.name for card in GPUS.values() if capability_of(card.name) is None}
    assert without == {"MI300X"}
    for card in GPUS.values():
        assert card.bfloat16 is not ((capability_of(card.name) or (8, 0)) < (8, 0))


def test_the_guide_shows_these_numbers() -> None:
    guide = Path(__file__).parents[2] / "docs/guides/quantise.md"
    table = guide.read_text(encoding="utf-8").split("| weight-only `fp8` |")[1].split("\n\n")[0]
    cards = {"A100 80 GB": "a100-80gb", "RTX 3090": "rtx3090", "RTX 4090": "rtx4090"} | {
        "H100": "h100-80gb"
    }
    for line in table.splitlines()[2:]:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rates, capability = own_rates(cards[name]), capability_of(GPUS[cards[name]].name)
        assert capability

        def shown(mode: Any, way: Any, rates: Reached = rates) -> str:
            pair = (ways.seconds(mode, way, rates, *sides) for sides in SIDES[1:])
            return str(round(1000 * sum(pair)))

        plain = sum(4 * ways.TOKENS * one * two for one, two in SIDES[1:2]) / rates.bfloat16
        fp8 = shown("fp8", "scaled_mm") if chosen(Gpu(capability))[0] == "scaled_mm" else "-"
        row = [str(round(1000 * plain)), shown("fp8", "weight-only"), fp8, shown("int8", "int_mm")]
        assert cells == row, name
    assert len(table.splitlines()[2:]) == len(cards)


# simulated machines


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    for kept in (ways._trusted, ways._warn):
        kept.cache_clear()
    yield
    for kept in (ways._trusted, ways._warn):
        kept.cache_clear()


class Card:
    """A simulated GPU; its small products run on the CPU."""

    def __init__(self, patch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
        self.tried: list[str] = []
        major, minor = capability
        facts = SimpleNamespace(name="Simulated", total_memory=1 << 34, major=major, minor=minor)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)  # a wheel with CUDA asks
        patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
        patch.setattr(ways.sys, "platform", "linux")
        patch.setattr(ways, "triton_version", lambda: "3.7.1")
        patch.setattr(ways, "fault_of", self.fault_of)

    def fault_of(self, mode: Quantization, dtype: torch.dtype, device: torch.device) -> str:
        assert device == GPU
        self.tried.append(mode)
        return TRIAL(mode, dtype, torch.device("cpu"))


def choose(mode: Quantization, folder: Path | None = None, dtype: torch.dtype = BF16) -> str:
    return choose_way(mode, dtype, GPU, 5120, 13824, folder=str(folder) if folder else None)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@with_rows
def test_run_and_plan_choose_the_same(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], caplog: Any
) -> None:
    card = Card(monkeypatch, capability)
    for mode in QUANTIZATIONS:
        for sides in SIDES:
            run = choose_way(mode, BF16, GPU, *sides)
            planned = choose_way(mode, BF16, torch.device("cpu"), *sides, gpu=Gpu(capability))
            assert run == planned
    assert card.tried == [mode for mode in QUANTIZATIONS if choose(mode) != "weight-only"]
    assert not caplog.records


def test_others_are_weight_only_and_try_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_way("int8", BF16, torch.device("cpu"), 5120, 5120) == "weight-only"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose("fp8") == "weight-only"
    card = Card(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert choose("int8") == choose("fp8") == "weight-only" and not card.tried


def test_windows(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    Card(monkeypatch, (8, 9))
    monkeypatch.setattr(ways.sys, "platform", "win32")
    assert choose("fp8") == "weight-only" and choose("int8") == "int_mm" and not caplog.records
    monkeypatch.setattr(ways, "triton_version", str)
    assert choose("int8") == "weight-only" and "Triton" in caplog.text


def test_a_missing_triton_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    card = Card(monkeypatch, (9, 0))
    monkeypatch.setattr(ways, "triton_version", str)
    assert [choose("fp8"), choose("fp8"), choose("nf4")] == ["weight-only"] * 3
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "pip install triton" in record.getMessage()
    assert not card.tried


def spoilt(codes: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.full((len(codes), weight.shape[1]), float("nan"))


def raises(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("no kernel image\nis available")


WRONG = {
    "fp8": ("_scaled_mm", lambda *args, **how: torch.zeros(len(args[0]), args[1].shape[1])),
    "int8": ("_int_mm", lambda a, b: (a.int() @ b.int()).roll(1, 1)),
}


@pytest.mark.parametrize("mode", ["fp8", "int8"])
@pytest.mark.parametrize("kind", ["raises", "wrong", "not finite", "kernel"])
@with_rows
def test_a_product_that_fails_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any, mode: Any, kind: str
) -> None:
    card = Card(monkeypatch, (9, 0))
    name, wrong = WRONG[mode]
    with monkeypatch.context() as broken:
        if kind == "kernel":
            broken.setattr(rounding, "round_tokens", raises)
        elif kind == "not finite":
            broken.setattr(torch, name, spoilt)
            if mode == "int8":
                broken.setattr(rounding, "scale_sums", lambda *args: args[-1].fill_(float("nan")))
        else:
            broken.setattr(torch, name, raises if kind == "raises" else wrong)
        assert choose(mode, tmp_path) == choose(mode, tmp_path) == "weight-only"
    assert card.tried == [mode]
    (record,) = caplog.records
    words = record.getMessage()
    assert mode in words and "GPU" in words and str(tmp_path) in words and "\n" not in words
    assert ("no kernel image is available" if kind in ("raises", "kernel") else "error of") in words
    # Another process takes the answer from the file, and tells its user too.
    ways._trusted.cache_clear()
    ways._warn.cache_clear()
    assert choose(mode, tmp_path) == "weight-only" and card.tried == [mode]
    assert len(caplog.records) == 2
    for file in tmp_path.iterdir():
        file.unlink()
    ways._trusted.cache_clear()
    assert choose(mode, tmp_path) == ROUNDING[mode] and card.tried == [mode, mode]


def test_the_answer_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any) -> None:
    card = Card(monkeypatch, (8, 9))
    for _ in range(2):
        ways._trusted.cache_clear()
        assert choose("int8", tmp_path, FP16) == choose("int8", tmp_path) == "int_mm"
    assert card.tried == ["int8", "int8"]  # each dtype once
    monkeypatch.setattr(ways, "triton_version", lambda: "3.8.0")
    ways._trusted.cache_clear()
    assert choose("int8", tmp_path) == "int_mm" and len(card.tried) == 3
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())
    found["values"] = {key: {"not": "a text"} for key in found["values"]}
    file.write_text(json.dumps(found))
    ways._trusted.cache_clear()
    assert choose("int8", tmp_path) == "int_mm" and len(card.tried) == 4
    assert not caplog.records


@with_rows
def test_a_full_gpu_says_nothing_of_the_product(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Card(monkeypatch, (9, 0))

    def full(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(torch, "_scaled_mm", full)
        with pytest.raises(torch.OutOfMemoryError):
            choose("fp8", tmp_path)
    assert choose("fp8", tmp_path) == "scaled_mm"
