"""Machines: this one, and those a user can describe; what they hold and how fast they are."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wanflow.config import DiTConfig, RequestError
from wanflow.hardware import least_gpu_memory_free, memory
from wanflow.models.dit import Block, Conditioning, rope_table
from wanflow.plan.trace import Trace

GB = 10**9
T = 10**12


# Bytes/s from one GPU to the others of its machine, one way, while as much comes back. Taken, not
# measured: two thirds of the data sheets, for NVLink (600 GB/s for both ways together on an A100,
# 900 on H100, H200 and H20) and for PCIe 4.0 x16 (32 GB/s one way). Cards without NVLink between
# all of them (L40S, RTX; an A6000 has it to one other) go by PCIe, and consumer cards, which do not
# reach each other's memory, through RAM, where a faster slot helps little.
NVLINK3, NVLINK4, PCIE = 200 * GB, 300 * GB, 20 * GB
MESSAGE = 3e-5  # seconds, assumed: a collective among 8 GPUs of a machine before its bytes count
GLOO = GB  # bytes/s between processes on one machine's CPU, assumed


@dataclass(frozen=True)
class Rates:
    """What a device achieves: FLOP/s, and bytes/s.

    matmul, attention: in bfloat16 on a GPU, in float32 on a CPU. float32: convolutions in float32,
        as the VAE's. low: matmuls of fp8 or int8 with values rounded likewise, 0 where the device
        has none. memory: what elementwise work moves. copy: from RAM to the device.
    disk: reading files. launch: seconds that any operation takes at least. link: from one device to
        others of the same machine, while as much comes back. message: seconds that a collective
        takes at least.
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


# What "80 GB" is as a driver reports it, rounded down; FLOP/s achieved in bf16 (matmul, attention),
# in float32 convolutions, in fp8 or int8 (0: none); bytes/s of memory, of the bus, of the link to
# others. Matmul and attention: A100, H100 and H200 as calibrated on published runs of this model,
# H20 from its published total; the others 75 % and 68 % of the data sheet, which is about what A100
# and H100 reach. float32: 19 % of the data sheet's TF32, which one published decode on an H100
# gives (639 TFLOP in 6.9 s). Low: 60 % of the data sheet. Memory: 80 % of it.
GPUS: dict[str, tuple[str, float, float, float, float, float, float, float, float, str]] = {
    #              name                  GiB    matmul attention f32 low  memory bus link
    "a100-80gb": (
        "NVIDIA A100 80 GB",
        79.1,
        255,
        215,
        30,
        374,
        1.63,
        25,
        NVLINK3,
        "published runs",
    ),
    "h100-80gb": (
        "NVIDIA H100 80 GB",
        79.1,
        690,
        660,
        93,
        1187,
        2.68,
        50,
        NVLINK4,
        "published runs",
    ),
    "h200": (
        "NVIDIA H200",
        139.7,
        790,
        660,
        93,
        1187,
        3.84,
        50,
        NVLINK4,
        "a measurement and published runs",
    ),
    "h20": ("NVIDIA H20", 95.0, 129, 129, 14, 178, 3.2, 50, NVLINK4, "published runs"),
    "rtx5090": (
        "NVIDIA RTX 5090",
        31.3,
        157,
        142,
        20,
        251,
        1.43,
        50,
        PCIE,
        "data sheet times a usual share",
    ),
    "rtx4090": (
        "NVIDIA RTX 4090",
        23.5,
        124,
        112,
        16,
        198,
        0.81,
        25,
        PCIE,
        "data sheet times a usual share",
    ),
    "l40s": (
        "NVIDIA L40S",
        44.3,
        272,
        246,
        35,
        440,
        0.69,
        25,
        PCIE,
        "data sheet times a usual share",
    ),
    "a6000": (
        "NVIDIA RTX A6000",
        47.4,
        116,
        105,
        15,
        186,
        0.61,
        25,
        PCIE,
        "data sheet times a usual share",
    ),
}
DISK_RATE = (
    2 * GB
)  # assumed: an NVMe disk in a cloud machine, at about half of what it is sold with
PAGEABLE = 0.4  # of the bus' rate, where RAM is not pinned


@dataclass(frozen=True)
class Machine:
    """What a machine has, in bytes; `gpu` is the largest single one, 0 where there is none. 0 of
    RAM: the system does not say.

    gpu_free, ram_free: what is free now; for a described machine, what a fresh one leaves.
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
        many = f"{self.gpus} x " if self.gpu and self.gpus > 1 else ""
        gpu = f"{many}{self.gpu_name} with {self.gpu / 2**30:.0f} GiB" if self.gpu else "no GPU"
        return (
            f"{gpu}, {self.ram / 2**30:.0f} GiB of RAM, {self.disk_free / GB:.0f} GB of"
            f" {'' if self.described else 'free '}disk"
        )


def this_machine(folder: Path, used: int = 1) -> Machine:
    """What is here; `folder` tells which disk is meant.

    Args:
        used: by how many processes, each of which has a GPU of its own: the smallest of the first
            ones counts, and the least that is free on any of them.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cards = [torch.cuda.get_device_properties(index) for index in range(count)]
    best = max(range(count), key=lambda index: cards[index].total_memory, default=None)
    if used > 1 and count:
        best = min(range(min(used, count)), key=lambda index: cards[index].total_memory)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    ram, free, _ = memory()
    disk = shutil.disk_usage(folder).free
    if best is None:
        return Machine(0, "", ram, free, disk)
    card = cards[best]
    known = next(
        (
            rates(key)
            for key, row in GPUS.items()
            if _same_card(row[0], card.name, card.total_memory, row[1])
        ),
        None,
    )
    gpu_free = (
        torch.cuda.mem_get_info(best)[0] if used == 1 else least_gpu_memory_free(cards[:used])
    )
    return Machine(card.total_memory, card.name, ram, free, disk, count, gpu_free, known)


