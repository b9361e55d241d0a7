"""CPU threads: as many as pay and are free, and never another number than the user's."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.common import PROMPT

import wanflow
from wanflow import hardware, threads
from wanflow.models.dit import WanDiT
from wanflow.models.vae import WanVAE
from wanflow.presets import NANO, T2V_A14B


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine of four cores on which nobody has chosen a number of threads."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_the_work_and_the_free_cores_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "free_cores", lambda: 6)
    small, large = 80, 75_600  # tokens of nano's default, and of 1280*720 with 81 frames
    assert threads.threads_for(NANO.dit, small) == 1
    assert threads.threads_for(NANO.dit, 2 * 320) == 2
    assert threads.threads_for(T2V_A14B.dit, large) == 6


def test_a_small_run_asks_nothing_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wanflow.hardware", None)
    assert threads.threads_for(NANO.dit, 80) == 1


def test_nano_computes_on_one_thread_and_leaves_the_users_number(
    undecided: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}

    def note(cls: type, method: str) -> None:
        real = getattr(cls, method)

        def noting(*args: object, **kwargs: object) -> object:
            seen[cls.__name__] = torch.get_num_threads()
            return real(*args, **kwargs)

        monkeypatch.setattr(cls, method, noting)

    note(WanDiT, "forward")
    note(WanVAE, "decode_frames")
    pipe = wanflow.load("nano", device="cpu")
    outside = []
    video = pipe.generate(
        PROMPT,
        frame_num=5,
        sample_steps=2,
        seed=1,
        on_step=lambda _: outside.append(torch.get_num_threads()),
    )
    assert video.frames.shape[0] == 5
    assert seen == {"WanDiT": 1, "WanVAE": 1}
    assert outside == [4, 4] and torch.get_num_threads() == 4


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_number_of_the_environment_stays(
    undecided: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "4")
    with threads.at_most(1):
        assert torch.get_num_threads() == 4


def test_a_number_that_torch_would_not_take_is_the_users(undecided: None) -> None:
    torch.set_num_threads(3)
    with threads.at_most(1):
        assert torch.get_num_threads() == 3


def test_there_are_never_more_threads_than_before(undecided: None) -> None:
    torch.set_num_threads(2)
    with threads.at_most(8):
        assert torch.get_num_threads() == 2
    with pytest.raises(KeyError), threads.at_most(1):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("running", "quota", "free"),
    [(1, "max 100000", 8), (4, "max 100000", 5), (40, "max 100000", 1), (1, "250000 100000", 2)],
)
def test_free_cores_are_those_that_nobody_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, running: int, quota: str, free: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "process_cpu_count", lambda: 8, raising=False)
    monkeypatch.setattr(hardware, "READING_S", 0)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/loadavg").write_text(f"0.20 0.18 0.12 {running}/80 11206\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text(f"{quota}\n")
    assert hardware.free_cores(tmp_path) == free


def test_the_users_limit_of_python_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python 3.13 on, `-X cpu_count` and PYTHON_CPU_COUNT."""
    monkeypatch.setattr(os, "process_cpu_count", lambda: 3, raising=False)
    assert hardware.usable_cores(Path("/nowhere")) == 3
