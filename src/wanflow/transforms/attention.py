"""Choose an attention kernel: try each on the device, and put the first that works into a model.

A kernel counts as working only after a trial: many import and then die at their first launch, or
run and give wrong numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib import import_module, metadata
from importlib.machinery import PathFinder
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from wanflow.config import RequestError
from wanflow.models.dit import Attention
from wanflow.runtime import dtype_name
from wanflow.transforms.attention_kernels import (
    AMPERE,
    BACKENDS,
    BLACKWELL,
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
COMPARED = 64  # queries whose true result a trial computes, in the first and in the last head
# Older versions of cuDNN read past the end of lengths that are no multiple of 128, as 75,600 is.
SOUND_CUDNN = 91501
FUSED = ("flash", "cudnn", "efficient")  # PyTorch's own, whose memory is linear in tokens


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


@dataclass(frozen=True)
class Card:
    """What decides which kernels a GPU has; `cudnn` is a number such as 91501, 0 for none."""

    capability: Capability
    cudnn: int = 0
    amd: bool = False

    @property
    def bfloat16(self) -> bool:
        """Whether it computes in bfloat16; others convert each value to float32 and back."""
        return self.amd or self.capability >= AMPERE


def card_of(device: torch.device) -> Card | None:
    """Return the facts of a GPU; None: the device is none that PyTorch calls "cuda"."""
    if device.type != "cuda":
        return None
    cudnn = torch.backends.cudnn.version() or 0
    return Card(torch.cuda.get_device_capability(device), cudnn, torch.version.hip is not None)


# Choice


def order(card: Card | None, small: bool = True) -> tuple[str, ...]:
    """Return what `auto` tries, best first: exact kernels whose memory is linear in tokens.

    Only on Hopper has cuDNN's been the fastest of PyTorch's own. PyTorch's FlashAttention is the
    same kernel as the flash_attn package. float32, and GPUs before Ampere, have only the
    memory-efficient one. On other devices only PyTorch's own choice is good; on a GPU it may take
    plain matrix products, which a small model can afford.
    """
    if card is None:
        return ("sdpa",)
    if card.amd:
        names: tuple[str, ...] = ("flash", "flash_attn", "efficient")
    elif HOPPER <= card.capability < BLACKWELL:
        names = ("flash_attn_3", "cudnn", "flash_attn_4", "flash", "flash_attn", "efficient")
    elif card.capability >= BLACKWELL:
        names = ("flash_attn_4", "flash", "flash_attn", "cudnn", "efficient")
    else:
        names = ("flash", "flash_attn", "cudnn", "flash_attn_4", "efficient")
    return (*names, "sdpa") if small else names


def choose_kernel(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, small: bool = True
) -> Backend:
    """Return the kernel of this name after a trial; `auto` is the first of `order` that works.

    Args:
        name: `auto`, or one of `BACKENDS`.
        device, dtype, head_dim: of the model.
        small: whether the matrix of scores fits into memory, so that PyTorch may take plain matrix
            products.

    Raises:
        RequestError: for a name that is unknown or fails here, with the reason and what works.
    """
    if name != "auto" and name not in BACKENDS:
        raise RequestError(f"attention {name!r} is none of auto, {', '.join(BACKENDS)}")
    card, reasons = card_of(device), []
    names = order(card, small)

    def tried(candidate: str) -> Trial:
        trial = benchmark(BACKENDS[candidate], device, dtype, head_dim)
        plain = candidate == "sdpa" and not small and device.type == "cuda" and not trial.why
        if plain and all(benchmark(BACKENDS[one], device, dtype, head_dim).why for one in FUSED):
            why = "PyTorch has no fused kernel here, and all scores would be in memory at once"
            return replace(trial, why=why)
        return trial

    for candidate in names if name == "auto" else (name,):
        trial = tried(candidate)
        if not trial.why:
            return trial.backend
        reasons.append(f"attention {candidate}: {trial.why}")
    others = [other for other in BACKENDS if other != name and not tried(other).why]
    if name != "auto" and set(others) & set(names):
        others.insert(0, "auto")
    works = f"these work: {', '.join(others)}" if others else "nothing else works either"
    if card is not None and dtype == torch.bfloat16 and not card.bfloat16:
        works = f"{works}; this GPU does not compute in bfloat16, use --dtype float16"
    where = f"on {device} with {dtype_name(dtype)}"
    raise RequestError(*reasons, f"  {where} {works}; `wanflow doctor` tries them all")


def warnings_for(backend: Backend, quantize: str) -> list[str]:
    """Return the known faults of a kernel with weights in "fp8", "int8", "nf4" or plain ("")."""
    notes = []
    if not backend.exact:
        notes.append(
            f"attention {backend.name} ({backend.about}) rounds inside: the video differs from the"
            " exact kernels'"
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
    budget: float = 0.0,
) -> Trial:
    """Run a kernel on random numbers; compare output and log-sum-exp with float64 on the CPU.

    Args:
        shape: (heads, queries, keys).
        budget: seconds of calls, of which the shortest counts; 0: no time is taken.
    """
    why = unsupported_reason(backend, device, dtype, head_dim)
    if why:
        return Trial(backend, why)
    try:
        with torch.no_grad(), _current(device):
            q, k, v = _random(shape, head_dim, device, dtype)
            truth = _Truth(q, k, v)
            error, _ = truth.errors(backend.attend(q, k, v))
            seconds = shortest(lambda: backend.attend(q, k, v), device, budget)
    except Exception as problem:
        # Kernels fail at import, at compiling, at launch and at synchronising, with any exception.
        return Trial(backend, failure(problem))
    bound = BOUNDS[dtype] if backend.exact else LOSSY_BOUND
    if not error <= bound:  # NaN too
        why = f"it gives wrong numbers: {error:.2g} of the largest value away from float64"
        return Trial(backend, why, error, seconds=seconds)
    if backend.with_lse is None:
        return Trial(backend, "", error, "it does not return the log-sum-exp", seconds=seconds)
    lse_why, lse_error = "", math.nan
    try:
        with torch.no_grad(), _current(device):
            out_error, lse_error = truth.errors(*backend.with_lse(q, k, v))
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
    if dtype not in backend.dtypes:
        return f"it does not compute in {dtype_name(dtype)}"
    if head_dim > backend.head_dim:
        return f"its heads are at most {backend.head_dim} wide, and these are {head_dim}"
    if backend.package and not installed(backend.package):
        return f"the package {backend.package} is not installed"
    card = card_of(device)
    return "" if card is None else lacking(backend, card, dtype)


def lacking(backend: Backend, card: Card, dtype: torch.dtype) -> str:
    """Return why a kernel cannot work on such a GPU; else ""."""
    name, here = backend.name, card.capability
    if name == "flash" and dtype not in HALF:
        return f"it does not compute in {dtype_name(dtype)}"
    if card.amd:
        return "" if backend.amd else "it is built for NVIDIA GPUs only"
    first, end = backend.capability
    if not first <= here < end:
        built = f"from {_dotted(first)}" + (f" to below {_dotted(end)}" if end < NO_LIMIT else "")
        known = ""
        if name == "flash_attn_3" and here >= end:
            known = "; on Blackwell it imports and then dies with 'no kernel image'"
        return (
            f"it is built for compute capability {built}, and this GPU has {_dotted(here)}{known}"
        )
    if name == "efficient" and dtype == torch.bfloat16 and here < AMPERE:
        return f"below compute capability 8.0 it does not compute in {dtype_name(dtype)}"
    if name == "cudnn" and card.cudnn < SOUND_CUDNN:
        major, rest = divmod(card.cudnn, 10000)
        return (
            f"cuDNN {major}.{rest // 100}.{rest % 100} reads past the end of lengths that are no"
            " multiple of 128; it needs 9.15.1 or newer"
        )
    if name == "sage" and here[0] == HOPPER[0] and _has_fp8_values():
        return (
            "on Hopper SageAttention 2 multiplies the values in fp8, which is known to give noise"
            " with Wan2.2"
        )
    return ""


def installed(package: str) -> bool:
    """Return whether a module is found, without an import, which can take seconds and fail."""
    name, _, inner = package.partition(".")
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    if inner:
        return PathFinder.find_spec(package, spec.submodule_search_locations) is not None
    return spec.origin is not None  # else a folder for parts of others, as FlashAttention 4 leaves


def version_of(distribution: str) -> str:
    """Return the version of an installed distribution, such as a kernel's."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown version"


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


