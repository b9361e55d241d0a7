"""`--gpus 0,1,2,3`: one video by several processes on this machine, started, watched and ended from
here.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wanflow.config import RequestError
from wanflow.parallel.watchdog import ALL_END, INTERRUPTED, Failure, Store, announce, announced, say

LOOK = 0.1  # seconds
OURSELVES = (sys.executable, "-P", "-m", "wanflow")


@dataclass(frozen=True)
class Processes:
    """How many to start, what their environment gets, and their flags beside those that were
    given.
    """

    count: int
    environment: dict[str, str]
    flags: tuple[str, ...]


def prepare(args: argparse.Namespace) -> Processes | None:
    """What `--gpus` asks for; None where it is one device, which this process then takes.

    Raises:
        RequestError: for devices that are not there, named twice, or at odds with other flags and
            torchrun.
    """
    names = [name.strip() for name in args.gpus.split(",")]
    device = getattr(args, "device", "auto")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RequestError(
            "--gpus starts the processes itself; leave it out under torchrun, or leave torchrun out"
        )
    flags: tuple[str, ...] = ()
    if set(names) == {"cpu"}:
        if device not in ("auto", "cpu"):
            raise RequestError(
                f"--gpus {args.gpus} and --device {device} do not go together; leave one out"
            )
        visible = ""
        if hasattr(
            args, "device"
        ):  # replay and decode take the recipe's device where it is visible
            args.device, flags = "cpu", ("--device", "cpu")
    else:
        if device not in ("auto", "cuda"):
            raise RequestError(
                f"--gpus {args.gpus} and --device {device} do not go together; several CPU"
                " processes are --gpus cpu,cpu"
            )
        visible = _visible(args.gpus, names)
    if len(names) == 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
        return None
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // len(names)))
    return Processes(
        len(names), {"CUDA_VISIBLE_DEVICES": visible, "OMP_NUM_THREADS": threads}, flags
    )


def _visible(given: str, names: list[str]) -> str:
    """CUDA_VISIBLE_DEVICES for GPUs by their numbers, which count among those that are visible
    now.
    """
    if not all(name.isdecimal() for name in names):
        raise RequestError(
            f"--gpus {given!r} is no list of GPUs, such as 0,1,2,3 (or cpu,cpu for two processes on"
            " the CPU)"
        )
    ids = [int(name) for name in names]
    if len(set(ids)) < len(ids):
        raise RequestError(f"--gpus {given} names a GPU twice; each process needs its own")
    import torch

    there = torch.cuda.device_count()
    if max(ids) >= there:
        has = (
            f"its GPUs are 0 to {there - 1}"
            if there > 1
            else "it has one GPU, 0"
            if there
            else "it has none"
        )
        raise RequestError(f"--gpus {given}: this machine has no GPU {max(ids)}; {has}")
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return ",".join(seen[number] if seen else str(number) for number in ids)


def launch(argv: list[str], processes: Processes, command: Sequence[str] = OURSELVES) -> int:
    """Start the processes, wait for them, and return the exit code of the run: that of its first
    failure.

    Ctrl-C and SIGTERM end all. They are told through the store: a process in a session of its own
    does not hear the terminal, and so hears of it once. What has not ended `ALL_END` seconds after
    a failure is killed.

    Args:
        argv: the command line; the processes get it without `--gpus`.
        processes: how many, and with what.
        command: what each of them runs.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from wanflow.parallel.ranks import host_store

    store, port = host_store()
    package = str(Path(__file__).parents[2])
    shared = {
        **os.environ,
        **processes.environment,
        "WORLD_SIZE": str(processes.count),
        "LOCAL_WORLD_SIZE": str(processes.count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
    }
    command = [*command, *_without_gpus(argv), *processes.flags]
    stops: list[int] = []
    before = {
        number: signal.signal(number, lambda told, _: stops.append(told))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    children: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(processes.count):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            children.append(subprocess.Popen(command, env=environment, start_new_session=True))
        return _wait(store, children, stops)
    finally:
        for child in children:
            child.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(store: Store, children: list[subprocess.Popen[bytes]], stops: list[int]) -> int:
    """Until all have ended; says itself only what no process could."""
    failure: Failure | None = None
    until = float("inf")
    while True:
        ended = all(child.poll() is not None for child in children)
        if failure is None:
            failure, found = announced(store), _failure(children, stops)
            if failure is None and found is not None:
                mine = announce(store, found, -1)
                failure = found if mine else announced(store)
                if mine:
                    say(f"wanflow: {found.line(len(children))}")
            if failure is not None:
                until = time.monotonic() + ALL_END
        if ended or time.monotonic() > until:
            return failure.code if failure is not None else 0
        time.sleep(LOOK)


def _failure(children: list[subprocess.Popen[bytes]], stops: list[int]) -> Failure | None:
    """What is seen from here: a process that ended without a word, or that all shall end."""
    for rank, child in enumerate(children):
        code = child.poll()
        if code is not None and code < 0:
            reason = ", by somebody or for want of memory" if code == -signal.SIGKILL else ""
            return Failure(rank, 1, f"killed by {signal.Signals(-code).name}{reason}")
        if code:
            return Failure(rank, 1, f"ended with exit code {code} and without a word")
    return INTERRUPTED if stops else None


def _without_gpus(argv: list[str]) -> list[str]:
    where = [index for index, word in enumerate(argv) if word == "--gpus"]
    return [
        word
        for index, word in enumerate(argv)
        if index not in where and index - 1 not in where and not word.startswith("--gpus=")
    ]
