"""The choice of an attention kernel by its time: on simulated GPUs, with a table as clock."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wanflow import assemble, remembered
from wanflow.config import RequestError
from wanflow.parallel import ranks
from wanflow.presets import NANO, T2V_A14B
from wanflow.remembered import Remembered
from wanflow.runtime import Runtime
from wanflow.transforms import attention, attention_timing
from wanflow.transforms.attention import Trial
from wanflow.transforms.attention_kernels import BACKENDS
from wanflow.transforms.attention_timing import (
    BUDGET,
    MOST_TOKENS,
    Width,
    fastest_kernel,
    measure,
    timed_width,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WIDTH = Width(40, 128, torch.bfloat16, MOST_TOKENS)
Tried = list[tuple[str, tuple[int, int, int]]]


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tried]:
    """A Hopper GPU whose kernels take these milliseconds; the others give wrong numbers there."""
    properties = SimpleNamespace(name="H100", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (2**36, 2**36))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)

    def make(packages: tuple[str, ...] = (), no_lse: str = "", **ms: float) -> Tried:
        tried: Tried = []

        def trial(kernel: Any, device: Any, dtype: Any, head_dim: int, *how: Any) -> Trial:
            why = attention.unsupported_reason(kernel, device, dtype, head_dim)
            shape, budget = (*how, 0.0)[:2] if how else (attention.SHAPE, 0.0)
            tried.append((kernel.name, shape))
            works = "" if kernel.name in ms else "it gives wrong numbers"
            seconds = ms.get(kernel.name, 0) / 1e3 * (budget > 0)
            lse_why = "it is wrong" if kernel.name == no_lse else ""
            return Trial(kernel, why or works, lse_why=lse_why, seconds=seconds)

        monkeypatch.setattr(attention, "installed", lambda package: package in packages)
        monkeypatch.setattr(attention, "benchmark", trial)
        return tried

    return make


def test_the_fastest_is_taken_whatever_the_order(
    h100: Callable[..., Tried], caplog: pytest.LogCaptureFixture
) -> None:
    tried = h100(cudnn=3, flash=2, efficient=9, sage=1, math=0.1)
    with caplog.at_level(logging.INFO, "wanflow"):
        assert fastest_kernel(CUDA, WIDTH, Remembered(None)) == "flash"
    assert "cudnn 3 ms, flash 2 ms, efficient 9 ms" in caplog.text
    wide = [name for name, shape in tried if shape == (40, MOST_TOKENS, MOST_TOKENS)]
    assert wide == ["cudnn", "flash", "efficient"]  # neither what rounds nor plain products


def test_an_unsound_kernel_is_not_taken_and_not_timed(h100: Callable[..., Tried]) -> None:
    tried = h100(flash=2, efficient=9)
    assert fastest_kernel(CUDA, WIDTH, Remembered(None)) == "flash"
    assert [shape for name, shape in tried if name == "cudnn"] == [attention.SHAPE]
    h100()
    assert fastest_kernel(CUDA, WIDTH, Remembered(None)) == "auto"


def test_a_ring_takes_the_fastest_with_a_log_sum_exp(
    h100: Callable[..., Tried], tmp_path: Path
) -> None:
    h100(no_lse="flash", cudnn=3, flash=2)
    how = CUDA, torch.bfloat16, False
    alone = Runtime(machine_cache=str(tmp_path))
    for runtime, name in ((alone, "flash"), (replace(alone, ring_size=2), "cudnn")) * 2:
        assert assemble.choose_kernel(T2V_A14B, runtime, *how).name == name


def test_the_choice_is_remembered(
    tmp_path: Path, h100: Callable[..., Tried], monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept() -> Remembered:
        return remembered.of_device(tmp_path, CUDA)

    h100(cudnn=3, flash=2)
    assert fastest_kernel(CUDA, WIDTH, kept()) == "flash"
    tried = h100(cudnn=1, flash=2)
    assert fastest_kernel(CUDA, WIDTH, kept()) == "flash"
    assert tried == [("flash", attention.SHAPE)]  # whether it still works, and no more
    for other in (
        replace(WIDTH, heads=20),
        replace(WIDTH, head_dim=64),
        replace(WIDTH, dtype=torch.float16),
        replace(WIDTH, tokens=5000),
    ):
        assert fastest_kernel(CUDA, other, kept()) == "cudnn", other
    packages = ("flash_attn",)
    h100(packages, cudnn=2, flash=3, flash_attn=1)
    monkeypatch.setattr(attention, "version_of", lambda name: "2.8")
    assert fastest_kernel(CUDA, WIDTH, kept()) == "flash_attn"
    h100(packages, cudnn=2, flash=1, flash_attn=3)
    assert fastest_kernel(CUDA, WIDTH, kept()) == "flash_attn"
    monkeypatch.setattr(attention, "version_of", lambda name: "2.9")
    assert fastest_kernel(CUDA, WIDTH, kept()) == "flash"
    h100(cudnn=3)  # the driver broke what was remembered
    assert fastest_kernel(CUDA, WIDTH, kept()) == "cudnn"


@pytest.mark.parametrize(
    "value", [7, "flash", ["flash"], {"math": 1}, {"flash": "1"}, {"flash": -1}, {"flash": True}]
)
def test_what_is_remembered_may_be_anything(
    tmp_path: Path, h100: Callable[..., Tried], value: object
) -> None:
    h100(cudnn=3, flash=2)
    fastest_kernel(CUDA, WIDTH, remembered.of_device(tmp_path, CUDA))
    (file,) = tmp_path.iterdir()
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "values": dict.fromkeys(content["values"], value)}))
    tried = h100(cudnn=1, flash=2)
    assert fastest_kernel(CUDA, WIDTH, remembered.of_device(tmp_path, CUDA)) == "cudnn"
    assert len(tried) > 1


def test_time_is_bounded_in_total(
    h100: Callable[..., Tried], monkeypatch: pytest.MonkeyPatch
) -> None:
    h100(cudnn=3, flash=2, efficient=9)
    now = iter([0.0, 3.9, 4.1])
    monkeypatch.setattr(attention_timing, "time", SimpleNamespace(monotonic=lambda: next(now)))
    assert [*measure(CUDA, WIDTH, ["cudnn", "flash", "efficient"])] == ["cudnn", "flash"]


def test_calls_are_repeated_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.03, 0.01, 0.02, 0.5])
    monkeypatch.setattr(attention, "seconds_of", lambda call, device: next(times))
    assert attention.shortest(lambda: None, CPU, BUDGET) == 0.01
    assert next(times) == 0.5  # 0.03 + 0.01 + 0.02 were enough
    assert attention.shortest(lambda: None, CPU, 0.0) != 0


def test_a_gpu_is_timed_by_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("record")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 7.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert attention.seconds_of(lambda: done.append("call"), CUDA) == 0.007
    assert done == ["record", "call", "record", "wait"]


@pytest.mark.parametrize(
    ("tokens", "free", "most"),
    [
        (75_600, 80e9, MOST_TOKENS),
        (32_760, 80e9, MOST_TOKENS),
        (1000, 80e9, 1000),
        (75_600, 4e9, 4e9 / 4 / (8 * 40 * 128 * 2)),
    ],
)
def test_a_trial_fits_into_time_and_memory(
    monkeypatch: pytest.MonkeyPatch, tokens: int, free: float, most: float
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (int(free), int(80e9)))
    width = timed_width(CUDA, 40, 128, torch.bfloat16, tokens)
    assert most - 128 < width.tokens <= most
    assert width.tokens % 128 == 80  # as 75,600: no multiple of a tile
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (0, int(80e9)))
    assert timed_width(CUDA, 40, 128, torch.bfloat16, tokens).tokens == 80


def test_a_trial_of_many_heads_and_tokens_is_judged() -> None:
    """By rows of the first and the last head, the last row included."""
    shape = (5, 208, 208)
    good = attention.benchmark(BACKENDS["flash"], CPU, torch.bfloat16, 32, shape, 1e-6)
    assert good.why == good.lse_why == "" and good.seconds > 0

    for spoiled in ((slice(None), -1, 4), (slice(None), slice(None), 0)):

        def attend(q: Any, k: Any, v: Any, where: Any = spoiled) -> Any:
            out = BACKENDS["flash"].attend(q, k, v)
            out[where] += 1
            return out

        bad = attention.benchmark(
            replace(BACKENDS["flash"], attend=attend), CPU, torch.bfloat16, 32, shape
        )
        assert "wrong numbers" in bad.why


# in assemble


def test_only_auto_on_a_gpu_for_a_large_model_is_measured(
    h100: Callable[..., Tried], tmp_path: Path
) -> None:
    tried = h100(cudnn=3, flash=2, efficient=9, sdpa=1)
    runtime = Runtime(machine_cache=str(tmp_path))
    how = CUDA, torch.bfloat16
    assert assemble.choose_kernel(NANO, runtime, *how, True).name == "cudnn"
    named = replace(runtime, attention="efficient")
    assert assemble.choose_kernel(T2V_A14B, named, *how, False).name == "efficient"
    assert assemble.choose_kernel(T2V_A14B, runtime, CPU, torch.bfloat16, False).name == "sdpa"
    assert {shape for _, shape in tried} == {attention.SHAPE} and not list(tmp_path.iterdir())
    assert assemble.choose_kernel(T2V_A14B, runtime, *how, False).name == "flash"
    assert ("flash", (40, MOST_TOKENS, MOST_TOKENS)) in tried and len(list(tmp_path.iterdir())) == 1


def test_without_a_sound_kernel_a_large_model_is_refused(h100: Callable[..., Tried]) -> None:
    h100(sdpa=1, math=1)
    with pytest.raises(RequestError, match="attention cudnn: it gives wrong numbers"):
        assemble.choose_kernel(T2V_A14B, Runtime(), CUDA, torch.bfloat16, False)


def test_all_ranks_take_what_rank_0_measured(
    h100: Callable[..., Tried], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = h100(cudnn=1, flash=2)
    monkeypatch.setattr(ranks, "broadcast_from_rank0", lambda info, make: "flash")
    info = ranks.DistInfo(1, 2, CUDA)
    chosen = assemble.choose_kernel(T2V_A14B, Runtime(), CUDA, torch.bfloat16, False, info)
    assert chosen.name == "flash" and tried == [("flash", attention.SHAPE)]
