"""List the GPUs that people own, with the rates that they reach, and find one by its name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from wanflow.config import RequestError
from wanflow.untrusted import printable

GB, TERA = 10**9, 10**12

# Bytes/s from one GPU to the others of its machine, while as many come back. Assumed: two thirds of
# the data sheets, for NVLink (600 GB/s for both directions of an A100, 900 of H100, H200 and H20,
# 1800 of B200; a MI300X' Infinity Fabric has 896) and for PCIe 4.0 x16 (32 GB/s each way). Cards
# without NVLink to all others use PCIe. Consumer cards cannot reach each other's memory and go
# through RAM, where a faster slot helps little.
NVLINK3, NVLINK4, NVLINK5, PCIE = 200 * GB, 300 * GB, 600 * GB, 20 * GB
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
        kernel: of attention, whose rate this is.
        compiled: seconds of a compiled block, as a share of the same block's; 0: by its bytes.
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
    kernel: str = ""
    compiled: float = 0.0


@dataclass(frozen=True)
class Overheads:
    """GPU memory besides tensors, in bytes: assumed, and not measured, where no source says so.

    Attributes:
        context: of CUDA, with its kernels; 0.4 to 0.6 GB are usual.
        gaps: the share that PyTorch's allocator loses to rounding and gaps.
        workspace: of cuDNN's convolutions, in the VAE.
        nccl: buffers of NCCL's communicators, of several ranks; 0.3 to 1 GB are usual.
        source: where they come from.
    """

    context: int = 600_000_000
    gaps: float = 0.04
    workspace: int = 500_000_000
    nccl: int = 1_000_000_000
    source: str = "assumed"


@dataclass(frozen=True)
class Card:
    """A known GPU.

    Attributes:
        name: as its maker writes it.
        size: GB of memory by which it is sold.
        gib: GiB of memory that PyTorch reports.
        bfloat16: whether it computes in bfloat16.
    """

    name: str
    size: int
    gib: float
    rates: Rates
    bfloat16: bool = True

    def same_as(self, name: str, nbytes: int) -> bool:
        """Return whether a driver's name and memory are of this card."""
        size = abs(nbytes / 2**30 - self.gib) < 0.1 * self.gib
        return size and same_model(self.name, name)


def _calibrated(
    name: str, size: int, gib: float, *tera: float, link: int = PCIE, **known: Any
) -> Card:
    """Return a card by its rates: TFLOP/s in the order of `Rates`, TB/s of memory, GB/s of bus."""
    matmul, attention, float32, low, memory = (value * TERA for value in tera[:-1])
    copy, source, kernel = tera[-1] * GB, known.pop("source", REVIEW), known.pop("kernel", AMPERE)
    rates = Rates(
        matmul,
        attention,
        float32,
        low,
        memory,
        copy,
        DISK_RATE,
        LAUNCH,
        source,
        link,
        kernel=kernel,
    )
    return Card(name, size, gib, rates, **known)


def _sheet(
    name: str, size: int, gib: float, *tera: float, share: float = 1.0, **known: Any
) -> Card:
    """Return a card that nobody has run this model on, by its data sheet.

    Args:
        name, size, gib: of `Card`.
        tera: dense TFLOP/s in bfloat16 (summed in float32), in fp8 or else int8, and in TF32; then
            TB/s of memory, and GB/s from RAM to the card.
        share: of the usual share that its matmuls reach.
        known: `link`, and `source` of the rates where it is not only the sheet.
    """
    bfloat16, low, tf32, memory, bus = tera
    # A100 and H100 reach 75 and 68 %; 19 % is by a published decode on an H100 (639 TFLOP in 6.9 s)
    reached = (0.75 * bfloat16, 0.68 * bfloat16, 0.19 * tf32, 0.6 * low)
    rates = (*(share * one for one in reached), 0.8 * memory, bus)
    return _calibrated(name, size, gib, *rates, **{"source": SHEET, **known})


REVIEW = "a review of what such cards reach; nothing was run"
RUNS = "published runs"
SHEET = "data sheet times a usual share"
AMPERE, HOPPER, OLD = "FlashAttention 2", "cuDNN or FlashAttention 3", "the memory-efficient kernel"
AMD = f"{SHEET}; wanflow was never run on AMD"

