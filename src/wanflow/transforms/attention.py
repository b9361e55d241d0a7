"""Attention kernels for the `attend` slot of the DiT: which there are, where they work, and which
to take.

A kernel counts as working only after it was tried: many import and then die at their first launch,
or work and give wrong numbers.

Shapes: q [B, L, N, K], k and v [B, S, N, K] -> [B, L, N, K] (B batch, L queries, S keys, N heads of
    size K). With the log-sum-exp of each row of scores, which joins attention over parts of the
    keys (ring attention): [B, N, L] float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wanflow.config import RequestError
from wanflow.models.dit import Attend, Attention, sdpa
from wanflow.runtime import dtype_name

AttendWithLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

HALF = (torch.bfloat16, torch.float16)
ANY = (torch.float32, torch.float64, *HALF)
# How far from float64 a working kernel may be, relative to the largest value of the output. These
# tell wrong numbers, which are off by about 1, from rounding; float32's leaves room for
# TensorFloat-32 where that is allowed.
BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 2e-3, torch.float64: 1e-6}
LOSSY_BOUND = 0.15
# heads, queries, keys of a trial: no multiples of what kernels work in, and other keys than
# queries
SHAPE = (2, 130, 77)
COMPARED = 64  # queries of which a trial works out the true result


@dataclass(frozen=True)
class Backend:
    """A kernel.

    package: what has to be installed for it ("" for PyTorch's own). exact: the same to rounding;
        else it changes what is made.
    capability: CUDA compute capabilities from the first to below the second, for which it is built.
    """

    name: str
    about: str
    attend: Attend
    with_lse: AttendWithLse | None
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    package: str = ""
    exact: bool = True
    capability: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (99, 0))
    head_dim: int = 256  # the largest


@dataclass(frozen=True)
class Trial:
    """How a kernel did.

    backend: the kernel; without its `with_lse` where that one does not work here. why: why it does
        not work here, "" if it does.
    lse_why: likewise for the log-sum-exp. error: largest, relative to the largest value. seconds:
        of one call.
    """

    backend: Backend
    why: str = ""
    error: float = math.nan
    lse_why: str = ""
    lse_error: float = math.nan
    seconds: float = math.nan


def _pinned(kernel: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return sdpa(q, k, v)

    return attend


def _heads_first(*tensors: Tensor) -> Iterator[Tensor]:
    return (x.transpose(1, 2) for x in tensors)


def _finish(out: Tensor, lse: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """Some kernels return more rows of the log-sum-exp than there are queries, or a dimension at
    its end.
    """
    return out.transpose(1, 2), lse.flatten(2)[..., :queries].float()


def _math_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Written out: the whole matrix of scores is in memory."""
    wide = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = (x.to(wide) for x in _heads_first(q, k, v))
    scores = queries @ keys.mT / math.sqrt(q.shape[-1])
    lse = scores.logsumexp(-1)
    return (scores - lse.unsqueeze(-1)).exp().matmul(values).to(v.dtype).transpose(
        1, 2
    ), lse.float()


def _flash_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    aten = torch.ops.aten
    kernel = (
        aten._scaled_dot_product_flash_attention_for_cpu
        if q.device.type == "cpu"
        else aten._scaled_dot_product_flash_attention
    )
    out, lse = kernel(*_heads_first(q, k, v))[:2]
    return _finish(out, lse, q.shape[1])


def _efficient_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
        *_heads_first(q, k, v), None, True
    )[:2]
    return _finish(out, lse, q.shape[1])


def _cudnn_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *_heads_first(q, k, v), None, True
    )[:2]
    return _finish(out, lse, q.shape[1])


