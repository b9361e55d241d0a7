"""The elastic agent of `--gpus`: starts the ranks of a run on this machine, and ends them all."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable

from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    SignalException,
    SubprocessContext,
)

from wanflow.described import SIGNALS, ending, give_back
from wanflow.parallel.ranks import host_store
from wanflow.parallel.watchdog import INTERRUPTED, Failure, announce, announced, report

POLL_S = 0.1
STOP_S = 8  # from SIGTERM to SIGKILL; a rank takes 2 * GRACE_S at most


def run_ranks(
    command: list[str],
    world_size: int,
    environment: dict[str, str],
    say: Callable[[str], None] = report,
    on_killed: Callable[[int, str], None] = lambda code, message: None,
) -> int:
    """Start the ranks, wait for them, and return the exit code: 0, or that of the first failure.

    Args:
        command: of each rank.
        world_size: how many ranks.
        environment: what each gets besides this process' own.
        say: prints a failure that no rank announced.
        on_killed: called with exit code and message where rank 0 was killed before it could print.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    store, port = host_store()
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
    shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world_size))
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = SubprocessContext(
        "wanflow",
        command[0],
        args=dict.fromkeys(range(world_size), tuple(command[1:])),
        envs={n: {**shared, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(world_size)},
        logs_specs=DefaultLogsSpecs(os.devnull),
    )
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        ranks.start()
        failure = _first_failure(ranks)
    except SignalException:
        failure = INTERRUPTED
    try:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if failure is not None:
            announce(store, failure, -1, say)
        ranks.close(timeout=STOP_S)
    finally:
        give_back(before)
    failure = announced(store)
    if failure is not None and (ranks.subprocess_handlers[0].proc.poll() or 0) < 0:
        on_killed(*failure)
    return 0 if failure is None else failure.code


def _first_failure(ranks: SubprocessContext) -> Failure | None:
    """Wait until a rank fails or all have ended."""
    while True:
        codes = [ranks.subprocess_handlers[rank].proc.poll() for rank in range(ranks.nprocs)]
        for rank, code in enumerate(codes):
            if code:
                how = ending(code)
                return Failure(1, f"rank {rank} of {ranks.nprocs}: {how}")
        if None not in codes:
            return None
        time.sleep(POLL_S)