# GiB: as PyTorch reports it without a display, rounded down.
# `_calibrated`: the middle of what a review expects of A100, H100 (SXM), H200 and RTX 4090: their
# matmuls, attention by the kernel that is named, convolutions in TF32, and memory at 73 to 77 % of
# the data sheet in eager operations. With PyTorch's FlashAttention 2 an H100 reaches 380, not 600.
# H20 by its published total.
# `_sheet`: NVIDIA's white papers of GA102, Ada and RTX Blackwell give the tensor rates of 3080,
# 3090, 4080, 4090, 5080 and 5090. Those of other GeForce cards are 512 FLOP a clock and
# multiprocessor, as there, times their boost clock. The others have data sheets of their own. Those
# of T4 (65 TFLOP/s in float16, 130 in int8, 8.1 in float32, PCIe 3.0), V100 (125, none, 15.7) and
# RTX 2080 Ti (53.8, 215, 13.4; the white paper of Turing) name neither bfloat16 nor TF32. An MI300X
# reaches less than half of its sheet in public comparisons of matmuls.
GPUS = {
    #                        name  GB   GiB  matmul att. f32  low  mem. bus
    "a100-80gb": _calibrated("A100", 80, 79.1, 245, 203, 84, 374, 1.475, 25, link=NVLINK3),
    "h100-80gb": _calibrated(
        "H100", 80, 79.1, 690, 600, 197, 1187, 2.45, 50, link=NVLINK4, kernel=HOPPER
    ),
    "h200": _calibrated(
        "H200", 141, 139.7, 730, 600, 208, 1187, 3.55, 50, link=NVLINK4, kernel=HOPPER
    ),
    "h20": _calibrated(
        "H20", 96, 95.0, 129, 129, 14, 178, 3.2, 50, link=NVLINK4, source=RUNS, kernel=HOPPER
    ),
    "a100-40gb": _calibrated("A100", 40, 39.4, 245, 203, 84, 374, 1.125, 25, link=NVLINK3),
    "t4": _calibrated(
        "T4", 16, 14.5, 49, 44, 6, 78, 0.26, 12, source=SHEET, bfloat16=False, kernel=OLD
    ),
    "rtx2080ti": _calibrated(
        "RTX 2080 Ti", 11, 10.5, 40, 37, 9, 129, 0.49, 12, source=SHEET, bfloat16=False, kernel=OLD
    ),
    "v100": _calibrated(
        "V100", 32, 31.7, 94, 85, 11, 0, 0.72, 12, source=SHEET, bfloat16=False, kernel=OLD
    ),
    "v100-16gb": _calibrated(
        "V100", 16, 15.7, 94, 85, 11, 0, 0.72, 12, source=SHEET, bfloat16=False, kernel=OLD
    ),
    #                  name        GB  GiB   bf16   low    tf32   mem.   bus
    "rtx5090": _sheet("RTX 5090", 32, 31.3, 209.5, 419.0, 104.8, 1.792, 50),
    "rtx5080": _sheet("RTX 5080", 16, 15.4, 112.6, 225.1, 56.3, 0.960, 50),
    "rtx5070ti": _sheet("RTX 5070 Ti", 16, 15.4, 87.9, 175.8, 43.9, 0.896, 50),
    "rtx5060ti": _sheet("RTX 5060 Ti", 16, 15.4, 47.4, 94.8, 23.7, 0.448, 25),
    "rtx4090": _calibrated("RTX 4090", 24, 23.5, 150, 147, 44, 198, 0.775, 25),
    "rtx4080": _sheet("RTX 4080", 16, 15.6, 97.5, 194.9, 48.7, 0.717, 25),
    "rtx4070tisuper": _sheet("RTX 4070 Ti Super", 16, 15.6, 88.2, 176.4, 44.1, 0.672, 25),
    "rtx4070ti": _sheet("RTX 4070 Ti", 12, 11.7, 80.2, 160.4, 40.1, 0.504, 25),
    "rtx4070": _sheet("RTX 4070", 12, 11.7, 58.3, 116.6, 29.1, 0.504, 25),
    "rtx4060ti": _sheet("RTX 4060 Ti", 16, 15.6, 44.1, 88.2, 22.1, 0.288, 12),
    "rtx3090": _sheet("RTX 3090", 24, 23.5, 71.2, 284.7, 35.6, 0.936, 25),
    "rtx3080": _sheet("RTX 3080", 10, 9.7, 59.5, 238.0, 29.8, 0.760, 25),
    "rtx3080-12gb": _sheet("RTX 3080", 12, 11.7, 61.3, 245.0, 30.6, 0.912, 25),
    "rtx3060": _sheet("RTX 3060", 12, 11.7, 25.5, 101.9, 12.7, 0.360, 25),
    "b200": _sheet("B200", 180, 178.3, 2250, 4500, 1100, 8.0, 50, link=NVLINK5),
    "h100-pcie": _sheet("H100 PCIe", 80, 79.1, 756, 1513, 378, 2.0, 50),
    "l40s": _sheet("L40S", 48, 44.3, 362, 733, 183, 0.864, 25),
    "a40": _sheet("A40", 48, 44.3, 149.7, 299.3, 74.8, 0.696, 25),
    "a6000": _sheet("RTX A6000", 48, 47.4, 154.8, 309.7, 77.4, 0.768, 25),
    "l4": _sheet("L4", 24, 22.0, 121, 242, 60, 0.300, 25),
    "a10": _sheet("A10", 24, 22.0, 125, 250, 62.5, 0.600, 25),
    "mi300x": _sheet(
        "MI300X", 192, 191.6, 1307, 2615, 653, 5.3, 50, share=0.6, link=NVLINK4, source=AMD
    ),
}
# Apple's chips share their memory between processor and GPU, and their GPUs have not run wanflow.
APPLE = re.compile(r"(m[1-9])(pro|max|ultra|)")
SMALLEST, LARGEST = 1, 1000  # GB of memory
# Compute capabilities of NVIDIA's, by how a name begins.
CAPABILITIES = {
    "V100": (7, 0),
    "T4": (7, 5),
    "RTX 20": (7, 5),
    "A100": (8, 0),
    "RTX 30": (8, 6),
    "A40": (8, 6),
    "RTX A6000": (8, 6),
    "A10": (8, 6),
    "RTX 40": (8, 9),
    "L4": (8, 9),
    "H": (9, 0),
    "B200": (10, 0),
    "RTX 50": (12, 0),
}
REPORTED = 0.975  # share of the memory a card is sold with that PyTorch reports


