"""The processes of one run: who this one is, and joining and leaving the others."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from wanflow.config import RequestError

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run, and its device."""

    rank: int
    size: int
    device: torch.device


def place() -> tuple[int, int]:
    """This process' number and how many there are, as torchrun says; joins nothing."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def start(device: torch.device, timeout_s: float = 600.0) -> Ranks:
    """Join the group that torchrun describes in the environment; alone where it describes none.

    Args:
        device: what the run asks for; on CUDA each process takes the GPU of its number on this machine.
        timeout_s: a collective that the others do not join fails after this time (torch's own limit is half an hour). It counts
            while rank 0 writes a file and the others wait, too.

    Raises:
        RequestError: for a device that processes cannot share work on, a GPU that is not there, an incomplete description.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size <= 1:
        return Ranks(0, 1, device)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise RequestError(f"WORLD_SIZE is {size}, but {', '.join(missing)} missing from the environment: start the run with torchrun")
    if device.type not in BACKENDS:
        raise RequestError(f"several processes share work on {' or '.join(BACKENDS)}, not on {device.type}")
    rank = int(os.environ["RANK"])
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", rank))
        if local >= torch.cuda.device_count():
            raise RequestError(f"process {local} of this machine has no GPU of its own: there are {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group(
        BACKENDS[device.type],
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )
    return Ranks(rank, size, device)


def stop() -> None:
    """Leave the group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
