"""A run on several processes that fails: all end in time, one says which failed and why, and what
was done is kept.

The scenarios are small processes that meet in collectives over gloo, forked and run side by side,
since most of them wait. The launcher and torchrun start real ones.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers import watched
from helpers.common import PROMPT

from wanflow.cli import main
from wanflow.media import read_frames
from wanflow.parallel import ranks as mesh
from wanflow.parallel.watchdog import ALL_END, LOST, Failure, Peer, Watchdog, announce, announced

pytestmark = pytest.mark.distributed
NOISE = "gone without a word: killed, out of memory"
Plot = dict[int, tuple[str, int]]


@dataclass(frozen=True)
class Case:
    """What happens in which of three processes, at which step, and how the run must end."""

    plot: Plot
    said: str
    codes: tuple[int, ...]
    within: float = ALL_END
    kept: str | None = None  # steps
    hosted: bool = True  # process 0 does not hold the store
    flags: tuple[str, ...] = ()
    lost: float = LOST
    traces: int = 0
    frozen: tuple[int, ...] = field(default=())


CASES = {
    "one cannot read": Case(
        {2: ("request", 6)}, "process 2 of 3: cannot read high.safetensors", (2, 2, 2), kept="5"
    ),
    "one cannot read, before it joins": Case(
        {1: ("request", 0)}, "process 1 of 3: cannot read high.safetensors", (2, 2, 2)
    ),
    "all refuse alike": Case(
        dict.fromkeys(range(3), ("request", 0)), "cannot read high.safetensors", (2, 2, 2)
    ),
    "all refuse alike, later": Case(
        dict.fromkeys(range(3), ("request", 6)), "cannot read high.safetensors", (2, 2, 2), kept="5"
    ),
    "a disk is full": Case(
        {1: ("full", 6)}, "process 1 of 3: [Errno 28] No space left on device", (1, 1, 1), kept="5"
    ),
    "the first fails": Case(
        {0: ("full", 6)}, "process 0 of 3: [Errno 28] No space left on device", (1, 1, 1), kept="5"
    ),
    "the first fails, and holds the store": Case(
        {0: ("bug", 6)},
        "process 0 of 3: ZeroDivisionError: nought",
        (1, 1, 1),
        kept="5",
        hosted=False,
        traces=1,
    ),
    "a bug": Case(
        {2: ("bug", 6)}, "process 2 of 3: ZeroDivisionError: nought", (1, 1, 1), kept="5", traces=1
    ),
    "an error like those of a broken connection": Case(
        {2: ("kernel", 6)},
        "process 2 of 3: RuntimeError: a kernel failed",
        (1, 1, 1),
        kept="5",
        traces=1,
    ),
    "one is killed": Case({2: ("kill", 6)}, f"process 2 of 3: {NOISE}", (1, 1, -9), kept="5"),
    "the first is killed": Case({0: ("kill", 6)}, f"process 0 of 3: {NOISE}", (-9, 1, 1)),
    "who holds the store is killed": Case(
        {0: ("kill", 6)}, f"process 0 of 3: {NOISE}", (-9, 1, 1), hosted=False
    ),
    "one ends by itself": Case({1: ("quit", 6)}, f"process 1 of 3: {NOISE}", (1, 3, 1), kept="5"),
    "one is frozen": Case(
        {1: ("freeze", 6)},
        "process 1 of 3: no sign of life for 2 s: killed, out of memory, or frozen",
        (1, -9, 1),
        2 + ALL_END,
        "5",
        lost=2,
        frozen=(1,),
    ),
    "one does not join": Case(
        {1: ("late", 6)},
        "process 1 of 3: did not join the others, who waited for 5 s (--timeout)",
        (1, 1, 1),
        5 + ALL_END,
        "5",
        flags=("--timeout", "5"),
    ),
    "two are stuck when the third fails": Case(
        {0: ("deaf", 6), 1: ("request", 6), 2: ("deaf", 6)},
        "process 1 of 3: cannot read high.safetensors",
        (2, 2, 2),
        kept="5",
    ),
    "one is interrupted": Case({1: ("ctrl-c", 6)}, "interrupted", (130, 130, 130), kept="5"),
    "all are interrupted": Case(
        dict.fromkeys(range(3), ("ctrl-c", 6)), "interrupted", (130, 130, 130), kept="5"
    ),
    "one is told to end": Case({1: ("term", 6)}, "interrupted", (130, 130, 130), kept="5"),
    "all goes well": Case({}, "", (0, 0, 0)),
    "all goes well, with the store in process 0": Case({}, "", (0, 0, 0), hosted=False),
}


def arguments(case: Case, stem: Path, port: int) -> list[list[object]]:
    """For each of its processes, what `watched.run` takes."""
    plot = json.dumps({str(rank): what for rank, what in case.plot.items()})
    argv = [
        "generate",
        "--prompt",
        plot,
        "--sample_steps",
        "10",
        "--save_file",
        str(stem),
        *case.flags,
    ]
    shared = {
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": str(case.hosted),
    }
    return [
        [argv, {**shared, "RANK": str(rank)}, str(stem.with_suffix(".err")), case.lost]
        for rank in range(3)
    ]


def play(folder: Path) -> dict[str, Any]:
    """All scenarios at once; when each ended, and how."""
    stores = [mesh.host_store() for case in CASES.values() if case.hosted]
    ports = iter([port for _, port in stores])
    free = iter(free_ports(sum(not case.hosted for case in CASES.values())))
    cases = list(CASES.items())
    given = [
        line
        for n, (_, case) in enumerate(cases)
        for line in arguments(case, folder / str(n), next(ports if case.hosted else free))
    ]
    forks = subprocess.Popen(
        [sys.executable, watched.__file__, "fork"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert forks.stdin is not None and forks.stdout is not None
    forks.stdin.write(json.dumps(given))
    forks.stdin.close()
    pids = {int(place): pid for place, pid in json.loads(forks.stdout.readline()).items()}
    alarm = threading.Timer(120, lambda: [os.kill(pid, signal.SIGKILL) for pid in pids.values()])
    alarm.start()
    ended: dict[str, Any] = {name: {"codes": {}, "at": 0.0} for name in CASES}
    while line := forks.stdout.readline():
        place, code, at = line.split()
        pids.pop(int(place))
        (name, case), rank = cases[int(place) // 3], int(place) % 3
        ended[name]["codes"][rank] = int(code)
        ended[name]["at"] = max(ended[name]["at"], float(at))
        left = set(range(3)) - set(ended[name]["codes"])
        if left and left <= set(case.frozen):  # which do not even end themselves
            os.kill(pids[int(place) - rank + min(left)], signal.SIGKILL)
    alarm.cancel()
    return ended


def free_ports(count: int) -> list[int]:
    import socket

    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="session")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "watch"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "ended.json").exists():
            (folder / "ended.json").write_text(json.dumps(play(folder)))
    return folder, json.loads((folder / "ended.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_all_end_in_time_and_one_says_why(played: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, ended = played
    case, stem = CASES[name], folder / str(list(CASES).index(name))
    said = stem.with_suffix(".err").read_text()
    assert ended[name]["codes"] == {str(rank): code for rank, code in enumerate(case.codes)}, said
    assert re.findall("^wanflow: (.*)$", said, re.M) == ([case.said] if case.said else []), said
    assert said.count("Traceback") == case.traces, said
    if case.plot:
        took = ended[name]["at"] - float(stem.with_suffix(".when").read_text())
        print(f"{name}: {took:.1f} s")
        assert took < case.within
    kept = stem.with_suffix(".kept")
    assert (kept.read_text() if kept.exists() else None) == case.kept


# --- the parts, without processes
# ------------------------------------------------------------------------------------------


def test_the_first_failure_is_the_one() -> None:
    store, _ = mesh.host_store()
    assert announced(store) is None
    assert announce(store, Failure(2, 1, "first"), 2)
    assert not announce(store, Failure(2, 1, "first"), 0)
    assert not announce(store, Failure(1, 1, "second"), 1)
    assert announced(store) == Failure(2, 1, "first")


def test_a_process_that_was_stopped_itself_has_not_waited() -> None:
    peer = Peer()
    peer.look("1 5", 1.0)
    peer.look("1 5", 1.0)
    assert (peer.silent, peer.still, peer.entered) == (1.0, 1.0, 5)
    peer.look("2 5", 1.0)
    assert (peer.silent, peer.still) == (0.0, 2.0)
    peer.look("left", 1.0)
    assert peer.left and peer.entered == 5


def test_alone_there_is_a_last_will_and_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    watch, done = Watchdog(), []
    watch.last_will = lambda: done.append(1)
    assert watch.fail(1, "the disk is full") == 1
    watch.leave()
    assert done == [1] and watch.last_will is None
    assert capsys.readouterr().err == "wanflow: the disk is full\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--gpus x", "no list of GPUs"),
        ("--gpus ''", "no list of GPUs"),
        ("--gpus 0,,1", "no list of GPUs"),
        ("--gpus 0,cpu", "no list of GPUs"),
        ("--gpus 0,0", "names a GPU twice"),
        ("--gpus 0,99", "has no GPU 99"),
        ("--gpus 0,1 --device cpu", "do not go together"),
        ("--gpus cpu,cpu --device cuda", "do not go together"),
        ("--gpus cpu,cpu --timeout 0", "no number of seconds above 0"),
    ],
)
def test_bad_numbers_of_gpus_are_refused(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], flags: str, words: str
) -> None:
    assert main(["generate", "--ckpt_dir", "nano", "--prompt", PROMPT, *shlex.split(flags)]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and "Traceback" not in said


def test_gpus_and_torchrun_do_not_both_start_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in mesh.DESCRIPTION:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["generate", "--ckpt_dir", "nano", "--prompt", PROMPT, "--gpus", "cpu,cpu"]) == 2
    assert "torchrun" in capsys.readouterr().err


# --- started by the launcher, and by torchrun
# --------------------------------------------------------------------------------

NANO = [
    "--ckpt_dir",
    "nano",
    "--frame_num",
    "33",
    "--sample_steps",
    "40",
    "--prompt",
    PROMPT,
    "--seed",
    "3",
]
WANFLOW = [sys.executable, "-m", "wanflow", "generate"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def children(process: subprocess.Popen[str]) -> list[int]:
    found = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout
    return [int(line.split()[0]) for line in found.splitlines() if "generate" in line]


def cut(command: list[str], strike: str) -> tuple[int, str, float]:
    """Run, strike after the second report on steps, and wait for the end: exit code, what was said
    then, and seconds until all ended.
    """
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if line.startswith("denoising: step"):
            break
    assert process.poll() is None, said
    began = time.monotonic()
    if strike == "kill one":
        os.kill(children(process)[1], signal.SIGKILL)
    elif strike == "kill the parent":
        process.kill()
    elif strike == "ctrl-c":
        process.send_signal(signal.SIGINT)
    elif strike == "ctrl-c for all":
        for pid in [*children(process), process.pid]:
            os.kill(pid, signal.SIGINT)
    rest = process.stderr.read()  # to the end of all that write there
    return process.wait(60), rest, time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "strike", "code", "words"),
    [
        (
            "gpus",
            "kill one",
            1,
            "process 1 of 2: killed by SIGKILL, by somebody or for want of memory",
        ),
        ("gpus", "kill the parent", -9, "what started the processes of this run is gone"),
        ("gpus", "ctrl-c", 130, "interrupted"),
        ("gpus", "ctrl-c for all", 130, "interrupted"),
        ("torchrun", "kill one", 1, f"process 1 of 2: {NOISE}"),
        ("torchrun", "kill the parent", -9, "what started the processes of this run is gone"),
        ("torchrun", "ctrl-c", 1, "interrupted"),
    ],
)
def test_a_run_that_was_cut_goes_on_with_another_number_of_processes(
    in_tmp: Path, start: str, strike: str, code: int, words: str
) -> None:
    script = str(Path(__file__).parents[2] / "generate.py")
    first = (
        [*WANFLOW, "--gpus", "cpu,cpu"]
        if start == "gpus"
        else [*TORCHRUN, script, "--device", "cpu"]
    )
    ended, said, took = cut([*first, *NANO, "--save_file", "cut.mp4"], strike)
    print(f"{start}, {strike}: {took:.1f} s")
    assert (ended, re.findall("^wanflow: (.*)$", said, re.M)) == (code, [words]), said
    assert took < ALL_END
    assert [file.name for file in in_tmp.iterdir()] == ["cut.latent.safetensors"]
    (names,) = re.findall(
        r"^stopped at step \d+ of 40; go on with: wanflow generate (.*)$", said, re.M
    )
    assert main(["generate", *shlex.split(names), "--device", "cpu"]) == 0
    assert main(["generate", *NANO, "--device", "cpu", "--save_file", "whole.mp4"]) == 0
    cut_, whole = (read_frames(Path(name))[0].astype(np.int16) for name in ("cut.mp4", "whole.mp4"))
    assert (
        np.abs(cut_ - whole).mean() < 0.5
    )  # of 255: other sums round otherwise, and H.264 makes a little more of it
    assert not list(in_tmp.glob("*.safetensors"))


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two(in_tmp: Path) -> None:
    ended, said, _ = cut([*WANFLOW, "--device", "cpu", *NANO, "--save_file", "cut.mp4"], "ctrl-c")
    assert ended == 130, said
    again = subprocess.run(
        [*WANFLOW, "--gpus", "cpu,cpu", "--resume", "cut.latent.safetensors"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert again.returncode == 0, again.stderr
    assert [file.name for file in in_tmp.iterdir()] == ["cut.mp4"]


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--ckpt_dir /nowhere", "--frame_num 80", "--promt a"])
def test_a_bad_request_to_torchrun_is_said_once(in_tmp: Path, flag: str) -> None:
    script = str(Path(__file__).parents[2] / "generate.py")
    done = subprocess.run(
        [*TORCHRUN, script, *NANO, "--device", "cpu", *flag.split()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    (said,) = re.findall("^wanflow: (.*)$", done.stderr, re.M)
    assert ("process" not in said and flag.split()[-1].strip("-") in said) or flag.split()[
        0
    ] in said, done.stderr


@pytest.mark.slow
def test_the_launcher_says_what_no_process_can(in_tmp: Path) -> None:
    for what, words in (
        ("quit", "ended with exit code 3 and without a word"),
        ("kill", "killed by SIGKILL, by somebody or for want of memory"),
    ):
        argv = [
            sys.executable,
            watched.__file__,
            "generate",
            "--prompt",
            json.dumps({"1": [what, 0]}),
            "--gpus",
            "cpu,cpu",
        ]
        done = subprocess.run(
            [*argv, "--sample_steps", "5", "--save_file", "x"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 1
        assert re.findall("^wanflow: (.*)$", done.stderr, re.M) == [f"process 1 of 2: {words}"], (
            done.stderr
        )


def test_one_device_takes_no_other_process(in_tmp: Path) -> None:
    argv = [
        "generate",
        "--ckpt_dir",
        "nano",
        "--frame_num",
        "1",
        "--sample_steps",
        "1",
        "--prompt",
        PROMPT,
        "--save_file",
        "x.png",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        assert main([*argv, "--gpus", "cpu"]) == 0
    assert Path("x.png").exists() and torch.get_num_threads() == 1