def _sdpa_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As `sdpa` leaves the choice to PyTorch, and PyTorch does not say the log-sum-exp, this
    chooses like it.
    """
    if q.device.type == "cpu" or (q.device.type == "cuda" and q.dtype in HALF):
        return _flash_lse(q, k, v)
    return _efficient_lse(q, k, v) if q.device.type == "cuda" else _math_lse(q, k, v)


# Packages are imported by statement, inside: torch.compile follows that, and import_module it does
# not.


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func  # type: ignore[import-not-found, import-untyped, unused-ignore]

    return flash_attn_func(q, k, v)


def _flash_attn_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_func  # type: ignore[import-not-found, import-untyped, unused-ignore]

    out, lse = flash_attn_func(q, k, v, return_attn_probs=True)[:2]
    return out, lse[..., : q.shape[1]].float()


def _flash_attn_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found, import-untyped, unused-ignore]

    out = flash_attn_func(q, k, v)
    return (
        out[0] if isinstance(out, tuple) else out
    )  # builds from before 2025-08 return the log-sum-exp always, and take no flag for it


def _flash_attn_3_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found, import-untyped, unused-ignore]

    try:
        out, lse = flash_attn_func(q, k, v, return_attn_probs=True)[:2]
    except TypeError:
        out, lse = flash_attn_func(q, k, v)[:2]
    return out, lse[..., : q.shape[1]].float()


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from sageattention import sageattn  # type: ignore[import-not-found, import-untyped, unused-ignore]

    return sageattn(q, k, v, tensor_layout="NHD", is_causal=False)


AMPERE, HOPPER, NEXT = (8, 0), (9, 0), (10, 0)

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("sdpa", "PyTorch chooses", sdpa, _sdpa_lse, ("cpu", "cuda", "mps"), ANY),
        Backend(
            "cudnn",
            "cuDNN's",
            _pinned(SDPBackend.CUDNN_ATTENTION),
            _cudnn_lse,
            ("cuda",),
            HALF,
            capability=(AMPERE, (99, 0)),
        ),
        Backend(
            "flash",
            "PyTorch's FlashAttention",
            _pinned(SDPBackend.FLASH_ATTENTION),
            _flash_lse,
            ("cpu", "cuda"),
            ANY,
        ),
        Backend(
            "efficient",
            "PyTorch's memory-efficient",
            _pinned(SDPBackend.EFFICIENT_ATTENTION),
            _efficient_lse,
            ("cuda",),
            (torch.float32, *HALF),
            capability=((5, 0), (99, 0)),
        ),
        Backend(
            "math",
            "plain matrix products, memory grows with L squared",
            _pinned(SDPBackend.MATH),
            _math_lse,
            ("cpu", "cuda"),
            ANY,
        ),
        Backend(
            "flash_attn",
            "FlashAttention 2",
            _flash_attn,
            _flash_attn_lse,
            ("cuda",),
            HALF,
            "flash_attn",
            capability=(AMPERE, (99, 0)),
        ),
        Backend(
            "flash_attn_3",
            "FlashAttention 3",
            _flash_attn_3,
            _flash_attn_3_lse,
            ("cuda",),
            HALF,
            "flash_attn_interface",
            capability=(HOPPER, NEXT),
        ),
        Backend(
            "sage",
            "SageAttention, 8-bit",
            _sage,
            None,
            ("cuda",),
            HALF,
            "sageattention",
            exact=False,
            capability=(AMPERE, (99, 0)),
            head_dim=128,
        ),
    )
}


def order(device: torch.device) -> tuple[str, ...]:
    """What `auto` tries, best first: exact kernels only, and none whose memory grows with the
    square of the tokens before the last.

    From Hopper on cuDNN's is the fastest that needs no package (FlashAttention 3 is faster where
    somebody went to the length of building it). Before Hopper cuDNN's has no such lead, and
    PyTorch's FlashAttention is the same kernel as the flash_attn package. float32 has only the
    memory-efficient kernel on CUDA. Elsewhere PyTorch's own choice is the only good one.
    """
    if device.type != "cuda":
        return ("sdpa",)
    if _capability(device) >= HOPPER:
        return ("flash_attn_3", "cudnn", "flash", "flash_attn", "efficient", "sdpa")
    return ("flash", "flash_attn", "cudnn", "efficient", "sdpa")


def choose_kernel(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """The kernel of this name; `auto` is the first of `order` that works. Each is tried on the
    device before it is trusted.

    Raises:
        RequestError: for a name that is unknown or does not work here, with the reason and what
            does work.
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
    """What is known of this kernel beside quantised weights ("fp8", "int8", "nf4" or ""), in
    words.
    """
    notes = (
        []
        if backend.exact
        else [
            f"attention {backend.name} rounds to 8 bits inside: the video differs from the exact"
            " kernels'"
        ]
    )
    if backend.name == "sage" and quantize == "fp8":
        notes.append(
            "attention sage with fp8 weights is known to give black frames; if it does, use"
            " --attention auto"
        )
    return notes


