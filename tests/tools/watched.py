#!/usr/bin/env python3
"""One of several processes that meet in all_reduce step after step, with what goes wrong in it: what tests/test_watch.py starts.

    watched.py generate --prompt '{"2": ["raise", 3]}' [--gpus cpu,cpu] [--timeout 5]

The prompt says for a process what happens at which step. Standard output has a line for each step of process 0.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from wanflow import cli
from wanflow.cli import launch
from wanflow.config import RequestError
from wanflow.parallel import mesh
from wanflow.parallel.layout import Layout, form
from wanflow.parallel.watch import LATER


def happen(what: str, rank: int) -> None:
    match what:
        case "request":
            raise RequestError("cannot read the weights: high.safetensors is damaged")
        case "full":
            raise OSError(28, "No space left on device")
        case "bug":
            raise ZeroDivisionError("a bug")
        case "kernel":
            raise RuntimeError("a kernel failed")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "starter":
            os.kill(os.getppid(), signal.SIGKILL)
        case "quit":
            os._exit(3)
        case "late":
            time.sleep(600)
        case "spin":
            while True:
                pass
        case "ctrl-c":
            os.kill(os.getpid(), signal.SIGINT)


def work(args: argparse.Namespace) -> None:
    watch, plot = args.watch, {int(rank): what for rank, what in json.loads(args.prompt).items()}
    rank, size = mesh.place()
    what, when = plot.get(rank, ("", -1))
    if when == 0:
        happen(what, rank)
    ranks = mesh.start(torch.device("cpu"), args.timeout + LATER)
    team = form(Layout(ulysses=size), ranks)
    watch.progress = lambda: sum(team.traffic.calls.values())
    done = 0

    def keep() -> None:
        Path(args.save_file).write_text(str(done))
        print(f"kept {done}", flush=True)

    if rank == 0 and args.save_file:
        watch.last_will = keep
    for step in range(1, args.sample_steps + 1):
        if step == when:
            happen(what, rank)
        team.ulysses.all_gather("step", torch.zeros(1000))
        done = step
        if rank == 0:
            print(f"step {step}", flush=True)
        time.sleep(0.05)
    watch.last_will = None
    mesh.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    launch.launch.__defaults__ = ((sys.executable, __file__),)  # its children are such processes, too
    cli.COMMANDS["generate"] = work
    cli.entry()
