"""What works here: every attention kernel and every way to multiply by weights is run, compared and
timed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from wanflow.runtime import dtype_name
from wanflow.transforms import attention

Say = Callable[[str], None]
Way = Callable[[Tensor, Tensor], Callable[[], Tensor]]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIM = 128  # of the model
# (heads, tokens) of attention, and the side of the matrices: enough to time, little enough for ten
# tries in seconds and 4 GB.
SIZES = {"cpu": (2, 1024, 512), "cuda": (8, 4096, 4096), "mps": (4, 2048, 1024)}
COMPARED = 64  # rows of a product that are compared with float64
# largest error relative to the largest value at which a rounded product still counts as one
WORKS = 0.15


@dataclass(frozen=True)
class KernelResult:
    """One way to compute, tried.

    why: why it does not work, "" if it does. error: the largest against float64, relative to the
        largest value. seconds: of one call.
    lse: of attention, "" if it also says the log-sum-exp, else why not.
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
    """Every kernel that is made for this kind of device, in each dtype."""
    heads, tokens, _ = SIZES[device.type]
    work = 4 * tokens * tokens * heads * HEAD_DIM
    for dtype in DTYPES:
        say(f"attention on {device} in {dtype_name(dtype)}")
        for backend in attention.BACKENDS.values():
            if device.type in backend.devices:
                tried = attention.benchmark(
                    backend, device, dtype, HEAD_DIM, (heads, tokens, tokens), repeats=2
                )
                seconds = _number(tried.seconds)
                speed = work / seconds / 1e12 if seconds else None
                lse = None if tried.why else tried.lse_why
                yield KernelResult(
                    "attention",
                    str(device),
                    dtype_name(dtype),
                    backend.name,
                    tried.why,
                    _number(tried.error),
                    seconds,
                    speed,
                    lse,
                )


def _rows(x: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """Scales [rows, 1] that bring each row's largest value to `most`, and the rows so scaled."""
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


# {(dtype, way): x [n, n], w [n, n] -> what computes x w^T}: the weights are rounded before, fp8's
# and int8's inputs at each call.
MATMULS: dict[tuple[str, str], Way] = {
    ("float32", "matmul"): _plain(torch.float32),
    ("bfloat16", "matmul"): _plain(torch.bfloat16),
    ("float16", "matmul"): _plain(torch.float16),
    ("fp8", "_scaled_mm"): _fp8,
    ("int8", "_int_mm"): _int8,
}


def try_matmul(device: torch.device, say: Say = lambda _: None) -> Iterator[KernelResult]:
    """The ways to multiply by weights, errors against the product of unrounded numbers."""
    say(f"matrix products on {device}")
    n = SIZES[device.type][2]
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, n, generator=generator) for _ in range(2))
    step = max(1, n // COMPARED)
    truth = x[::step].double() @ w.double().t()
    for (dtype, way), prepare in MATMULS.items():
        try:
            product = prepare(x.to(device), w.to(device))
            error = float(
                (product()[::step].cpu().double() - truth).abs().max() / truth.abs().max()
            )
            times = []
            for _ in range(3):
                attention.wait(device)
                start = time.perf_counter()
                product()
                attention.wait(device)
                times.append(time.perf_counter() - start)
        except Exception as problem:  # as with attention: each device has its own way to fail
            yield KernelResult("matmul", str(device), dtype, way, attention.words(problem))
            continue
        why = (
            ""
            if error <= WORKS
            else f"it gives wrong numbers, {error:.2g} of the largest value away"
        )
        yield KernelResult(
            "matmul",
            str(device),
            dtype,
            way,
            why,
            _number(error),
            min(times),
            2 * n**3 / min(times) / 1e12,
        )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
