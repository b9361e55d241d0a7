"""Choose an attention kernel: try each on the device, and put the first that works into a model.

A kernel counts as working only after a trial: many import and then die at their first launch, or
run and give wrong numbers.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from wanflow.config import RequestError
from wanflow.models.dit import Attention
from wanflow.runtime import dtype_name
from wanflow.transforms.attention_kernels import (
    BACKENDS,
    HALF,
    HOPPER,
    NO_LIMIT,
    Backend,
    Capability,
)

# How far from float64 a working kernel may be, relative to the largest value of the output. Wrong
# numbers are off by about 1; float32's bound leaves room for TensorFloat-32 where that is allowed.
BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 2e-3, torch.float64: 1e-6}
LOSSY_BOUND = 0.15
# Heads, queries and keys of a trial: no multiples of a kernel's tiles, and not as many keys as
# queries.
SHAPE = (2, 130, 77)
COMPARED = 64  # queries whose true result a trial computes


@dataclass(frozen=True)
class Trial:
    """The result of one kernel.

    backend: the kernel; without its `with_lse` where that one fails.
    why, lse_why: why the kernel, or its log-sum-exp, fails here; "" where it works.
    error, lse_error: the largest, relative to the largest value.
    seconds: of one call.
    """

    backend: Backend
    why: str = ""
    error: float = math.nan
    lse_why: str = ""
    lse_error: float = math.nan
    seconds: float = math.nan


# Choice


def order(device: torch.device) -> tuple[str, ...]:
    """Return what `auto` tries, best first: exact kernels, memory linear in tokens but the last.

    From Hopper on cuDNN's is the fastest that needs no package; FlashAttention 3 is faster where it
    has been built. Before Hopper cuDNN's has no such lead, and PyTorch's FlashAttention is the same
    kernel as the flash_attn package. float32 has only the memory-efficient kernel on CUDA. On other
    devices only PyTorch's own choice is good.
    """
    if device.type != "cuda":
        return ("sdpa",)
    if _capability(device) >= HOPPER:
        return ("flash_attn_3", "cudnn", "flash", "flash_attn", "efficient", "sdpa")
    return ("flash", "flash_attn", "cudnn", "efficient", "sdpa")


def choose_kernel(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """Return the kernel of this name after a trial; `auto` is the first of `order` that works.

    Raises:
        RequestError: for a name that is unknown or fails here, with the reason and what works.
    """
    if name != "auto" and name not in BACKENDS:
        raise RequestError(f"attention {name!r} is none of auto, {', '.join(BACKENDS)}")
    reasons = []
    for candidate in order(device) if name == "auto" else (name,):
        trial = benchmark(BACKENDS[candidate], device, dtype, head_dim)
        if not trial.why:
            return trial.backend
        reasons.append(f"attention {candidate}: {trial.why}")
    others = [
        other
        for other, backend in BACKENDS.items()
        if other != name and not benchmark(backend, device, dtype, head_dim).why
    ]
    if name != "auto" and set(others) & set(order(device)):
        others.insert(0, "auto")
    works = f"these work: {', '.join(others)}" if others else "nothing else works either"
    raise RequestError(
        *reasons, f"  on {device} with {dtype_name(dtype)} {works}; `wanflow doctor` tries them all"
    )


def warnings_for(backend: Backend, quantize: str) -> list[str]:
    """Return the known faults of a kernel with weights in "fp8", "int8", "nf4" or plain ("")."""
    notes = []
    if not backend.exact:
        notes.append(
            f"attention {backend.name} rounds to 8 bits inside: the video differs from the exact"
            " kernels'"
        )
    if backend.name == "sage" and quantize == "fp8":
        notes.append(
            "attention sage with fp8 weights is known to give black frames; if it does, use"
            " --attention auto"
        )
    return notes


def set_attention(model: nn.Module, backend: Backend) -> None:
    """Put a kernel into every attention of a WanDiT.

    All share one function, so that torch.compile compiles it once.
    """
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = backend.attend


# Trials


def benchmark(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int = 128,
    shape: tuple[int, int, int] = SHAPE,
    repeats: int = 0,
) -> Trial:
    """Run a kernel on random numbers; compare output and log-sum-exp with float64 on the CPU.

    Args:
        shape: (heads, queries, keys).
        repeats: runs for the time; the shortest counts.
    """
    why = unsupported_reason(backend, device, dtype, head_dim)
    if why:
        return Trial(backend, why)
    heads, queries, keys = shape
    generator = torch.Generator().manual_seed(0)
    step = max(1, queries // COMPARED)
    bound = BOUNDS[dtype] if backend.exact else LOSSY_BOUND
    try:
        q, k, v = (
            torch.randn(1, rows, heads, head_dim, generator=generator).to(device, dtype)
            for rows in (queries, keys, keys)
        )
        truth, true_lse = _truth(q[:, ::step], k, v)
        scale = float(truth.abs().max())
        with torch.no_grad():
            error = _distance(backend.attend(q, k, v)[:, ::step], truth) / scale
            seconds = min((_timed(backend, q, k, v) for _ in range(repeats)), default=math.nan)
    except Exception as problem:
        # Kernels fail at import, at compiling, at launch and at synchronising, with any exception.
        return Trial(backend, failure(problem))
    if not error <= bound:  # NaN too
        why = f"it gives wrong numbers: {error:.2g} of the largest value away from float64"
        return Trial(backend, why, error, seconds=seconds)
    if backend.with_lse is None:
        return Trial(backend, "", error, "it does not return the log-sum-exp", seconds=seconds)
    lse_why, lse_error = "", math.nan
    try:
        with torch.no_grad():
            out, lse = backend.with_lse(q, k, v)
        lse_error = _distance(lse[..., ::step], true_lse)
        out_error = _distance(out[:, ::step], truth) / scale
        if not (lse_error <= bound and out_error <= bound):
            lse_why = (
                f"its log-sum-exp is wrong by {lse_error:.2g}, the output with it by"
                f" {out_error:.2g}"
            )
    except Exception as problem:
        lse_why = failure(problem)
    works = replace(backend, with_lse=None) if lse_why else backend
    return Trial(works, "", error, lse_why, lse_error, seconds)


def unsupported_reason(
    backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int
) -> str:
    """Return why a kernel cannot work here, as far as is known without a trial; else ""."""
    if device.type not in backend.devices:
        return f"it runs on {' and '.join(backend.devices)} only, not on {device.type}"
    flash_on_gpu = backend.name == "flash" and device.type == "cuda"
    if dtype not in backend.dtypes or (flash_on_gpu and dtype not in HALF):
        return f"it does not compute in {dtype_name(dtype)}"
    if head_dim > backend.head_dim:
        return f"its heads are at most {backend.head_dim} wide, and these are {head_dim}"
    if backend.package and not installed(backend.package):
        return f"the package {backend.package} is not installed"
    if device.type != "cuda":
        return ""
    here, (first, end) = _capability(device), backend.capability
    if not first <= here < end:
        built = f"from {_dotted(first)}" + (f" to below {_dotted(end)}" if end < NO_LIMIT else "")
        known = ""
        if backend.name == "flash_attn_3" and here >= end:
            known = "; on Blackwell it imports and then dies with 'no kernel image'"
        return (
            f"it is built for compute capability {built}, and this GPU has {_dotted(here)}{known}"
        )
    if backend.name == "sage" and here[0] == HOPPER[0] and _has_fp8_values():
        return (
            "on Hopper SageAttention 2 multiplies the values in fp8, which is known to give noise"
            " with Wan2.2"
        )
    return ""


def installed(package: str) -> bool:
    """Return whether a module is found, without an import, which can take seconds and fail."""
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def import_failure(package: str) -> str:
    """Return why an installed module does not import; "" if it does."""
    try:
        import_module(package)
    except Exception as problem:  # a build for another PyTorch, GPU or system raises anything
        return f"{type(problem).__name__}: {problem}".splitlines()[0]
    return ""


def _has_fp8_values() -> bool:
    """Whether SageAttention picks its fp8 kernel on Hopper: version 2 does, 1 has none."""
    try:
        import sageattention  # type: ignore[import-not-found, import-untyped, unused-ignore]

        return hasattr(sageattention, "sageattn_qk_int8_pv_fp8_cuda_sm90")
    except Exception:  # the trial reports its fault
        return False


def _truth(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64, on the CPU: MPS has no float64."""
    q, k, v = (x.cpu().double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.cpu().double() - b).abs().max())


def _timed(backend: Backend, q: Tensor, k: Tensor, v: Tensor) -> float:
    synchronize(q.device)
    start = time.perf_counter()
    backend.attend(q, k, v)
    synchronize(q.device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _capability(device: torch.device) -> Capability:
    return torch.cuda.get_device_capability(device)


def _dotted(version: Capability) -> str:
    return ".".join(map(str, version))


def failure(problem: Exception) -> str:
    """Return the type and the first line of an exception, as a clause."""
    text = str(problem).strip().splitlines()
    return f"it fails here ({type(problem).__name__}{': ' + text[0] if text else ''})"
