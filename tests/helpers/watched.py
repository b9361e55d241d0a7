#!/usr/bin/env python3
"""One of several processes that meet in a collective step after step, with what goes wrong in it:
what tests/test_watch.py starts.

    watched.py generate --prompt '{"2": ["bug", 3]}' [--gpus cpu,cpu] [--timeout 5] --save_file STEM

The prompt says for a process what happens at which step; step 0 is before the processes have
joined. STEM.when gets the moment it happened, and STEM.kept the steps that process 0 had done when
its last will was asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from wanflow import cli
from wanflow.cli import launch
from wanflow.config import RequestError
from wanflow.parallel import ranks as mesh
from wanflow.parallel import watchdog as watch
from wanflow.parallel.groups import Layout, make_groups

SIGNALS = {
    "kill": signal.SIGKILL,
    "freeze": signal.SIGSTOP,
    "ctrl-c": signal.SIGINT,
    "term": signal.SIGTERM,
}
ERRORS: dict[str, BaseException] = {
    "request": RequestError("cannot read high.safetensors"),
    "full": OSError(28, "No space left on device"),
    "bug": ZeroDivisionError("nought"),
    "kernel": RuntimeError("a kernel failed"),
}


def happen(what: str, rank: int) -> None:
    if what in ERRORS:
        raise ERRORS[what]
    if what in SIGNALS:
        os.kill(os.getpid(), SIGNALS[what])
    elif what == "starter":
        os.kill(os.getppid(), signal.SIGKILL)
    elif what == "quit":
        os._exit(3)
    elif what == "late":
        time.sleep(600)
    elif what == "deaf":  # waits in a call that no signal ends, for one that never sends
        dist.recv(torch.zeros(1), src=2 - rank)


def work(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    plot = {int(rank): what for rank, what in json.loads(args.prompt).items()}
    rank, size = mesh.rank_and_world_size()
    what, when = plot.get(rank, ("", -1))
    stem, done = Path(args.save_file), 0

    def step(number: int) -> None:
        if number == when:
            stem.with_suffix(".when").write_text(str(time.time()))
            happen(what, rank)

    step(0)
    ranks = mesh.join_group(torch.device("cpu"), args.timeout + watch.LATER)
    team = make_groups(Layout(ulysses=size), ranks)
    args.watch.progress = lambda: sum(team.traffic.calls.values())
    if rank == 0:
        args.watch.last_will = lambda: stem.with_suffix(".kept").write_text(str(done))
    for number in range(1, args.sample_steps + 1):
        step(number)
        team.ulysses.all_gather("step", torch.zeros(1000))
        done = number
        stem.with_suffix(".step").write_text(str(number))
        time.sleep(0.05)
    args.watch.last_will = None
    mesh.leave_group()


def run(argv: list[str], environment: dict[str, str], errors: str, lost: float) -> None:
    """What the script does, with an environment of its own and standard error in a file."""
    os.environ.update(environment)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    watch.LOST = lost
    cli.COMMANDS["generate"] = work
    os._exit(
        cli.main(argv)
    )  # tidying up a copy of all of torch's memory takes longer than all else


def fork() -> None:
    """`run` in many processes, each with arguments out of the list in standard input: this one has
    imported torch for them.

    Writes a line for each that ends: its place in the list, its exit code, and the time.
    """
    places = {}
    for place, given in enumerate(json.load(sys.stdin)):
        pid = os.fork()
        if pid == 0:
            run(*given)
        places[pid] = place
    print(json.dumps({place: pid for pid, place in places.items()}), flush=True)
    while places:
        pid, status = os.wait()
        print(places.pop(pid), os.waitstatus_to_exitcode(status), time.time(), flush=True)


def again(
    argv: list[str],
    processes: launch.Processes,
    command: Sequence[str] = (sys.executable, __file__),
) -> int:
    return start(argv, processes, command)


if __name__ == "__main__":
    if sys.argv[1:] == ["fork"]:
        sys.exit(fork())
    start, launch.launch = launch.launch, again  # whose children are such processes, too
    cli.COMMANDS["generate"] = work
    cli.entry()
