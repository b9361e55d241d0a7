"""The ranks of one machine: who they are, and memory that they share."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from wanflow.config import RequestError
from wanflow.parallel.groups import Group, ParallelContext

BOOT = Path("/proc/sys/kernel/random/boot_id")  # a new one at each start of a machine
PROCESSES = Path("/proc/self/ns/pid")  # containers have their own
CLOSE_ON_EXEC = 1  # of memfd_create
Maps = tuple[list[mmap.mmap], list[mmap.mmap]]


def identity() -> tuple[int, int]:
    """Return a number for what this process must have in common with one that it shares with.

    That is the machine, the process namespace, in which one finds the other's files, and the user.
    """
    try:
        where = BOOT.read_text(), os.readlink(PROCESSES), str(os.getuid())
    except (OSError, AttributeError):
        where = socket.gethostname(), "", ""
    digest = hashlib.sha256("\n".join(where).encode()).digest()
    return int.from_bytes(digest[:7], "little"), int.from_bytes(digest[7:14], "little")


def machine_group(ctx: ParallelContext) -> Group:
    """Return the ranks of this machine, found once. Every rank must ask for it."""
    if ctx.machine is None:
        ctx.machine = _find(ctx)
    return ctx.machine


def _find(ctx: ParallelContext) -> Group:
    if ctx.world.handle is None:
        return Group(ctx.stats)
    own = torch.tensor(identity(), dtype=torch.int64, device=ctx.info.device)
    machines: dict[tuple[int, ...], list[int]] = {}
    for rank, found in enumerate(ctx.world.all_gather("machine", own)):
        machines.setdefault(tuple(found.tolist()), []).append(rank)
    if len(machines) == 1:  # a communicator takes a GPU's memory, so there is no second one
        return ctx.world
    groups = {rank: ranks for ranks in machines.values() for rank in ranks}
    handles = {tuple(ranks): dist.new_group(ranks) for ranks in machines.values()}
    own_ranks = tuple(groups[ctx.info.rank])
    return Group(ctx.stats) if len(own_ranks) == 1 else Group(ctx.stats, handles[own_ranks])


def agree(group: Group, device: torch.device, error: Exception | None, what: str) -> None:
    """Raise on every rank if one has an error, which raises its own. Every rank must call it."""
    failed = torch.tensor([error is not None], dtype=torch.int64, device=device)
    ranks = [n for n, one in enumerate(group.all_gather("machine", failed)) if int(one)]
    if error is not None:
        raise error
    if ranks and group.size > 1:
        raise RequestError(f"{what}: rank {ranks[0]} of this machine failed; its message says why")


def shared_memory(group: Group, device: torch.device, sizes: Sequence[int]) -> Maps | None:
    """Map zeroed memory that the ranks of a machine share; None where the system refuses.

    It has no name in any file system and does not count against `/dev/shm`. The kernel frees it
    with the last rank that has mapped it, however that ends. Every rank must call it.

    Returns:
        Maps that share what is written, and maps of the same memory that copy what is written.
    """
    files = _memory_files(sizes) if group.rank == 0 else []
    try:
        places = torch.tensor([os.getpid(), *(files or [-1] * len(sizes))], device=device)
        process, *numbers = group.broadcast("machine", places).tolist()
        maps = _map(files or [f"/proc/{process}/fd/{number}" for number in numbers], sizes)
        mapped = torch.tensor([maps is not None], dtype=torch.int64, device=device)
        everyone = all(int(one) for one in group.all_gather("machine", mapped))
    finally:  # the maps keep the memory
        for number in files:
            os.close(number)
    return maps if everyone else None


def _memory_files(sizes: Sequence[int]) -> list[int]:
    """Return open files in memory, without a name; none where the system has no such files."""
    files: list[int] = []
    try:
        for size in sizes:
            files.append(_memory_file())
            os.ftruncate(files[-1], size)
    except (OSError, AttributeError, TypeError):  # the last two on other systems
        for number in files:
            os.close(number)
        return []
    return files


def _memory_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("wanflow", CLOSE_ON_EXEC)
    # A Python that was built on an old Linux lacks it; the C library may have it.
    number = int(ctypes.CDLL(None, use_errno=True).memfd_create(b"wanflow", CLOSE_ON_EXEC))
    if number < 0:
        raise OSError(ctypes.get_errno(), "memfd_create")
    return number


def _map(files: Sequence[int | str], sizes: Sequence[int]) -> Maps | None:
    shared, private = [], []
    try:
        for file, size in zip(files, sizes, strict=True):
            number = os.open(file, os.O_RDWR | os.O_CLOEXEC) if isinstance(file, str) else file
            try:
                shared.append(mmap.mmap(number, size))
                private.append(mmap.mmap(number, size, flags=mmap.MAP_PRIVATE))
            finally:
                if number is not file:
                    os.close(number)
    except (OSError, ValueError, AttributeError):
        return None
    return shared, private
