"""Describe machines: this one and known GPUs, with their memory and the rates they reach."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from wanflow.config import RequestError
from wanflow.hardware import least_gpu_memory_free, memory

Kind = Literal["gpu", "cpu"]

GB, TERA = 10**9, 10**12

# Bytes/s from one GPU to the others of its machine, while as many come back. Assumed: two thirds of
# the data sheets, for NVLink (600 GB/s for both directions of an A100, 900 of H100, H200 and H20)
# and for PCIe 4.0 x16 (32 GB/s each way). Cards without NVLink to all others use PCIe. Consumer
# cards cannot reach each other's memory and go through RAM, where a faster slot helps little.
NVLINK3, NVLINK4, PCIE = 200 * GB, 300 * GB, 20 * GB
MESSAGE = 3e-5  # seconds, assumed: latency of a collective among 8 GPUs of a machine
DISK_RATE = 2 * GB  # assumed: half of an NVMe disk's data sheet, in a cloud machine
LAUNCH = 5e-6  # seconds of the shortest operation on a GPU


@dataclass(frozen=True)
class Rates:
    """The rates that a device reaches, in FLOP/s and bytes/s.

    Attributes:
        matmul, attention: in bfloat16 on a GPU, in float32 on a CPU.
        float32: convolutions in float32, as the VAE's.
        low: matmuls of fp8 or int8 weights and activations; 0 where the device has none.
        memory: of elementwise operations.
        copy: from RAM to the device.
        disk: of reading files.
        launch: seconds of the shortest operation.
        source: where the rates come from.
        link: from one device to others of its machine, while as much comes back.
        message: seconds of latency of a collective.
    """

    matmul: float
    attention: float
    float32: float
    low: float
    memory: float
    copy: float
    disk: float
    launch: float
    source: str
    link: float = PCIE
    message: float = MESSAGE


@dataclass(frozen=True)
class Card:
    """A known GPU of NVIDIA: its name, memory in GiB, and rates."""

    name: str
    gib: float
    rates: Rates

    def same_as(self, name: str, nbytes: int) -> bool:
        """Return whether a driver's name and memory are of this card."""
        model = self.name.split(" 80 GB")[0].split()[-1]
        found = re.search(rf"\b{model}\b", name.replace("-", " "))
        return found is not None and abs(nbytes / 2**30 - self.gib) < 0.1 * self.gib


def _rates(tera: tuple[float, ...], bus: float, link: int, source: str) -> Rates:
    """Return rates from TFLOP/s in the order of `Rates`, then TB/s of memory; the bus in GB/s."""
    matmul, attention, float32, low, memory = (value * TERA for value in tera)
    copy = bus * GB
    return Rates(matmul, attention, float32, low, memory, copy, DISK_RATE, LAUNCH, source, link)


# Memory: as drivers report it, rounded down.
# matmul, attention: of A100, H100 and H200 calibrated on published runs of this model, of H20 on
# its published total. The others have 75 % and 68 % of the data sheet, as A100 and H100 reach.
# float32: 19 % of the data sheet's TF32, by one published decode on an H100 (639 TFLOP in 6.9 s).
# low: 60 % of the data sheet. memory: 80 % of it.
RUNS, BOTH = "published runs", "a measurement and published runs"
SHEET = "data sheet times a usual share"
GPUS = {
    #                     name       GiB            matmul att. f32 low   mem.  bus link
    "a100-80gb": Card("A100 80 GB",  79.1, _rates((255, 215, 30,  374, 1.63), 25, NVLINK3, RUNS)),
    "h100-80gb": Card("H100 80 GB",  79.1, _rates((690, 660, 93, 1187, 2.68), 50, NVLINK4, RUNS)),
    "h200":      Card("H200",       139.7, _rates((790, 660, 93, 1187, 3.84), 50, NVLINK4, BOTH)),
    "h20":       Card("H20",         95.0, _rates((129, 129, 14,  178, 3.2),  50, NVLINK4, RUNS)),
    "rtx5090":   Card("RTX 5090",    31.3, _rates((157, 142, 20,  251, 1.43), 50, PCIE, SHEET)),
    "rtx4090":   Card("RTX 4090",    23.5, _rates((124, 112, 16,  198, 0.81), 25, PCIE, SHEET)),
    "l40s":      Card("L40S",        44.3, _rates((272, 246, 35,  440, 0.69), 25, PCIE, SHEET)),
    "a6000":     Card("RTX A6000",   47.4, _rates((116, 105, 15,  186, 0.61), 25, PCIE, SHEET)),
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """The hardware of a machine, in bytes; 0 where there is none or it is unknown.

    Attributes:
        gpu: memory of the largest GPU.
        gpu_free, ram_free: of a described machine, as after a start of the system.
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

    def words(self) -> str:
        """Return the hardware for a message."""
        many = f"{self.gpus} x " if self.gpu and self.gpus > 1 else ""
        gpu = f"{many}{self.gpu_name} with {self.gpu / 2**30:.0f} GiB" if self.gpu else "no GPU"
        disk = f"{self.disk_free / GB:.0f} GB of {'' if self.described else 'free '}disk"
        return f"{gpu}, {self.ram / 2**30:.0f} GiB of RAM, {disk}"


def this_machine(folder: Path, used: int = 1) -> Machine:
    """Return the hardware of this machine.

    Args:
        folder: on the disk that counts.
        used: how many processes run here, each with a GPU of its own. Of several, the smallest GPU
            and the least free memory count.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    ram, ram_free, _ = memory()
    disk_free = shutil.disk_usage(folder).free
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return Machine(0, "", ram, ram_free, disk_free)
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
    return Machine(size, name, ram, ram_free, disk_free, count, gpu_free, known)


def described(
    gpu: str | None = None, count: int = 1, ram: float | None = None, disk: float | None = None
) -> Machine:
    """Return a machine by the name of its GPU ("none": without), their number, GB of RAM and disk.

    The defaults of 64 and 150 GB are what the README asks for.

    Raises:
        RequestError: for an unknown GPU, and for numbers out of range.
    """
    for name, value in (("num_gpus", count), ("ram", ram), ("disk", disk)):
        if value is not None and not 0 < value < 10**6:
            raise RequestError(f"--{name} must be above 0 and below 1000000 (got {value:g})")
    size = (64 if ram is None else ram) * 2**30
    free = int(0.96 * size)  # the system and other programs take about 4 % of 64 GB
    space = int((150 if disk is None else disk) * GB)
    if gpu is None or gpu == "none":
        return Machine(0, "", int(size), free, space, described=True)
    card = GPUS.get(gpu.lower().replace("_", "-").replace(" ", ""))
    if card is None:
        raise RequestError(f"--gpu {gpu}: unknown GPU; expected one of {', '.join(GPUS)}, none")
    vram = int(card.gib * 2**30)
    return Machine(
        vram, f"NVIDIA {card.name}", int(size), free, space, count, vram, card.rates, True
    )
