"""Describe machines: this one, and others by the names of their GPUs."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from wanflow.config import RequestError
from wanflow.hardware import gpu_driver, least_gpu_memory_free, memory
from wanflow.plan.cards import GB, GPUS, REPORTED, Card, Rates, apple_chip, find_card
from wanflow.units import file_size

Kind = Literal["gpu", "cpu"]
MOST = 1024  # GPUs that share a video


@dataclass(frozen=True)
class Machine:
    """The hardware of a machine, in bytes; 0 where there is none or it is unknown.

    Attributes:
        gpu: memory of the largest GPU.
        gpu_free, ram_free: of a described machine, as after a start of the system.
        gpu_name: of an Apple chip also where `gpu` is 0, since its memory is the RAM.
        bfloat16: whether the GPU computes in it.
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

    def words(self) -> str:
        """Return the hardware for a message."""
        many = f"{self.gpus} x " if self.gpu and self.gpus > 1 else ""
        gpu = f"{many}{self.gpu_name} with {self.gpu / 2**30:.0f} GiB" if self.gpu else "no GPU"
        if self.gpu_name and not self.gpu:
            gpu = f"{self.gpu_name}, whose GPU shares the RAM"
        disk = f"{file_size(self.disk_free)} of {'' if self.described else 'free '}disk"
        return f"{gpu}, {self.ram / 2**30:.0f} GiB of RAM, {disk}"


def this_machine(folder: Path, used: int = 1, ask_torch: bool = True) -> Machine:
    """Return the hardware of this machine.

    Args:
        folder: on the disk that counts.
        used: how many processes run here, each with a GPU of its own. Of several, the smallest GPU
            and the least free memory count.
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

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return without
    cards = [torch.cuda.get_device_properties(index) for index in range(count)]
    sizes = [card.total_memory for card in cards]
    if used > 1:
        chosen = sizes.index(min(sizes[:used]))
        gpu_free = least_gpu_memory_free(cards[:used])
    else:
        chosen = sizes.index(max(sizes))
        gpu_free = torch.cuda.mem_get_info(chosen)[0]
    name, size = cards[chosen].name, sizes[chosen]
    known = next((card.rates for card in GPUS.values() if card.same_as(name, size)), None)
    bfloat16 = torch.version.hip is not None or cards[chosen].major >= 8
    return Machine(size, name, ram, ram_free, disk_free, count, gpu_free, known, bfloat16=bfloat16)


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
