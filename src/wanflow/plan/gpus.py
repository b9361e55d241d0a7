"""Describe machines: this one, and others by the names of their GPUs."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from wanflow.choices import choose_device
from wanflow.config import RequestError
from wanflow.hardware import gpu_driver, gpu_memory_free, memory
from wanflow.plan.cards import GB, GPUS, REPORTED, Card, Overheads, Rates, apple_chip, find_card
from wanflow.units import file_size

Kind = Literal["gpu", "cpu"]
MOST = 1024  # GPUs that share a video


@dataclass(frozen=True)
class Machine:
    """The hardware of a machine, in bytes; 0 where there is none or it is unknown.

    Attributes:
        gpu: memory of the GPU that a run uses; of several, of the smallest.
        gpu_free, ram_free: of a described machine, as after a start of the system.
        gpu_name: of an Apple chip also where `gpu` is 0, since its memory is the RAM.
        gpus: how many there are.
        bfloat16: whether the GPU computes in it.
        device: the one GPU of this machine that a run uses, such as `cuda:1`; else "".
        holds_context: whether `gpu_free` is without a CUDA context of ours, which the run needs.
        pinned: bytes of RAM that can be pinned.
    """

    gpu: int
    gpu_name: str
    ram: int
    ram_free: int
    disk_free: int
    gpus: int = 1
    gpu_free: int = 0
    rates: Rates | None = None
    described: bool = False
    bfloat16: bool = True
    device: str = ""
    holds_context: bool = False
    pinned: int = 0
    overheads: Overheads = Overheads()  # noqa: RUF009 (it is frozen)

    @property
    def system(self) -> str:
        """The operating system, as in `sys.platform`."""
        return "linux" if self.described else sys.platform

    @property
    def gpu_room(self) -> int:
        """Bytes of GPU memory that a run can take, its own context included."""
        held = self.overheads.context if self.holds_context else 0
        return min(self.gpu, self.gpu_free + held) if self.gpu_free else self.gpu

    def words(self) -> str:
        """Return the hardware for a message."""
        several = self.gpu and self.gpus > 1
        many = f"{self.gpus} x " if several and not self.device else ""
        gpu = f"{many}{self.gpu_name} with {self.gpu / 2**30:.0f} GiB" if self.gpu else "no GPU"
        if several and self.device:
            gpu += f" ({self.device} of {self.gpus} GPUs)"
        if self.gpu_name and not self.gpu:
            gpu = f"{self.gpu_name}, whose GPU shares the RAM"
        disk = f"{file_size(self.disk_free)} of {'' if self.described else 'free '}disk"
        return f"{gpu}, {self.ram / 2**30:.0f} GiB of RAM, {disk}"


def this_machine(
    folder: Path, used: Sequence[int] | None = None, least_free: int = 0, ask_torch: bool = True
) -> Machine:
    """Return the hardware of this machine.

    Args:
        folder: on the disk that counts.
        used: the numbers of the GPUs that a run uses, each by a process of its own. Of several, the
            smallest and the least free memory count. Empty: a run uses none, and the largest is
            named; None: a run takes the one that `auto` means.
        least_free: what the processes, which have begun, found to be free; 0: this one looks.
        ask_torch: whether PyTorch looks for GPUs also where no driver of one is.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    ram, ram_free, _ = memory()
    disk_free = shutil.disk_usage(folder).free
    without = Machine(0, "", ram, ram_free, disk_free)
    if not ask_torch and not gpu_driver():
        return without
    import torch

    from wanflow.transforms import attention

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return without
    cards = [torch.cuda.get_device_properties(index) for index in range(count)]
    if used is None:
        used = [choose_device("auto").index]
    sizes, chosen = [card.total_memory for card in cards], 0
    if not used:
        chosen, gpu_free = sizes.index(max(sizes)), 0
    elif len(used) == 1:
        # The question makes a context, which the run needs anyway.
        chosen = used[0]
        gpu_free = least_free or torch.cuda.mem_get_info(chosen)[0]
    else:
        used = [index for index in used if index < count]  # others are on another machine
        chosen = min(used, key=lambda index: sizes[index])
        gpu_free = least_free or min(gpu_memory_free(used))
    name, size = cards[chosen].name, sizes[chosen]
    known = next((card.rates for card in GPUS.values() if card.same_as(name, size)), None)
    facts = attention.Card((cards[chosen].major, 0), amd=torch.version.hip is not None)
    return Machine(
        size,
        name,
        ram,
        ram_free,
        disk_free,
        count,
        gpu_free,
        known,
        bfloat16=facts.bfloat16,
        device=f"cuda:{chosen}" if len(used) == 1 else "",
        holds_context=len(used) == 1 or least_free > 0,
    )


def described(
    gpu: str | None = None, count: int = 1, ram: float | None = None, disk: float | None = None
) -> Machine:
    """Return a machine by the name of its GPU or its memory ("none": without), RAM and disk in GB.

    The defaults of 64 and 150 GB are what the README asks for.

    Raises:
        RequestError: for an unknown GPU, and for numbers out of range.
    """
    for name, value, most in (("num_gpus", count, MOST), ("ram", ram, 1e6), ("disk", disk, 1e6)):
        if value is not None and not 0 < value <= most:
            raise RequestError(f"--{name} must be above 0 and at most {most:g} (got {value:g})")
    size = (64 if ram is None else ram) * 2**30
    free = int(0.96 * size)  # the system and other programs take about 4 % of 64 GB
    space = int((150 if disk is None else disk) * GB)
    here = Machine(0, "", int(size), free, space, described=True)
    if gpu is None or gpu.lower() in ("none", "cpu"):
        return here
    chip = apple_chip(gpu)
    if chip is not None:
        return replace(described(None, 1, ram or chip[1], disk), gpu_name=chip[0])
    card = find_card(gpu)
    if isinstance(card, Card):
        vram, maker = int(card.gib * 2**30), "AMD" if card.name.startswith("MI") else "NVIDIA"
        here = replace(here, gpu_name=f"{maker} {card.name}", bfloat16=card.bfloat16)
        return replace(here, gpu=vram, gpu_free=vram, gpus=count, rates=card.rates)
    vram = int(REPORTED * card * 2**30)
    return replace(here, gpu=vram, gpu_free=vram, gpus=count, gpu_name="GPU")
