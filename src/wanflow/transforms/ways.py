"""Choose how a quantised layer multiplies: by what each way computes and moves on a kind of GPU.

`weight-only` unpacks the weight and multiplies in the dtype of the run: it saves memory, not time.
`scaled_mm` (fp8) and `int_mm` (int8) round each token by its own scale too, and multiply the
rounded values. A run and a plan choose by `way_of`.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F

from wanflow import remembered
from wanflow.runtime import Quantization
from wanflow.transforms import rounding
from wanflow.untrusted import printable

logger = logging.getLogger("wanflow")

Way: TypeAlias = Literal["scaled_mm", "int_mm", "weight-only"]
Capability: TypeAlias = tuple[int, int]

ROUNDING: dict[Quantization, Way] = {"fp8": "scaled_mm", "int8": "int_mm"}
TOKENS = 75_600  # of 1280*720x81; unpacking a weight for fewer costs more beside their product
# Bytes that a way moves beside its product: of each value of the weight, of each value that goes
# in, of each that comes out. The first is unpacking in pieces, the second the kernel that rounds
# (2 B read, 1 written), the third the kernel that scales int32 sums (4 B read, 2 written).
UNPACKED = {"fp8": 19, "int8": 11}
ROUNDED, SCALED = 3, {"scaled_mm": 0, "int_mm": 6}


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU, as far as it decides a way; triton: whether kernels can be made for it."""

    capability: Capability
    triton: bool = True
    platform: str = "linux"


@dataclass(frozen=True)
class Reached:
    """FLOP/s of products in bfloat16 and of rounded ones, and bytes/s of memory."""

    bfloat16: float
    fp8: float
    int8: float
    memory: float


def _reached(bfloat16: float, fp8: float, int8: float, memory: float) -> Reached:
    return Reached(bfloat16 * 1e12, fp8 * 1e12, int8 * 1e12, memory * 1e12)


WRONG = 0.02  # relative error; bfloat16 rounds a result by 0.004
# From this capability to the next: the rates of that card in `plan/cards.py` whose memory is the
# slowest beside its products, so that no other card loses by the choice.
GENERATIONS = {
    (0, 0): _reached(94, 0, 0, 0.72),
    (8, 0): _reached(245, 0, 374, 1.125),  # A100 40 GB
    (8, 6): _reached(112, 0, 180, 0.557),  # A40
    (8, 9): _reached(271, 440, 440, 0.691),  # L40S
    (9, 0): _reached(567, 908, 908, 1.6),  # H100 PCIe
    (10, 0): _reached(1687, 2700, 2700, 6.4),  # B200
    (10, 3): _reached(1687, 2700, 0, 6.4),  # B300 has few units for int8
    (12, 0): _reached(157, 251, 251, 1.43),  # RTX 5090
}


def gpu_here(device: torch.device) -> Gpu | None:
    """Return an NVIDIA GPU of this machine; None for another device, and for one that is absent."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return Gpu(torch.cuda.get_device_capability(device), bool(triton_version()), sys.platform)


def triton_version() -> str:
    """Return the version of Triton, without importing it; "" where it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return ""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:  # a build under another name
        return "unknown"


def way_of(
    mode: Quantization, dtype: torch.dtype, gpu: Gpu | None, in_features: int, out_features: int
) -> Way:
    """Return the fastest way of a layer that a GPU has.

    fp8 gives bfloat16 results, not on Windows, where PyTorch has no such kernel. Sides are
    multiples of 16 (fp8) or 8 (int8). Without Triton tokens would be rounded in several passes,
    which take longer than the product saves.
    """
    way = ROUNDING.get(mode)
    if way is None or gpu is None or not gpu.triton:
        return "weight-only"
    rates = GENERATIONS[max(each for each in GENERATIONS if each <= gpu.capability)]
    sides = in_features | out_features  # a multiple of 16 (or 8) where both are
    if mode == "fp8":
        has = dtype == torch.bfloat16 and gpu.platform != "win32" and sides % 16 == 0
    else:
        has = dtype in (torch.bfloat16, torch.float16) and sides % 8 == 0
    if not has or not getattr(rates, mode):
        return "weight-only"
    ways: tuple[Way, Way] = (way, "weight-only")
    return min(ways, key=lambda each: seconds(mode, each, rates, in_features, out_features))


