"""Ctrl-C, SIGTERM and SIGHUP: the state is saved, the command that goes on is printed, exit 130."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import stuck
from helpers.common import PROMPT

from wanflow.cli import ending, main
from wanflow.loaders.parts import LoadedParts
from wanflow.media import VideoWriter
from wanflow.models.dit import WanDiT
from wanflow.models.vae import WanVAE
from wanflow.pipeline import Run

MAKE = ["generate", "--ckpt_dir", "nano", "--device", "cpu", "--frame_num", "5"]
MAKE += ["--sample_steps", "4", "--prompt", PROMPT, "--seed", "7", "--save_file", "a.mp4"]
STATE = "a.latent.safetensors"
NOTHING = "wanflow: interrupted: no step was complete, so there is nothing to save\n"


def striking(patch: pytest.MonkeyPatch, cls: type, method: str, number: int, call: int = 1) -> None:
    """Send this process a signal when a method is called for the nth time."""
    real: Callable[..., Any] = getattr(cls, method)
    calls = []

    def struck(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(number)
        return real(*args, **kwargs)

    patch.setattr(cls, method, struck)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_in_a_step_keeps_the_state(
    name: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patch:
        striking(patch, WanDiT, "forward", number, call=3)
        assert main(MAKE) == 130
    said = capsys.readouterr().err
    assert os.listdir() == [STATE]
    assert Run.load(STATE).state.index == 2
    assert "Traceback" not in said and said.endswith("wanflow: interrupted\n")
    (command,) = re.findall(r"stopped at step 2 of 4; go on with: wanflow (.*)$", said, re.M)
    assert signal.getsignal(number) is before
    assert main(shlex.split(command)) == 0
    assert os.listdir() == ["a.mp4"]


@pytest.mark.parametrize(
    ("cls", "method"), [(LoadedParts, "__init__"), (WanDiT, "forward")], ids=["loading", "step 1"]
)
def test_a_signal_before_a_step_is_complete_says_that_nothing_is_saved(
    cls: type, method: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        striking(patch, cls, method, signal.SIGTERM)
        assert main(MAKE) == 130
    assert capsys.readouterr().err.endswith(NOTHING)
    assert not os.listdir()


@pytest.mark.parametrize(
    ("cls", "method"), [(WanVAE, "decode_frames"), (VideoWriter, "write")], ids=["decode", "encode"]
)
def test_a_signal_after_the_last_step_keeps_the_finished_latent(
    cls: type, method: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        striking(patch, cls, method, signal.SIGHUP)
        assert main(MAKE) == 130
    said = capsys.readouterr().err
    assert os.listdir() == [STATE]
    (command,) = re.findall(r"finish it with: wanflow (decode .*)$", said, re.M)
    with pytest.MonkeyPatch.context() as patch:  # and once more, while it is decoded
        striking(patch, cls, method, signal.SIGINT)
        assert main(shlex.split(command)) == 130
    assert f"the finished latent is stored in {STATE}" in capsys.readouterr().err
    assert main(shlex.split(command)) == 0
    assert os.listdir() == ["a.mp4"]


def test_a_signal_while_a_saved_run_is_loaded_leaves_it(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        striking(patch, WanDiT, "forward", signal.SIGINT, call=3)
        assert main(MAKE) == 130
        saved = Path(STATE).read_bytes()
        striking(patch, LoadedParts, "__init__", signal.SIGINT)
        assert main(["generate", "--resume", STATE]) == 130
    assert f"interrupted: {STATE} is as it was" in capsys.readouterr().err
    assert Path(STATE).read_bytes() == saved


def test_what_a_library_makes_of_an_interruption_is_one(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrapping(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("numpy could not be imported") from None

    monkeypatch.setattr(WanDiT, "forward", wrapping)
    assert main(MAKE) == 130
    assert capsys.readouterr().err.endswith(NOTHING)


def test_a_signal_that_is_ignored_stays_ignored(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`nohup wanflow generate ...`, or a job in the background of a script."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        striking(monkeypatch, WanDiT, "forward", signal.SIGHUP, call=2)
        assert main(MAKE) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# In processes of their own, whose main thread hears nothing


def start(step: int, **environ: str) -> subprocess.Popen[str]:
    """Start a run that is stuck from a forward on, and wait until it is."""
    process = subprocess.Popen(
        [sys.executable, stuck.__file__, str(step), *MAKE],
        env={**os.environ, **environ},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line == "stuck\n":
            break
    time.sleep(1)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_is_noticed_in_ten_seconds_in_one_long_operation(
    name: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start(3)
    began = time.monotonic()
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=120)
    print(f"{name}: {time.monotonic() - began:.1f} s to the end")
    assert max(ending.STUCK_S, ending.UNWINDING_S) < 10
    assert time.monotonic() - began < 60  # a busy machine adds to them; the operation takes minutes
    assert process.returncode == 130, said
    assert os.listdir() == [STATE]
    (command,) = re.findall(r"stopped at step 2 of 4; go on with: wanflow (.*)$", said, re.M)
    assert main(shlex.split(command)) == 0
    assert os.listdir() == ["a.mp4"]


@pytest.mark.slow
def test_before_the_first_step_nothing_is_kept_in_one_long_operation(in_tmp: Path) -> None:
    process = start(1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and said.endswith(NOTHING)
    assert not os.listdir()


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(in_tmp: Path) -> None:
    process = start(3, PATIENT="1")  # after the first alone it would live on for minutes
    process.send_signal(signal.SIGINT)
    time.sleep(ending.AGAIN_S + 2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "ended at once" in said
