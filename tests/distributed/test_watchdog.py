"""A run on several ranks that fails: all end in time, one message names rank and cause, and the run
resumes from its saved state.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import watched
from helpers.common import PROMPT
from torch.distributed import HashStore  # type: ignore[attr-defined]

import wanflow
from wanflow.cli import main
from wanflow.cli.ending import Alone
from wanflow.clipfiles import read_frames
from wanflow.config import RequestError
from wanflow.parallel import ranks as ranks_module
from wanflow.parallel.watchdog import SILENT, Failure, Watchdog, announce, announced

pytestmark = pytest.mark.distributed
slow = pytest.mark.slow
# From what shows a failure to the end of all processes: 3 s; on a busy machine still less than a
# heartbeat's timeout, which would mean that nobody announced it.
END_S, BEAT_S = 115.0, 120.0
REQUEST = ["--ckpt_dir", "nano", "--frame_num", "5", "--sample_steps", "8", "--seed", "3"]
REQUEST += ["--prompt", PROMPT]
RAN_OUT = (
    "rank 1 of 2: out of memory in a denoising step: CUDA out of memory. Tried to allocate 2.00"
    " GiB; --offload_model True, --resident_blocks, --quantize fp8 take less, and last a smaller"
    " --size or fewer frames"
)
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


def run(start: str, fail: str, *flags: str, heartbeat_timeout_s: float = BEAT_S) -> Ended:
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
    codes = [process.wait(120) for process in processes]
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
    (command,) = re.findall(
        r"stopped at step [1-7] of 8; go on with: (.*wanflow generate .*)$", ended.errors, re.M
    )
    words = shlex.split(command)
    started = words[: words.index("wanflow")]
    assert started in ([], ["torchrun", "--nproc_per_node=2", "-m"])
    names = words[words.index("generate") :]
    for flag in {"--gpus", "--ulysses_size"} & set(names):  # one process goes on as well
        del names[names.index(flag) : names.index(flag) + 2]
    assert main(names) == 0
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
                ("gpus", "1 memory 4", 1, RAN_OUT),
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
    # Rank 0 prints the command, and another rank ran out.
    assert ("--offload_model True" in ended.errors.split("go on with")[1]) == (message == RAN_OUT)
    assert ended.errors.count("Traceback") <= (2 if start == "torchrun" else "Error:" in message)
    check_resumes(ended, uncut)


@slow
def test_a_frozen_rank_is_named_and_killed(in_tmp: Path, uncut: np.ndarray) -> None:
    ended = run("gpus", "1 freeze 4", heartbeat_timeout_s=6)
    check(ended, 1, f"rank 1 of 2: {SILENT}", 6 + END_S)
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
    assert subprocess.run(command, env=environment, timeout=300).returncode == 130
    again = [sys.executable, "-m", "wanflow", "generate", "--resume", "cut.latent.safetensors"]
    again += ["--gpus", "cpu,cpu", "--ulysses_size", "2"]
    assert subprocess.run(again, timeout=300).returncode == 0
    assert os.listdir() == ["cut.mp4"]
    # The VAE in strips rounds otherwise.
    frames = read_frames(Path("cut.mp4"))[0].astype(np.int16)
    assert np.abs(frames - uncut).mean() < 0.5


@slow
@pytest.mark.parametrize("flag", ["--ckpt_dir /nowhere", "--frame_num 80", "--promt a"])
def test_a_request_that_all_ranks_refuse_names_none(in_tmp: Path, flag: str) -> None:
    command = [*TORCHRUN, "-m", "wanflow", "generate", *REQUEST, "--device", "cpu", *flag.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
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


def test_a_machine_that_does_not_reach_itself_is_named_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(*_: object) -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    with pytest.raises(RequestError, match="Network is unreachable.*ip link set lo up"):
        ranks_module.host_store()


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


@pytest.mark.parametrize(
    ("environment", "token"),
    [
        ({"RANK": "one"}, "RANK is 'one'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '999"),
        ({"WORLD_SIZE": "1000000000"}, "from 1 to 65,536"),
        ({"WORLD_SIZE": "\u0662"}, "WORLD_SIZE is"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, and WORLD_SIZE is 2"),
        ({"RANK": "1"}, "RANK is 1, and WORLD_SIZE is 1"),
        ({"LOCAL_RANK": "\x1b[31m", "WORLD_SIZE": "2"}, "LOCAL_RANK is"),
        ({"LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}, "LOCAL_RANK is 4"),
        ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE is 4"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"MASTER_PORT": "70000"}, "from 1 to 65,535"),
    ],
)
def test_an_environment_that_describes_no_ranks_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    token: str,
) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", *ranks_module.DESCRIPTION)
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["generate", "--ckpt_dir", "nano", "--prompt", PROMPT]) == 2
    message = capsys.readouterr().err
    assert token in message and message.count("\n") == 1 and "\x1b" not in message


def test_a_server_that_never_answers_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ranks_module, "MARGIN_S", 0.1)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        described = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (described | {"MASTER_PORT": str(silent.getsockname()[1])}).items():
            monkeypatch.setenv(name, value)
        began = time.monotonic()
        assert main(["generate", *REQUEST, "--timeout", "0.3"]) == 1
        monkeypatch.setattr(ranks_module, "JOIN_S", 0.2)
        with pytest.raises(ConnectionError, match="cannot reach rank 0 at 127.0.0.1"):
            wanflow.load("nano", device="cpu")
    assert time.monotonic() - began < 50  # without either limit: a minute
    message = capsys.readouterr().err
    assert "rank 1 of 2: cannot reach rank 0" in message and "within 0.3 s" in message
    assert "check MASTER_ADDR" in message and message.count("wanflow: ") == 1


def test_ranks_with_different_commands_are_refused() -> None:
    store = HashStore()
    first, second = (Watchdog(store, rank, 2) for rank in range(2))
    first.command, second.command = (
        ["wanflow 1", "generate", "--seed", seed] for seed in ("3", "4\x1b")
    )
    assert second._other_command() is None  # rank 0 has said nothing yet
    store.set("command", json.dumps(first.command))
    assert first._other_command() is None
    failure = second._other_command()
    assert failure is not None and failure.code == 2
    assert failure.message == (
        "rank 1 of 2: its command has 4\N{REPLACEMENT CHARACTER} where that of rank 0 has 3; give"
        " every rank the same"
    )


def test_a_rank_begins_nothing_before_its_command_is_that_of_rank_0() -> None:
    store = HashStore()
    second = Watchdog(store, 1, 2)
    second.command = ["wanflow 1", "generate"]
    agreed = threading.Thread(target=second.agree, daemon=True)
    agreed.start()
    assert second._other_command() is None
    agreed.join(0.2)
    assert agreed.is_alive()
    store.set("command", json.dumps(second.command))
    assert second._other_command() is None
    agreed.join(60)
    assert not agreed.is_alive()


def test_a_rank_that_never_joins_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    watchdog = Watchdog(HashStore(), 0, 2, join_s=2.0)
    times = iter([0.0, 0.9, 1.8, 2.7])
    watchdog._looked = next(times)
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    watchdog._turn()
    watchdog._turn()
    assert watchdog._judge() is None
    watchdog._turn()
    assert watchdog._judge() == Failure(
        1, "rank 1 of 2: has not joined within 2 s (--timeout waits longer)"
    )


@slow
def test_two_started_with_different_commands_end_at_once(in_tmp: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    began = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "wanflow", "generate", *REQUEST, "--fps", str(5 + rank)],
            env=os.environ | shared | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    assert "rank 1 of 2: its command has 6 where that of rank 0 has 5" in "".join(said)
    assert time.monotonic() - began < END_S
    assert not os.listdir()


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
