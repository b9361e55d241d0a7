"""Run work on several ranks over gloo; a test reads their results from files."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from filelock import FileLock

from wanflow.parallel import ranks

CPU = torch.device("cpu")
Work = Callable[[ranks.DistInfo], Any]  # runs on one rank, returns its result


@contextmanager
def joined(rank: int, size: int, folder: Path, name: str) -> Iterator[ranks.DistInfo]:
    """Join a gloo group through a file."""
    store = dist.FileStore(str(folder / f"{name}.store"), size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=300)
    )
    try:
        yield ranks.DistInfo(rank, size, CPU)
    finally:
        ranks.leave_group()


@contextmanager
def played(rank: int, size: int) -> Iterator[ranks.DistInfo]:
    """Play one rank of PyTorch's fake group, which sends nothing."""
    dist.init_process_group("fake", rank=rank, world_size=size)
    try:
        yield ranks.DistInfo(rank, size, CPU)
    finally:
        ranks.leave_group()


def _process(rank: int, work: Work, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what it was forked with: a collection would walk over it at each swap of experts
    with joined(rank, size, folder, "group") as info, torch.no_grad():
        found = work(info)
    torch.save(found, folder / f"{rank}.pt")


def start(work: Work, size: int, folder: Path) -> list[int | None]:
    """Run `work` on a number of ranks; return their exit codes."""
    # A fork of a process that has imported torch, and what FSDP takes of it, starts at once.
    context = mp.get_context(
        "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
    )
    context.set_forkserver_preload([work.__module__, "wanflow.parallel.fsdp", "torch._dynamo"])
    processes = [
        context.Process(target=_process, args=(rank, work, size, folder), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(900)  # against hanging; a busy machine needs minutes
        process.kill()
    return [process.exitcode for process in processes]


class Processes:
    """The results of work on several ranks, which run once for all workers of pytest-xdist."""

    def __init__(self, base: Path) -> None:
        self.base = base

    def __call__(self, work: Work, size: int) -> Sequence[Any]:
        """Return each rank's result in a group of `size`."""
        folder = self.base / f"{work.__module__}-{work.__name__}-{size}"
        folder.mkdir(exist_ok=True)
        ended = folder / "ended.json"
        with FileLock(folder / "lock"):
            if not ended.exists():
                ended.write_text(json.dumps(start(work, size, folder)))
        assert json.loads(ended.read_text()) == [0] * size
        return [
            torch.load(folder / f"{rank}.pt", weights_only=True, mmap=True) for rank in range(size)
        ]


@pytest.fixture
def processes(tmp_path_factory: pytest.TempPathFactory) -> Processes:
    base = tmp_path_factory.getbasetemp()
    return Processes(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)
