"""Run, compare and time every attention kernel, product with weights, and convolution."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wanflow.runtime import DTYPES
from wanflow.transforms import attention, rounding
from wanflow.transforms.attention_kernels import BACKENDS
from wanflow.transforms.attention_timing import BUDGET, timed_width

Say = Callable[[str], None]
Way = Callable[[Tensor, Tensor], Callable[[], Tensor]]

HEAD_DIM = 128  # of the model
# {device: (heads, tokens, side of the matrices)}: large enough to time, and small enough for a few
# seconds and 4 GB. On a GPU the heads are the model's, and a run's choice times as many tokens.
SIZES = {"cpu": (2, 1024, 512), "cuda": (40, 16_336, 4096), "mps": (4, 2048, 1024)}
COMPARED = 64  # rows of a product that are compared with float64
# an error, relative to the largest value, above which a rounded product counts as wrong
MAX_ERROR = 0.15
# {dtype: error of a convolution above which it counts as wrong}, relative to the largest value
CONVOLUTION_ERRORS = {"float32": 1e-4, "tf32": 1e-2}
CHANNELS = 96  # of the VAE's widest layers


@dataclass(frozen=True)
class KernelResult:
    """The result of one way to compute.

    Attributes:
        why: why it fails; "" if it works.
        error: the largest difference from float64, relative to the largest value.
        seconds: of one call.
        lse: for attention, "" if it returns the log-sum-exp, else why not.
    """

    what: Literal["attention", "matmul", "convolution"]
    device: str
    dtype: str
    way: str
    why: str = ""
    error: float | None = None
    seconds: float | None = None
    tflops: float | None = None
    lse: str | None = None


def try_attention(device: torch.device, say: Say = lambda _: None) -> Iterator[KernelResult]:
    """Run every attention kernel for this kind of device, in each dtype."""
    heads, most, _ = SIZES[device.type]
    kernels = [each for each in BACKENDS.values() if device.type in each.devices]
    for name in DTYPES:
        say(f"attention on {device} in {name}")
        dtype: torch.dtype = getattr(torch, name)
        tokens = timed_width(device, heads, HEAD_DIM, dtype, most).tokens
        work = 4 * tokens * tokens * heads * HEAD_DIM
        for kernel in kernels:
            shape = heads, tokens, tokens
            timed = kernel.name != "math" or device.type != "cuda"  # else its scores fill the GPU
            how = (shape, BUDGET) if timed else (attention.SHAPE,)
            ran = attention.benchmark(kernel, device, dtype, HEAD_DIM, *how)
            seconds = _finite(ran.seconds)
            yield KernelResult(
                "attention",
                str(device),
                name,
                kernel.name,
                why=ran.why,
                error=_finite(ran.error),
                seconds=seconds,
                tflops=work / seconds / 1e12 if seconds else None,
                lse=None if ran.why else ran.lse_why,
            )


def _plain(dtype: torch.dtype) -> Way:
    def prepare(x: Tensor, w: Tensor) -> Callable[[], Tensor]:
        a, b = x.to(dtype), w.to(dtype).t()
        return lambda: a @ b

    return prepare


def _rounded(code: torch.dtype) -> Way:
    def prepare(x: Tensor, w: Tensor) -> Callable[[], Tensor]:
        x, (data, scale) = x.bfloat16(), rounding.rounded(w, torch.float32, code)
        return lambda: rounding.multiply(x, data, scale, None, torch.bfloat16)

    return prepare


# {(dtype, way): (x [n, n], w [n, n]) -> a function that computes x w^T}. Weights are rounded
# once; the inputs of fp8 and int8 at each call.
MATMULS: dict[tuple[str, str], Way] = {
    ("float32", "matmul"): _plain(torch.float32),
    ("bfloat16", "matmul"): _plain(torch.bfloat16),
    ("float16", "matmul"): _plain(torch.float16),
    ("fp8", "_scaled_mm"): _rounded(torch.float8_e4m3fn),
    ("int8", "_int_mm"): _rounded(torch.int8),
}


def try_matmul(device: torch.device, say: Say = lambda _: None) -> Iterator[KernelResult]:
    """Run each way to multiply by weights; errors are against the unrounded product."""
    say(f"matrix products on {device}")
    n = SIZES[device.type][2]
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, n, generator=generator) for _ in range(2))
    step = max(1, n // COMPARED)
    truth = x[::step].double() @ w.double().t()
    for (dtype, way), prepare in MATMULS.items():
        result = KernelResult("matmul", str(device), dtype, way)
        run = partial(_multiply, prepare, x, w, device, step)
        yield _tried(result, run, truth, MAX_ERROR, 2 * n**3)


def try_convolution(device: torch.device, say: Say = lambda _: None) -> Iterator[KernelResult]:
    """Run the VAE's kinds of convolution against float64 on the CPU; on a GPU in TF32 too.

    PyTorch convolves in TF32 by default, and some versions of cuDNN do it wrongly in three
    dimensions.
    """
    say(f"convolutions on {device}")
    generator = torch.Generator().manual_seed(0)
    for convolve, extent in ((F.conv2d, (30, 34)), (F.conv3d, (4, 22, 26))):
        x = torch.randn(1, CHANNELS, *extent, generator=generator)
        w = torch.randn(CHANNELS, CHANNELS, *[3] * len(extent), generator=generator)
        truth = convolve(x.double(), w.double())
        work = 2 * truth[0, 0].numel() * w.numel()
        for dtype in CONVOLUTION_ERRORS if device.type == "cuda" else ("float32",):
            result = KernelResult("convolution", str(device), dtype, convolve.__name__)
            run = partial(_convolve, convolve, x, w, device, dtype == "tf32")
            yield _tried(result, run, truth, CONVOLUTION_ERRORS[dtype], work)


def _multiply(
    prepare: Way, x: Tensor, w: Tensor, device: torch.device, step: int
) -> tuple[Tensor, float]:
    product = prepare(x.to(device), w.to(device))
    return product()[::step], attention.shortest(product, device, BUDGET)


def _convolve(
    convolve: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    w: Tensor,
    device: torch.device,
    allowed: bool,
) -> tuple[Tensor, float]:
    call = partial(convolve, x.to(device), w.to(device))
    with tensor_float(device, allowed):
        return call(), attention.shortest(call, device, BUDGET / 5)


def _tried(
    result: KernelResult,
    run: Callable[[], tuple[Tensor, float]],
    truth: Tensor,
    most: float,
    work: int,
) -> KernelResult:
    """Return a result with what a run gave: its error against the truth, and its rate."""
    try:
        found, seconds = run()
        difference = (found.cpu().double() - truth).abs().max()
    except Exception as problem:  # each device fails with types of its own
        return replace(result, why=attention.failure(problem))
    error = float(difference / truth.abs().max())
    wrong = f"wrong numbers: error {error:.2g} of the largest value"
    return replace(
        result,
        why="" if error <= most else wrong,
        error=_finite(error),
        seconds=seconds,
        tflops=work / seconds / 1e12,
    )


def tensor_float(device: torch.device, allowed: bool) -> AbstractContextManager[None]:
    """Let cuDNN convolve in TF32, or not."""
    if device.type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