def set_attention(model: nn.Module, backend: Backend) -> None:
    """Put the kernel into every attention of a WanDiT, to itself and to the text. One function for
    all, so compiling sees one.
    """
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = backend.attend


# trials


def benchmark(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int = 128,
    shape: tuple[int, int, int] = SHAPE,
    repeats: int = 0,
) -> Trial:
    """Run a kernel on random numbers and compare it, and its log-sum-exp, with float64 on the CPU.

    Args:
        shape: (heads, queries, keys).
        repeats: how often to run it again for the time (the least counts).
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
        # kernels fail in every way there is: at import, at compiling, at launch, at synchronising
        return Trial(backend, words(problem))
    if not error <= bound:  # NaN too
        return Trial(
            backend,
            f"it gives wrong numbers: {error:.2g} of the largest value away from float64",
            error,
            seconds=seconds,
        )
    if backend.with_lse is None:
        return Trial(backend, "", error, "it does not say the log-sum-exp", seconds=seconds)
    lse_why, lse_error = "", math.nan
    try:
        with torch.no_grad():
            out, lse = backend.with_lse(q, k, v)
        lse_error, again = (
            _distance(lse[..., ::step], true_lse),
            _distance(out[:, ::step], truth) / scale,
        )
        if not (lse_error <= bound and again <= bound):
            lse_why = (
                f"its log-sum-exp is wrong by {lse_error:.2g}, the output beside it by {again:.2g}"
            )
    except Exception as problem:
        lse_why = words(problem)
    return Trial(
        replace(backend, with_lse=None) if lse_why else backend,
        "",
        error,
        lse_why,
        lse_error,
        seconds,
    )


def unsupported_reason(
    backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int
) -> str:
    """Why a kernel cannot work here, as far as is known without running it; "" where nothing speaks
    against it.
    """
    if device.type not in backend.devices:
        return f"it runs on {' and '.join(backend.devices)} only, not on {device.type}"
    if dtype not in backend.dtypes or (
        backend.name == "flash" and device.type == "cuda" and dtype not in HALF
    ):
        return f"it does not compute in {dtype_name(dtype)}"
    if head_dim > backend.head_dim:
        return f"its heads are at most {backend.head_dim} wide, and these are {head_dim}"
    if backend.package and not installed(backend.package):
        return f"the package {backend.package} is not installed"
    if device.type != "cuda":
        return ""
    here, (first, end) = _capability(device), backend.capability
    if not first <= here < end:
        made = f"from {_dotted(first)}" + (f" to below {_dotted(end)}" if end < (99, 0) else "")
        known = (
            "; on Blackwell it imports and then dies with 'no kernel image'"
            if backend.name == "flash_attn_3" and here >= end
            else ""
        )
        return f"it is built for compute capability {made}, and this GPU has {_dotted(here)}{known}"
    if backend.name == "sage" and here[0] == HOPPER[0] and _has_fp8_values():
        return (
            "on Hopper SageAttention 2 multiplies the values in fp8, which is known to give noise"
            " with Wan2.2"
        )
    return ""


def installed(package: str) -> bool:
    """Whether a module is found, without importing it: to import can take seconds, and fail."""
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def broken(package: str) -> str:
    """Why a module that is installed does not import; "" if it does."""
    try:
        import_module(package)
    except Exception as problem:  # a build for another PyTorch, GPU or system raises anything
        return f"{type(problem).__name__}: {problem}".splitlines()[0]
    return ""


def _has_fp8_values() -> bool:
    """SageAttention 2 picks its fp8 kernel on Hopper; version 1 has none."""
    try:
        import sageattention  # type: ignore[import-not-found, import-untyped, unused-ignore]

        return hasattr(sageattention, "sageattn_qk_int8_pv_fp8_cuda_sm90")
    except Exception:  # the trial says what is wrong with it
        return False


def _truth(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64, on the CPU: MPS has no float64."""
    q, k, v = (x.cpu().double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.cpu().double() - b).abs().max())


def _timed(backend: Backend, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Seconds of one call."""
    wait(q.device)
    start = time.perf_counter()
    backend.attend(q, k, v)
    wait(q.device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def words(problem: Exception) -> str:
    """The first line of what was raised."""
    text = str(problem).strip().splitlines()
    return f"it fails here ({type(problem).__name__}{': ' + text[0] if text else ''})"