def seconds(
    mode: Quantization,
    way: Way,
    rates: Reached,
    in_features: int,
    out_features: int,
    tokens: int = TOKENS,
) -> float:
    """Return the time of one product with fp8 or int8 weights: computing, then moving bytes."""
    weight = in_features * out_features
    if way == "weight-only":
        rate, moved = rates.bfloat16, weight * UNPACKED[mode]
    else:
        rate = rates.fp8 if mode == "fp8" else rates.int8
        moved = tokens * (in_features * ROUNDED + out_features * SCALED[way])
    return 2 * tokens * weight / rate + moved / rates.memory


def choose_way(
    mode: Quantization,
    dtype: torch.dtype,
    device: torch.device,
    in_features: int,
    out_features: int,
    gpu: Gpu | None = None,
    folder: str | None = None,
) -> Way:
    """Return how a layer multiplies on a device: by `way_of`, where a small product is right.

    Args:
        mode, dtype, in_features, out_features: of the layer.
        device: of this machine.
        gpu: that of another machine, which is described and cannot be tried; it goes before.
        folder: where `remembered` keeps whether the product was right.
    """
    here = gpu or gpu_here(device)
    way = way_of(mode, dtype, here, in_features, out_features)
    if gpu is not None or here is None:
        return way
    if way != "weight-only":
        return way if _trusted(mode, dtype, device, folder) else "weight-only"
    if way_of(mode, dtype, replace(here, triton=True), in_features, out_features) != way:
        _warn(mode, "needs Triton, which is not installed here; try pip install triton")
    return way


@cache
def _warn(mode: Quantization, why: str) -> None:
    """Say once why weights are unpacked on a GPU that could round tokens."""
    text = "quantize %s: rounding tokens %s; weights are unpacked instead, which saves no time"
    logger.warning(text, mode, why)


@cache
def _trusted(
    mode: Quantization, dtype: torch.dtype, device: torch.device, folder: str | None
) -> bool:
    """Return whether a small product was right, now or in an earlier run; tell if it was not."""
    kept = remembered.of_device(folder, device)
    key = ("8-bit product", mode, dtype, triton_version())
    fault = kept.get(*key)
    if not isinstance(fault, str):
        fault = fault_of(mode, dtype, device)
        kept.put(fault, *key)
    if fault:
        again = f"; delete {folder} to try again" if folder else ""
        _warn(mode, f"failed a small product on this GPU ({printable(fault)}){again}")
    return not fault


def fault_of(mode: Quantization, dtype: torch.dtype, device: torch.device) -> str:
    """Multiply a few and many tokens on a device; return what is wrong with the result, or "".

    Raises:
        OutOfMemoryError: where the device is full, which says nothing of the product.
    """
    code = torch.int8 if mode == "int8" else torch.float8_e4m3fn
    generator = torch.Generator().manual_seed(0)
    weight, x, bias = (
        torch.randn(shape, generator=generator) for shape in ((256, 512), (1041, 512), (256,))
    )
    x[::7] *= 300  # tokens and weights of other sizes, and one without any
    x[3] = 0
    data, scale = rounding.rounded(
        weight * torch.linspace(0.01, 1, 256)[:, None], torch.float32, code
    )
    codes, rows = rounding.rounded(x, dtype, code)
    want = F.linear(codes.float() * rows, data.float() * scale, bias.to(dtype).float())
    try:
        tokens, data, scale, bias = (each.to(device) for each in (x.to(dtype), data, scale, bias))
        for count in (17, len(x)):
            got = rounding.multiply(tokens[:count], data, scale, bias, dtype).float().cpu()
            error = (got - want[:count]).abs().amax(1) / want[:count].abs().amax(1)
            worst = float(error.max())
            if not worst < WRONG:
                return f"an error of {worst:.2g} of the largest result, where {WRONG} is allowed"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a driver, a compiler or a kernel may fail in any way
        return f"{type(error).__name__}: {error}"
    return ""
