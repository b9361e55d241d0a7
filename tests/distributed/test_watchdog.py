"""A run on several ranks that fails: all end in time, one message names rank and cause, and the run
resumes from its saved state.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import watched
from helpers.common import PROMPT

from wanflow.cli import Alone, main
from wanflow.clipfiles import read_frames
from wanflow.parallel import ranks as ranks_module
from wanflow.parallel.watchdog import SILENT, Failure, Watchdog, announce, announced

pytestmark = pytest.mark.distributed
slow = pytest.mark.slow
# From what shows a failure to the end of all processes: 3 s; on a busy machine still less than a
# heartbeat's timeout, which would mean that nobody announced it.
END_S = 28.0
REQUEST = ["--ckpt_dir", "nano", "--frame_num", "5", "--sample_steps", "8", "--seed", "3"]
REQUEST += ["--prompt", PROMPT]
WATCHED = [sys.executable, watched.__file__]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, standard error, and seconds from the failure to the end."""

    code: int
    errors: str
    seconds: float

    @property
    def messages(self) -> list[str]:
        return re.findall(r"^wanflow: (.*)$", self.errors, re.M)


def run(start: str, fail: str, *flags: str, heartbeat_timeout_s: float = 30) -> Ended:
    """Start a run on two ranks and wait for all its processes.

    Args:
        start: "gpus", "torchrun", or "environment": by nothing that watches the ranks.
        fail: what `watched` makes fail.
        flags: of the command, besides the request.
    """
    command = ["generate", *REQUEST, "--ulysses_size", "2", "--save_file", "cut.mp4", *flags]
    environment = os.environ | {"FAIL": fail, "HEARTBEAT_TIMEOUT_S": str(heartbeat_timeout_s)}
    if start == "gpus":
        commands, added = [[*WATCHED, *command, "--gpus", "cpu,cpu"]], [{}]
    elif start == "torchrun":
        commands, added = [[*TORCHRUN, *WATCHED[1:], *command, "--device", "cpu"]], [{}]
    else:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        commands = [[*WATCHED, *command, "--device", "cpu"]] * 2
        added = [{**shared, "RANK": "0"}, {**shared, "RANK": "1"}]
    readable, writable = os.pipe()
    processes = [
        subprocess.Popen(line, env=environment | more, stderr=writable, stdout=subprocess.DEVNULL)
        for line, more in zip(commands, added, strict=True)
    ]
    os.close(writable)
    with open(readable) as pipe:
        errors = pipe.read()  # to the end of all that write there
    ended = time.time()
    codes = [process.wait(60) for process in processes]
    struck = re.search(r"^.*strike ([\d.]+)$", errors, re.M)
    assert struck, errors
    return Ended(max(codes), errors, ended - float(struck[1]))


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The frames of the same request on one process, without a failure."""
    file = tmp_path_factory.mktemp("uncut") / "uncut.mp4"
    assert main(["generate", *REQUEST, "--device", "cpu", "--save_file", str(file)]) == 0
    return read_frames(file)[0]


def check(ended: Ended, code: int, message: str, within_s: float) -> None:
    print(f"{message}: {ended.seconds:.1f} s")
    assert (ended.code, ended.messages) == (code, [message]), ended.errors
    assert ended.seconds < within_s


def check_resumes(ended: Ended, uncut: np.ndarray) -> None:
    """The saved state is all that is left, and gives the same bits on one process."""
    assert os.listdir() == ["cut.latent.safetensors"], ended.errors
    (names,) = re.findall(
        r"stopped at step [1-7] of 8; go on with: wanflow generate (.*)$", ended.errors, re.M
    )
    assert main(["generate", *shlex.split(names), "--device", "cpu"]) == 0
    assert np.array_equal(read_frames(Path("cut.mp4"))[0], uncut)
    assert os.listdir() == ["cut.mp4"]


@pytest.mark.parametrize(
    ("start", "fail", "code", "message"),
    [
        ("gpus", "1 raise 4", 1, "rank 1 of 2: ZeroDivisionError: nought"),
        *(
            pytest.param(*case, marks=slow)
            for case in [
                ("gpus", "1 refuse 4", 2, "rank 1 of 2: cannot read high.safetensors"),
                ("gpus", "1 break 4", 1, "rank 1 of 2: RuntimeError: a kernel failed"),
                ("gpus", "0 raise 4", 1, "rank 0 of 2: ZeroDivisionError: nought"),
                ("gpus", "1 kill 4", 1, "rank 1 of 2: killed by SIGKILL"),
                ("gpus", "1 quit 4", 1, "rank 1 of 2: exit code 3"),
                ("gpus", "1 interrupt-starter 4", 130, "interrupted"),
                ("gpus", "1 terminate 4", 130, "interrupted"),
                ("torchrun", "1 raise 4", 1, "rank 1 of 2: ZeroDivisionError: nought"),
                ("torchrun", "1 kill 4", 1, f"rank 1 of 2: {SILENT}"),
                ("torchrun", "1 interrupt-starter 4", 1, "interrupted"),
                ("environment", "1 raise 4", 1, "rank 1 of 2: ZeroDivisionError: nought"),
            ]
        ),
    ],
)
def test_all_ranks_end_and_the_run_resumes(
    in_tmp: Path, uncut: np.ndarray, start: str, fail: str, code: int, message: str
) -> None:
    ended = run(start, fail)
    check(ended, code, message, END_S)
    assert ended.errors.count("Traceback") <= (2 if start == "torchrun" else "Error:" in message)
    check_resumes(ended, uncut)


@slow
def test_a_frozen_rank_is_named_and_killed(in_tmp: Path, uncut: np.ndarray) -> None:
    ended = run("gpus", "1 freeze 4", heartbeat_timeout_s=3)
    check(ended, 1, f"rank 1 of 2: {SILENT}", 3 + END_S)
    check_resumes(ended, uncut)


@slow
def test_a_rank_that_hangs_is_named(in_tmp: Path, uncut: np.ndarray) -> None:
    ended = run("gpus", "1 hang 4", "--timeout", "5")
    check(ended, 1, "rank 1 of 2: late to a collective by 5 s (--timeout)", 5 + END_S)
    check_resumes(ended, uncut)


@slow
@pytest.mark.parametrize("start", ["gpus", "torchrun"])
def test_ranks_end_without_the_process_that_started_them(
    in_tmp: Path, uncut: np.ndarray, start: str
) -> None:
    ended = run(start, "1 kill-starter 4")
    check(ended, -9, "the process that started the ranks is gone", END_S)
    check_resumes(ended, uncut)


@slow
@pytest.mark.parametrize(
    ("start", "fail", "code", "message"),
    [
        ("gpus", "1 refuse 0", 2, "rank 1 of 2: cannot read high.safetensors"),
        ("gpus", "0 kill 4", 1, "rank 0 of 2: killed by SIGKILL"),
        ("environment", "0 kill 4", 1, f"rank 0 of 2: {SILENT}"),  # which hosts the store
    ],
)
def test_all_ranks_end_where_there_is_no_state(
    in_tmp: Path, start: str, fail: str, code: int, message: str
) -> None:
    check(run(start, fail), code, message, END_S)


@slow
def test_a_run_of_one_process_resumes_on_two(in_tmp: Path, uncut: np.ndarray) -> None:
    command = [*WATCHED, "generate", *REQUEST, "--device", "cpu", "--save_file", "cut.mp4"]
    environment = os.environ | {"FAIL": "0 interrupt 4"}
    assert subprocess.run(command, env=environment, timeout=120).returncode == 130
    again = [sys.executable, "-m", "wanflow", "generate", "--resume", "cut.latent.safetensors"]
    again += ["--gpus", "cpu,cpu", "--ulysses_size", "2"]
    assert subprocess.run(again, timeout=120).returncode == 0
    assert os.listdir() == ["cut.mp4"]
    # The VAE in strips rounds otherwise.
    frames = read_frames(Path("cut.mp4"))[0].astype(np.int16)
    assert np.abs(frames - uncut).mean() < 0.5


@slow
@pytest.mark.parametrize("flag", ["--ckpt_dir /nowhere", "--frame_num 80", "--promt a"])
def test_a_request_that_all_ranks_refuse_names_none(in_tmp: Path, flag: str) -> None:
    command = [*TORCHRUN, "-m", "wanflow", "generate", *REQUEST, "--device", "cpu", *flag.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (message,) = re.findall("^wanflow: (.*)$", done.stderr, re.M)
    assert "rank" not in message, done.stderr
    assert any(word.strip("-") in message for word in flag.split()), done.stderr


# The parts, without processes


def test_the_first_failure_is_the_runs(capsys: pytest.CaptureFixture[str]) -> None:
    store, _ = ranks_module.host_store()
    assert announced(store) is None
    for failure, rank in ((Failure(1, "first"), 2), (Failure(1, "first"), 0), (Failure(1, "b"), 1)):
        announce(store, failure, rank)
    assert announced(store) == Failure(1, "first")
    assert capsys.readouterr().err == "wanflow: first\n"


def test_a_rank_that_was_stopped_itself_blames_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = ranks_module.host_store()
    watchdog, now = Watchdog(store, 0, 2), time.monotonic()
    store.set("beat/1", "1 5")
    for seconds in (0, 0.5, 600):
        monkeypatch.setattr(time, "monotonic", lambda: now + seconds)  # noqa: B023
        watchdog._turn()
        assert watchdog._judge() is None
    for seconds in range(601, 632):
        monkeypatch.setattr(time, "monotonic", lambda: now + seconds)  # noqa: B023
        watchdog._turn()
    assert watchdog._judge() == Failure(1, f"rank 1 of 2: {SILENT}")


def test_alone_the_state_is_saved_and_a_message_printed(capsys: pytest.CaptureFixture[str]) -> None:
    alone, done = Alone(), []
    alone.on_abort = lambda: done.append(1)
    assert alone.fail(1, "the disk is full") == 1
    alone.leave()
    assert done == [1] and alone.on_abort is None
    assert capsys.readouterr().err == "wanflow: the disk is full\n"


@pytest.mark.parametrize(
    ("flags", "token"),
    [
        ("--gpus x", "'x'"),
        ("--gpus ''", "''"),
        ("--gpus 0,,1", "'0,,1'"),
        ("--gpus 0,cpu", "'0,cpu'"),
        ("--gpus 0,0", "twice"),
        ("--gpus 0,99", "no GPU 99"),
        ("--gpus 0,1 --device cpu", "--device cpu"),
        ("--gpus cpu,cpu --device cuda", "--device cuda"),
        ("--gpus cpu,cpu --timeout 0", "0"),
    ],
)
def test_bad_numbers_of_gpus_are_refused(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], flags: str, token: str
) -> None:
    assert main(["generate", "--ckpt_dir", "nano", "--prompt", PROMPT, *shlex.split(flags)]) == 2
    message = capsys.readouterr().err
    assert token in message and message.count("\n") == 1 and "Traceback" not in message


def test_gpus_and_torchrun_do_not_both_start_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ranks_module.DESCRIPTION:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["generate", "--ckpt_dir", "nano", "--prompt", PROMPT, "--gpus", "cpu,cpu"]) == 2
    assert "torchrun" in capsys.readouterr().err


def test_one_device_takes_no_other_process(in_tmp: Path) -> None:
    command = ["generate", *REQUEST, "--frame_num", "1", "--sample_steps", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        assert main([*command, "--save_file", "x.png", "--gpus", "cpu"]) == 0
    assert Path("x.png").exists() and torch.get_num_threads() == 1