def apple_chip(text: str) -> tuple[str, int | None] | None:
    """Return the name of an Apple chip and its GB, if one is meant and named; else None."""
    model, size = _spelt(text)
    found = APPLE.fullmatch(model)
    if not found:
        return None
    return " ".join(["Apple", *(word.capitalize() for word in found.groups() if word)]), size


def find_card(text: str) -> Card | int:
    """Return what a name describes: a known card, or so many GB of memory.

    Any usual spelling is read: `rtx3060`, `RTX 3060 12GB`, `3060`, `a100-40gb`, `NVIDIA H100 PCIe`.

    Raises:
        RequestError: with the nearest name, for one that is unknown.
    """
    model, size = _spelt(text)
    text = printable(text, 40)
    found = [card for card in GPUS.values() if _spelt(card.name)[0] == model]
    fitting = [card for card in found if size in (None, card.size)]
    if fitting:
        return fitting[0]
    if found:
        sizes = " or ".join(f"{card.size} GB" for card in found)
        raise RequestError(
            f"--gpu {text}: {found[0].name} has {sizes}; use one of these, or the size alone, such"
            f" as {size}gb"
        )
    if not model and size is not None and SMALLEST <= size <= LARGEST:
        return size
    near = difflib.get_close_matches(model, {_spelt(key)[0]: key for key in GPUS}, 1, 0.5)
    meant = f"; did you mean {next(k for k in GPUS if _spelt(k)[0] == near[0])}?" if near else ""
    raise RequestError(
        f"--gpu {text}: unknown GPU{meant}; expected a size such as 12gb, none, an Apple chip such"
        f" as m4-max, or one of {', '.join(GPUS)}"
    )


def capability_of(name: str) -> tuple[int, int] | None:
    """Return the compute capability of a known NVIDIA GPU, by its name with or without the maker.

    None: it is another maker's, or unknown.
    """
    name = name.removeprefix("NVIDIA ")
    fitting = [start for start in CAPABILITIES if name.startswith(start)]
    return CAPABILITIES[max(fitting, key=len)] if fitting else None


def same_model(one: str, other: str) -> bool:
    """Return whether two names, of a driver or a maker, are of one model."""
    return _spelt(one)[0] == _spelt(other)[0]


def cards_of(size: int) -> Iterator[Card]:
    """Yield the known cards with so many GB that can run the model as it is."""
    return (card for card in GPUS.values() if card.size == size and card.bfloat16)


def _spelt(text: str) -> tuple[str, int | None]:
    """Return the model in a name, without makers and series, and the GB of memory in it."""
    text = text[:80].lower().replace("_", " ")
    size = re.search(r"(?<![\da-z])(\d{1,4})\s*-?gi?b?(?![a-z\d])", text)
    if size:
        text = text.replace(size[0], " ")
    text = re.sub(
        r"nvidia|geforce|tesla|quadro|amd|radeon|instinct|apple|hbm\d?e?|sxm\d?", "", text
    )
    model = re.sub(r"[^a-z0-9]", "", text)
    model = re.sub(r"^[rg]tx", "", model)
    model = {"a100pcie": "a100", "v100pcie": "v100"}.get(model, model)
    return model, int(size[1]) if size else None