def _same_card(ours: str, theirs: str, size: int, gib: float) -> bool:
    word = ours.split(" 80 GB")[0].split()[-1]
    return (
        re.search(rf"\b{word}\b", theirs.replace("-", " ")) is not None
        and abs(size / 2**30 - gib) < 0.1 * gib
    )


def rates(key: str) -> Rates:
    """Of a GPU in the table."""
    _, _, matmul, attention, f32, low, memory, bus, link, source = GPUS[key]
    return Rates(
        matmul * T,
        attention * T,
        f32 * T,
        low * T,
        memory * T,
        bus * GB,
        DISK_RATE,
        5e-6,
        source,
        link,
    )


def described(
    gpu: str | None = None, count: int = 1, ram: float | None = None, disk: float | None = None
) -> Machine:
    """A machine in words: a GPU of the table ("none" for a machine without), how many, GB of RAM
    and of disk.

    RAM and disk that are left out are the user's document's own: 64 and 150 GB.

    Raises:
        RequestError: for a GPU that is not in the table, or numbers that no machine has.
    """
    for name, value in (("num_gpus", count), ("ram", ram), ("disk", disk)):
        if value is not None and not 0 < value < 10**6:
            raise RequestError(
                f"--{name} {value:g} is no number of {'GPUs' if name == 'num_gpus' else 'GB'} that"
                " a machine has"
            )
    memory = (64 if ram is None else ram) * 2**30
    # A machine sold with 64 GB keeps about 4 % for itself and what else runs.
    free, space = int(0.96 * memory), int((150 if disk is None else disk) * GB)
    if gpu is None or gpu == "none":
        return Machine(0, "", int(memory), free, space, described=True)
    key = gpu.lower().replace("_", "-").replace(" ", "")
    if key not in GPUS:
        raise RequestError(f"--gpu {gpu} is none of {', '.join(GPUS)}, none")
    name, gib, *_ = GPUS[key]
    size = int(gib * 2**30)
    return Machine(size, name, int(memory), free, space, count, size, rates(key), True)


# measuring


def measured(device: torch.device, dtype: torch.dtype, dim: int, heads: int, tokens: int) -> Rates:
    """Rates of the device that is here, in under a second, at the widths of the model that is to
    run.

    Args:
        tokens: how many one forward works on; as many as are timed, up to 4096.
    """
    rows = max(16, min(4096, tokens))
    x, weight = (
        torch.randn(rows, dim, device=device, dtype=dtype),
        torch.randn(4 * dim, dim, device=device, dtype=dtype),
    )
    qkv = torch.randn(1, heads, rows, dim // heads, device=device, dtype=dtype)
    image = torch.randn(1, 32, 64, 64, device=device)
    kernel = torch.randn(32, 32, 3, 3, device=device)
    large = torch.randn(rows, 4 * dim, device=device)
    with torch.no_grad():
        matmul = 2 * weight.numel() * rows / _seconds(lambda: F.linear(x, weight), device)
        attention = (
            4
            * rows**2
            * dim
            / _seconds(lambda: F.scaled_dot_product_attention(qkv, qkv, qkv), device)
        )
        conv = (
            2
            * image.numel()
            * kernel[0].numel()
            / _seconds(lambda: F.conv2d(image, kernel, padding=1), device)
        )
        memory = 3 * large.nbytes / _seconds(lambda: large * large, device)
        block, few, told, text = _tiny_block(device)
        with Trace() as trace:
            block(few, told, text)
        launch = _seconds(lambda: block(few, told, text), device) / trace.work.kernels
    copy = 10 * GB if device.type == "cpu" else 20 * GB
    link = GLOO if device.type == "cpu" else PCIE
    return Rates(
        matmul,
        attention,
        conv,
        0,
        memory,
        copy,
        DISK_RATE,
        launch,
        "a short measurement here",
        link,
    )


def _tiny_block(device: torch.device) -> tuple[Block, Tensor, Conditioning, tuple[Tensor, Tensor]]:
    """A block so small that its time is what its operations cost at least, with all that calls
    them.
    """
    config = DiTConfig(dim=16, ffn_dim=16, num_heads=2, num_layers=1)
    block = Block(config).to(device).requires_grad_(False)
    time_, modulation = (
        torch.randn(1, 1, 16, device=device),
        torch.randn(1, 1, 6, 16, device=device),
    )
    text = torch.randn(1, 4, 2, 8, device=device), torch.randn(1, 4, 2, 8, device=device)
    conditioning = Conditioning(time_, modulation, None, rope_table((1, 2, 2), 8, device), (text,))
    return block, torch.randn(1, 4, 16, device=device), conditioning, text


def _seconds(work: Callable[[], Any], device: torch.device, least: float = 0.05) -> float:
    """Of one call, the best of a few rounds."""
    best, spent = float("inf"), 0.0
    work()
    while spent < least:
        began = time.perf_counter()
        for _ in range(3):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = time.perf_counter() - began
        best, spent = min(best, took / 3), spent + took
    return best
