"""Run, compare and time every attention kernel and every way to multiply by weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from wanflow.runtime import DTYPES
from wanflow.transforms import attention
from wanflow.transforms.attention_kernels import BACKENDS

Say = Callable[[str], None]
Way = Callable[[Tensor, Tensor], Callable[[], Tensor]]

HEAD_DIM = 128  # of the model
# {device: (heads, tokens, side of the matrices)}: large enough to time, and small enough for ten
# runs in a few seconds and 4 GB.
SIZES = {"cpu": (2, 1024, 512), "cuda": (8, 4096, 4096), "mps": (4, 2048, 1024)}
COMPARED = 64  # rows of a product that are compared with float64
# an error, relative to the largest value, above which a rounded product counts as wrong
MAX_ERROR = 0.15


@dataclass(frozen=True)
class KernelResult:
    """The result of one way to compute.

    Attributes:
        why: why it fails; "" if it works.
        error: the largest difference from float64, relative to the largest value.
        seconds: of one call.
        lse: for attention, "" if it returns the log-sum-exp, else why not.
    """

    what: Literal["attention", "matmul"]
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
    heads, tokens, _ = SIZES[device.type]
    work = 4 * tokens * tokens * heads * HEAD_DIM
    kernels = [each for each in BACKENDS.values() if device.type in each.devices]
    for name in DTYPES:
        say(f"attention on {device} in {name}")
        for kernel in kernels:
            ran = attention.benchmark(
                kernel, device, getattr(torch, name), HEAD_DIM, (heads, tokens, tokens), repeats=2
            )
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


def _rows(x: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """Return scales [rows, 1] that bring each row's largest value to `most`, and those rows."""
    scale = x.abs().amax(1, keepdim=True).float() / most
    return scale, x / scale


def _plain(dtype: torch.dtype) -> Way:
    def prepare(x: Tensor, w: Tensor) -> Callable[[], Tensor]:
        a, b = x.to(dtype), w.to(dtype).t()
        return lambda: a @ b

    return prepare


def _fp8(x: Tensor, w: Tensor) -> Callable[[], Tensor]:
    x = x.bfloat16()
    column, b = _rows(w, 448.0)
    b = b.to(torch.float8_e4m3fn).t()

    def product() -> Tensor:
        row, a = _rows(x, 448.0)
        return torch._scaled_mm(
            a.to(torch.float8_e4m3fn), b, scale_a=row, scale_b=column.t(), out_dtype=torch.bfloat16
        )

    return product


def _int8(x: Tensor, w: Tensor) -> Callable[[], Tensor]:
    x = x.bfloat16()
    column, b = _rows(w, 127.0)
    b = b.round().to(torch.int8).t()

    def product() -> Tensor:
        row, a = _rows(x, 127.0)
        return torch._int_mm(a.round().to(torch.int8), b).float() * row * column.t()

    return product


# {(dtype, way): (x [n, n], w [n, n]) -> a function that computes x w^T}. Weights are rounded
# once; the inputs of fp8 and int8 at each call.
MATMULS: dict[tuple[str, str], Way] = {
    ("float32", "matmul"): _plain(torch.float32),
    ("bfloat16", "matmul"): _plain(torch.bfloat16),
    ("float16", "matmul"): _plain(torch.float16),
    ("fp8", "_scaled_mm"): _fp8,
    ("int8", "_int_mm"): _int8,
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
        try:
            product = prepare(x.to(device), w.to(device))
            difference = (product()[::step].cpu().double() - truth).abs().max()
            seconds = min(_timed(product, device) for _ in range(3))
        except Exception as problem:  # each device fails with types of its own
            yield replace(result, why=attention.failure(problem))
            continue
        error = float(difference / truth.abs().max())
        wrong = f"wrong numbers: error {error:.2g} of the largest value"
        yield replace(
            result,
            why="" if error <= MAX_ERROR else wrong,
            error=_finite(error),
            seconds=seconds,
            tflops=2 * n**3 / seconds / 1e12,
        )


def _timed(product: Callable[[], Tensor], device: torch.device) -> float:
    attention.synchronize(device)
    start = time.perf_counter()
    product()
    attention.synchronize(device)
    return time.perf_counter() - start


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
