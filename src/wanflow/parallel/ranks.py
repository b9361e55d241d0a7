"""The processes of one run: who this one is, and joining and leaving the others."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from wanflow.config import RequestError, plain
from wanflow.parallel.watchdog import Watchdog

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
DESCRIPTION = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # beside WORLD_SIZE
MEET_S = 300.0  # for whoever holds the store to be there
T = TypeVar("T")


@dataclass(frozen=True)
class DistInfo:
    """This process among those of the run, its device, and how long a collective waits for the
    others, in seconds.
    """

    rank: int
    size: int
    device: torch.device
    timeout_s: float = 600.0


def per_machine() -> int | None:
    """How many of the processes run on this machine, if torchrun says."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in os.environ else None


def rank_and_world_size() -> tuple[int, int]:
    """This process' number and how many there are, as torchrun says; joins nothing."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def connect_store() -> Watchdog:
    """This process among those that the environment describes, not yet watching; alone where it
    describes none, or not all of it.

    Raises:
        ConnectionError: when what started the processes, or process 0, cannot be reached.
    """
    rank, size = rank_and_world_size()
    if size <= 1 or any(name not in os.environ for name in DESCRIPTION):
        return Watchdog(None, rank)
    hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port, wait = (
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        timedelta(seconds=MEET_S),
    )
    try:
        # One server for all that ask for it in process 0: init_process_group asks, too.
        store = TCPStore(
            address,
            port,
            size,
            hosts and rank == 0,
            wait,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        where = "process 0 of the run" if hosts else "what started the processes"
        raise ConnectionError(
            f"process {rank} of {size}: {where} cannot be reached at {address}:{port}:"
            f" {plain(str(error))}"
        ) from None
    return Watchdog(_own_part(store), rank, size, hosts)


def host_store() -> tuple[Store, int]:
    """What `meet` meets in, held by this process for those that it starts on this machine; and its
    port.
    """
    ear = socket.create_server(("127.0.0.1", 0))
    store = TCPStore(
        "127.0.0.1",
        ear.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=ear.fileno(),
    )
    ear.detach()
    return _own_part(store), store.port


def _own_part(store: TCPStore) -> Store:
    """Our names beside torch's; after torchrun's restart the failure of the try before must not be
    found.
    """
    return PrefixStore(f"wanflow/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def join_group(device: torch.device, timeout_s: float = 600.0) -> DistInfo:
    """Join the group that torchrun describes in the environment; alone where it describes none. Who
    has joined already stays.

    Args:
        device: what the run asks for; on CUDA each process takes the GPU of its number on this
            machine.
        timeout_s: a collective that the others do not join fails after this time (torch's own limit
            is half an hour). It counts while rank 0 writes a file and the others wait, too.

    Raises:
        RequestError: for a device that processes cannot share work on, a GPU that is not there, an
            incomplete description.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size <= 1:
        return DistInfo(0, 1, device)
    missing = [name for name in DESCRIPTION if name not in os.environ]
    if missing:
        raise RequestError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} missing from the environment: start"
            " the run with torchrun"
        )
    if device.type not in BACKENDS:
        raise RequestError(
            f"several processes share work on {' or '.join(BACKENDS)}, not on {device.type}"
        )
    rank = int(os.environ["RANK"])
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", rank))
        if local >= torch.cuda.device_count():
            raise RequestError(
                f"process {local} of this machine has no GPU of its own: there are"
                f" {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return DistInfo(rank, size, device, timeout_s)
    dist.init_process_group(
        BACKENDS[device.type],
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )
    return DistInfo(rank, size, device, timeout_s)


def broadcast_from_rank0(ranks: DistInfo, make: Callable[[], T]) -> T:
    """What `make` gives in the first process, for all. Every process must call it; nothing large
    should go this way.

    Raises:
        RequestError: in all of them, where `make` raises one.
    """
    if ranks.size == 1:
        return make()
    box: list[Any] = [None]
    if ranks.rank == 0:
        try:
            box = [make()]
        except RequestError as error:
            box = [error]
    dist.broadcast_object_list(box, src=0, device=ranks.device)
    if isinstance(box[0], RequestError):
        raise box[0]
    return cast(T, box[0])


def leave_group() -> None:
    """Leave the group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