def _random(
    shape: tuple[int, int, int], head_dim: int, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Return q, k, v [1, rows, heads, head_dim], made on the device.

    The keys have a mean, which a kernel that subtracts it may forget in its log-sum-exp.
    """
    heads, queries, keys = shape
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, rows, heads, head_dim, generator=generator, device=device, dtype=dtype)
        for rows in (queries, keys, keys)
    )
    return [q, k.add_(1), v]


class _Truth:
    """Some rows of output and log-sum-exp in float64, on the CPU: MPS has no float64."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.rows = torch.linspace(0, q.shape[1] - 1, min(COMPARED, q.shape[1])).long()
        self.heads = slice(None, None, max(1, q.shape[2] - 1))
        queries = self._some(q)[:, :, self.rows]
        keys, values = self._some(k), self._some(v)
        scores = queries @ keys.mT / math.sqrt(q.shape[-1])
        self.out, self.lse = scores.softmax(-1) @ values, scores.logsumexp(-1)

    def errors(self, out: Tensor, lse: Tensor | None = None) -> tuple[float, float]:
        """Return the largest error relative to the largest value, and that of the log-sum-exp."""
        found = self._some(out)[:, :, self.rows] - self.out
        error = float(found.abs().max() / self.out.abs().max())
        if lse is None:
            return error, math.nan
        rows = lse.cpu().double()[:, self.heads][..., self.rows]
        return error, float((rows - self.lse).abs().max())

    def _some(self, x: Tensor) -> Tensor:
        """[1, L, N, K] -> [1, 2, L, K] on the CPU."""
        return x[:, :, self.heads].cpu().double().transpose(1, 2)


def shortest(call: Callable[[], object], device: torch.device, budget: float) -> float:
    """Return the seconds of the fastest call within a budget, at least one; NaN without one.

    The first call of a kernel may compile it, and is not measured here.
    """
    spent, best = 0.0, math.nan
    while spent < budget:
        seconds = seconds_of(call, device)
        spent += max(seconds, 1e-6)
        best = min(seconds, best) if best == best else seconds
    return best


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call: on a GPU between two of its events."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one: events and Triton's kernels go there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _dotted(version: Capability) -> str:
    return ".".join(map(str, version))


def failure(problem: Exception) -> str:
    """Return the type and the first line of an exception, as a clause."""
    text = str(problem).strip().splitlines()
    return f"it fails here ({type(problem).__name__}{': ' + text[0] if text else ''})"
