"""`--gpus 0,1,2,3`: which devices it names, and what the ranks on them need."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass

from wanflow.cli.parser import short
from wanflow.cli.running import world_size
from wanflow.config import RequestError

LAUNCHED = "WANFLOW_LAUNCHED"
MOST = 64  # ranks on one machine


@dataclass(frozen=True)
class Ranks:
    """Where to start them (on CPUs only their number counts), and what each of them gets."""

    devices: tuple[int, ...]
    environment: dict[str, str]
    flags: list[str]


def parse_gpus(args: argparse.Namespace) -> Ranks | None:
    """Return what `--gpus` asks for; None where this process takes the device itself.

    Raises:
        RequestError: for devices that do not exist or that contradict other flags or torchrun.
    """
    if LAUNCHED in os.environ:
        return None
    if world_size() > 1:
        raise RequestError("--gpus starts the ranks itself; leave out --gpus, or torchrun")
    names = [name.strip() for name in args.gpus.split(",")]
    kind = "cpu" if set(names) == {"cpu"} else "cuda"
    if len(names) > MOST:
        raise RequestError(f"--gpus names {len(names):,} devices; at most {MOST} ranks are started")
    if getattr(args, "device", "auto") not in ("auto", kind):
        raise RequestError(
            f"--gpus {short(args.gpus)} and --device {short(args.device)} contradict each other;"
            " leave one out (--gpus cpu,cpu starts two ranks on the CPU)"
        )
    visible, flags, devices = "", list[str](), tuple(range(len(names)))
    if kind == "cuda":
        devices = _devices(args.gpus, names)
        visible = _visible(devices)
    else:
        args.device, flags = "cpu", ["--device", "cpu"]
    if len(names) == 1:
        # By its number: CUDA_VISIBLE_DEVICES comes too late once CUDA has counted devices.
        args.device = f"cuda:{devices[0]}" if kind == "cuda" else kind
        return None
    from wanflow.hardware import usable_cores

    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, int(usable_cores()) // len(names)))
    return Ranks(devices, {"CUDA_VISIBLE_DEVICES": visible, "OMP_NUM_THREADS": threads}, flags)


def _devices(given: str, names: list[str]) -> tuple[int, ...]:
    """Return the GPUs that are named, by their numbers among those that are visible now."""
    if not all(re.fullmatch("[0-9]{1,4}", name) for name in names):
        raise RequestError(
            f"--gpus {short(given)!r}: expected GPU numbers such as 0,1,2,3, or cpu,cpu"
        )
    ids = [int(name) for name in names]
    if len(set(ids)) < len(ids):
        raise RequestError(f"--gpus {short(given)}: a GPU is named twice; each rank needs its own")
    count = _cards()
    if max(ids) >= count:
        raise RequestError(
            f"--gpus {short(given)}: no GPU {max(ids)}; this machine has {count} (from 0)"
        )
    return tuple(ids)


def _visible(ids: tuple[int, ...]) -> str:
    """Return CUDA_VISIBLE_DEVICES of processes that see these GPUs only."""
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return ",".join(seen[number] if seen else str(number) for number in ids)


def _cards() -> int:
    """Return how many GPUs are visible; without a driver torch is not asked."""
    from wanflow.hardware import gpu_driver

    if not gpu_driver():
        return 0
    import torch

    return torch.cuda.device_count()
