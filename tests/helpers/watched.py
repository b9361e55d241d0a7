#!/usr/bin/env python3
"""The `wanflow` command with a failure in one rank.

    FAIL="1 kill 3" watched.py generate --gpus cpu,cpu ...

FAIL names the rank, what happens, and in which forward of the model; 0 is before the rank joins its
process group. HEARTBEAT_TIMEOUT_S shortens the watchdog's timeout. A line "strike SECONDS" on
standard error gives the moment.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from typing import Any

import torch

from wanflow import cli
from wanflow.cli import launch
from wanflow.config import RequestError
from wanflow.models.dit import WanDiT
from wanflow.parallel import ranks, watchdog

ERRORS: dict[str, Exception] = {
    "refuse": RequestError("cannot read high.safetensors"),
    "raise": ZeroDivisionError("nought"),
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "break": RuntimeError("a kernel failed"),  # what a broken connection raises, too
}
ACTIONS: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "quit": lambda: os._exit(3),
    "hang": lambda: time.sleep(600),
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "interrupt-starter": lambda: hit_starter(signal.SIGINT),
    "kill-starter": lambda: hit_starter(signal.SIGKILL),
}


def hit_starter(number: int) -> None:
    os.kill(os.getppid(), number)
    time.sleep(60)  # the run must not end first


def strike(what: str) -> None:
    print(f"strike {time.time()}", file=sys.stderr, flush=True)
    if what in ERRORS:
        raise ERRORS[what]
    ACTIONS[what]()


def main() -> None:
    rank, what, when = os.environ["FAIL"].split()
    watchdog.HEARTBEAT_TIMEOUT_S = float(os.environ.get("HEARTBEAT_TIMEOUT_S", "30"))
    launch.COMMAND = [sys.executable, __file__]
    forward, join, numbers = WanDiT.forward, ranks.join_group, count(1)

    def join_failing(*args: Any, **kwargs: Any) -> Any:
        if int(when) == 0:
            strike(what)
        return join(*args, **kwargs)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(numbers) == int(when):
            strike(what)
        return forward(*args, **kwargs)

    if os.environ.get("RANK", "0") == rank:
        WanDiT.forward = failing  # type: ignore[method-assign]
        ranks.join_group = join_failing
    cli.entry()


if __name__ == "__main__":
    main()
