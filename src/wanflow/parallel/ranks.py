"""The ranks of a run: which is this process, their store, and their process group."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from wanflow.config import RequestError, plain
from wanflow.described import described
from wanflow.parallel.watchdog import Watchdog
from wanflow.untrusted import printable

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
DESCRIPTION = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # besides WORLD_SIZE
JOIN_S = 60.0  # for a rank to reach the store, and for all ranks to be there
HERE = "127.0.0.1"
REACH_S = 10.0  # for a connection of this machine with itself
TRY_S = 0.2  # between two tries
MARGIN_S = 5.0  # by which torch may be late to its own time-out
STORE_TIMEOUT_S = 300.0  # for an answer of the store
T = TypeVar("T")


@dataclass(frozen=True)
class DistInfo:
    """This rank, its device, and how long a collective waits for the others, in seconds.

    gpu_free: the least free bytes of all ranks' GPUs, each with its rank's context; 0 on CPUs.
    """

    rank: int
    world_size: int
    device: torch.device
    timeout_s: float = 600.0
    gpu_free: int = 0


def local_world_size() -> int | None:
    """Return how many ranks run on this machine, if the environment describes it."""
    return described(os.environ).local_world_size


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks from the environment; join nothing."""
    found = described(os.environ)
    return found.rank, found.world_size


def connect_store(join_s: float = JOIN_S) -> Watchdog | None:
    """Connect to the store of the ranks that the environment describes.

    Args:
        join_s: how long to wait for the store, and later for every rank.

    Returns:
        A watchdog that has not started; None where the description is missing or incomplete.

    Raises:
        ConnectionError: when the elastic agent, or rank 0, cannot be reached.
    """
    rank, world_size = rank_and_world_size()
    if world_size <= 1 or any(name not in os.environ for name in DESCRIPTION):
        return None
    rank0_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # One server for all that ask for it in rank 0: init_process_group asks, too.
    options = {"wait_for_workers": False, "multi_tenant": True}
    found: list[TCPStore | RuntimeError] = []

    def connect() -> None:
        limit, hosts = timedelta(seconds=join_s), rank0_hosts and rank == 0
        try:
            _reach(address, port, join_s, hosts)  # torch prints its stack where it cannot
            found.append(TCPStore(address, port, world_size, hosts, limit, **options))
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            found.append(RuntimeError(str(error)))

    # A server of another program that never answers holds the constructor for ever.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(join_s + MARGIN_S)
    store = found[0] if found else RuntimeError(f"no answer for {join_s:g} s")
    if isinstance(store, RuntimeError):
        host = "rank 0" if rank0_hosts else "the process that started the ranks"
        where = printable(f"{address}:{port}")
        raise ConnectionError(
            f"rank {rank} of {world_size}: cannot reach {host} at {where} within {join_s:g} s:"
            f" {plain(str(store))}; check MASTER_ADDR and MASTER_PORT (--timeout waits longer)"
        )
    store.set_timeout(timedelta(seconds=STORE_TIMEOUT_S))
    return Watchdog(_own_keys(store), rank, world_size, rank0_hosts, join_s)


def _reach(address: str, port: int, seconds: float, hosts: bool) -> None:
    """Wait until a server takes connections; for the rank that hosts it, until the name is known.

    Raises:
        OSError, ValueError: that of the last try.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            if hosts:
                socket.getaddrinfo(address, port)
            else:
                left = max(0.1, end - time.monotonic())
                socket.create_connection((address, port), left).close()
            return
        except (OSError, ValueError):
            if time.monotonic() > end:
                raise
            time.sleep(TRY_S)


def host_store() -> tuple[Store, int]:
    """Host the store that `connect_store` finds; return it and its port on this machine.

    Raises:
        RequestError: where this machine does not reach itself; torch would try for 5 minutes.
    """
    try:
        with socket.create_server((HERE, 0)) as own:
            socket.create_connection(own.getsockname(), REACH_S).close()
    except OSError as error:
        raise RequestError(
            f"processes of this machine cannot reach each other at {HERE}"
            f" ({error.strerror or error}); bring its loopback up: ip link set lo up"
        ) from None
    listener = socket.create_server((HERE, 0))
    store = TCPStore(
        HERE,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.fileno(),
    )
    listener.detach()
    return _own_keys(store), store.port


def _own_keys(store: TCPStore) -> Store:
    """Separate our keys from torch's, and from those before a restart by torchrun."""
    return PrefixStore(f"wanflow/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def join_group(device: torch.device, timeout_s: float = 600.0) -> DistInfo:
    """Join the process group that the environment describes; alone where it describes none.

    A process that has joined already stays in its group.

    Args:
        device: that the run asks for; on CUDA each rank takes the GPU of its local rank.
        timeout_s: of a collective (torch's default is half an hour). It counts while rank 0
            writes a file and the others wait, too.

    Raises:
        RequestError: for a device without collectives, a missing GPU, an incomplete description.
        ConnectionError: when rank 0, or the elastic agent, cannot be reached.
    """
    rank, world_size = rank_and_world_size()
    if world_size <= 1:
        return DistInfo(0, 1, device)
    missing = [name for name in DESCRIPTION if name not in os.environ]
    if missing:
        raise RequestError(
            f"WORLD_SIZE is {world_size}, but {', '.join(missing)} missing from the environment:"
            " start the run with torchrun"
        )
    if device.type not in BACKENDS:
        raise RequestError(f"several ranks need {' or '.join(BACKENDS)} (got {device.type})")
    if device.type == "cuda":
        local, count = described(os.environ).local_rank, torch.cuda.device_count()
        local = rank if local is None else local
        if local >= count:
            raise RequestError(
                f"local rank {local} has no GPU: this machine has {count}; start one rank per GPU"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # It refuses soon, and in words, what torch waits for; rank 0 hosts the store until then.
        reached = connect_store(min(JOIN_S, timeout_s))
        dist.init_process_group(
            BACKENDS[device.type],
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
        del reached
    free = 0 if device.type == "cpu" else least(torch.cuda.mem_get_info(device)[0], device)
    return DistInfo(rank, world_size, device, timeout_s, free)


def least(value: int, device: torch.device) -> int:
    """Return the least of all ranks' values, on all; every rank must call it."""
    one = torch.tensor([value], device=device)
    dist.all_reduce(one, dist.ReduceOp.MIN)
    return int(one)


def broadcast_from_rank0(info: DistInfo, make: Callable[[], T]) -> T:
    """Return on all ranks what `make` returns on rank 0, which should be small.

    Every rank must call it.

    Raises:
        RequestError: on all ranks, where `make` raises one.
    """
    if info.world_size == 1:
        return make()
    box: list[Any] = [None]
    if info.rank == 0:
        try:
            box = [make()]
        except RequestError as error:
            box = [error]
    dist.broadcast_object_list(box, src=0, device=info.device)
    if isinstance(box[0], RequestError):
        raise box[0]
    return cast(T, box[0])


def leave_group() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
