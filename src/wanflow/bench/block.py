"""Check one block at the model's width: its time by kind, its attention kernels, its compiler."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wanflow.bench.nano import refuse_without_compiler
from wanflow.bench.record import Record
from wanflow.bench.tools import (
    OneBlock,
    Scale,
    Shape,
    block_work,
    distance,
    one_block,
    randn,
    random_expert,
    seconds,
    weighing,
)
from wanflow.models.dit import Linear
from wanflow.remembered import of_device
from wanflow.transforms import attention
from wanflow.transforms.attention_kernels import BACKENDS, Backend
from wanflow.transforms.attention_timing import fastest_kernel, timed_width
from wanflow.transforms.compile import Compiler
from wanflow.units import memory_size

ROWS = 64  # queries that are compared with float64
TERA = 1e12
# Words in the names of kernels on a GPU, and of operations on a CPU, by what they compute.
KINDS = {
    "attention": ("flash", "fmha", "attention", "sdpa", "attn"),
    "matmul": (
        "gemm",
        "cutlass",
        "xmma",
        "nvjet",
        "matmul",
        "aten::mm",
        "addmm",
        "aten::bmm",
        "mkldnn_linear",
    ),
    "copies": ("memcpy", "memset", "aten::copy_", "aten::cat"),
}
SHOWN = 12  # kernels of a profile that are kept


def block(record: Record, scale: Scale) -> None:
    """Time a block by kind of operation, and every attention kernel, at each size."""
    for latent in scale.latents:
        first = latent == scale.latents[0]
        tokens = scale.tokens(latent)
        with record.asking(f"attention kernels at {tokens:,} tokens"):
            _kernels(record, scale, tokens, first)
        scale.empty()
        with record.asking(f"a block at {tokens:,} tokens"):
            run = one_block(random_expert(scale, 1), latent, scale.device)
            _block(record, scale, latent, run, first)
            del run
        scale.empty()


def _block(record: Record, scale: Scale, latent: Shape, run: OneBlock, first: bool) -> None:
    work, tokens = block_work(scale, latent), scale.tokens(latent)
    with weighing(scale.device) as peak:
        took = seconds(run, scale.device, scale.rounds)
    spent, top = profiled(run, scale.device)
    linears = seconds_of_linears(run, scale)
    flops = sum(count for (kind, _), count in work.flops.items() if kind == "matmul")
    elementwise = spent["elementwise"] + spent["copies"]
    if not elementwise:  # a container may hide the GPU's counters from the profiler
        elementwise = max(took - linears, 1e-9)
        spent = {"linears": linears, "all else": elementwise}
    elif first:
        record.calibrate(memory=work.traffic / elementwise)
    rates = {"matmul": flops / linears, "memory": work.traffic / elementwise}
    if first:
        record.calibrate(matmul=rates["matmul"])
    shares = ", ".join(f"{kind} {1e3 * one:.3g} ms" for kind, one in spent.items())
    record.measured(
        f"a block at {tokens:,} tokens",
        f"{1e3 * took:.4g} ms: {shares}; linears {rates['matmul'] / TERA:.3g} TFLOP/s, the rest"
        f" {rates['memory'] / 1e9:.3g} GB/s",
        f"{work.total() / TERA:.3g} TFLOP and {memory_size(work.traffic)} moved",
        seconds=took,
        profile=spent,
        kernels=top,
        work={"flops": work.total(), "traffic": work.traffic, "kernels": work.kernels},
        **peak.numbers(),
    )


def profiled(
    run: Callable[[], object], device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the seconds of one call by kind of operation, and those of the longest kernels."""
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if cuda else []
    run()
    attention.synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        run()
        attention.synchronize(device)
    spent, kernels = Counter[str](dict.fromkeys((*KINDS, "elementwise"), 0.0)), Counter[str]()
    for event in profile.key_averages():
        if cuda and event.device_type.name != "CUDA":
            continue  # the operations that launch them have their times too
        took = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        name = event.key.lower()
        kind = next((k for k, words in KINDS.items() if any(w in name for w in words)), None)
        spent[kind or "elementwise"] += took
        kernels[event.key[:80]] += took
    return dict(spent), dict(kernels.most_common(SHOWN))


def seconds_of_linears(run: OneBlock, scale: Scale) -> float:
    """Return the seconds of a block's projections, each by itself on all tokens."""
    total, length = 0.0, run.tokens.shape[1]
    for path, leaf in run.block.named_modules():
        if isinstance(leaf, Linear) and not path.startswith(("cross_attn.k", "cross_attn.v")):
            x = randn((1, length, leaf.in_features), scale.dtype, scale.device)
            total += seconds(lambda leaf=leaf, x=x: leaf(x), scale.device, scale.rounds)  # type: ignore[misc]
    return total


# attention


def _kernels(record: Record, scale: Scale, tokens: int, first: bool) -> None:
    dit = scale.spec.dit
    heads, width = dit.num_heads, dit.dim // dit.num_heads
    q, k, v = (randn((1, tokens, heads, width), scale.dtype, scale.device) for _ in range(3))
    truth, step = attended(q, k, v)
    flops = 4 * tokens**2 * dit.dim
    sound: dict[str, float] = {}
    for kernel in BACKENDS.values():
        what = f"attention {kernel.name} at {tokens:,} tokens"
        why = attention.unsupported_reason(kernel, scale.device, scale.dtype, width)
        if why or (kernel.name == "math" and scale.full):  # its scores would take 457 GB
            record.skipped(what, why or "its matrix of scores would not fit")
            continue
        try:
            error, took = _one_kernel(kernel, (q, k, v), truth, step, scale)
        except Exception as problem:  # kernels fail at launch with any exception
            record.measured(what, attention.failure(problem))
            continue
        bound = attention.BOUNDS[scale.dtype] if kernel.exact else attention.LOSSY_BOUND
        if error <= bound and kernel.exact:
            sound[kernel.name] = flops / took
        record.passed(
            what,
            error <= bound,
            f"{1e3 * took:.4g} ms, {flops / took / TERA:.3g} TFLOP/s, {error:.2g} away",
            f"at most {bound:g} away from float64",
            seconds=took,
            tflops=flops / took / TERA,
            error=error,
        )
    if not sound:
        return record.passed("a sound attention kernel", False, "none", "at least one")
    fastest = max(sound, key=lambda name: sound[name])
    if first:
        record.calibrate(attention=sound[fastest])
    chosen = auto_kernel(scale, tokens)
    share = sound.get(chosen, 0.0) / sound[fastest]
    record.measured(
        f"the kernel that auto takes at {tokens:,} tokens",
        f"{chosen}, at {share:.0%} of the rate of {fastest}",
        "at least 90 %",
        share=share,
    )


def auto_kernel(scale: Scale, tokens: int) -> str:
    """Return the kernel that a run takes by itself: on a GPU by a trial at the model's width."""
    dit = scale.spec.dit
    heads, width = dit.num_heads, dit.dim // dit.num_heads
    if scale.cuda:
        trial = timed_width(scale.device, heads, width, scale.dtype, tokens)
        found = fastest_kernel(scale.device, trial, of_device(None, scale.device))
        if found != "auto":
            return found
    return attention.choose_kernel("auto", scale.device, scale.dtype, width).name


def _one_kernel(
    kernel: Backend, inputs: tuple[Tensor, ...], truth: Tensor, step: int, scale: Scale
) -> tuple[float, float]:
    """Return how far a kernel is from float64, and its seconds."""
    q, k, v = inputs
    error = distance(kernel.attend(q, k, v)[:, ::step], truth)
    return error, seconds(lambda: kernel.attend(q, k, v), scale.device, scale.rounds)


def attended(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, int]:
    """Return the exact result of some queries over all keys, and how many apart they are."""
    step = max(1, q.shape[1] // ROWS)
    heads = []
    for head in range(q.shape[2]):  # one at a time, in memory for one
        few, keys, values = q[0, ::step, head].double(), k[0, :, head].double(), v[0, :, head]
        scores = (few @ keys.T / math.sqrt(q.shape[3])).softmax(-1)
        heads.append(scores @ values.double())
    return torch.stack(heads, 1).unsqueeze(0), step


# rewrites and the compiler


def rewrites(record: Record, scale: Scale) -> None:
    """Compare, on this device, forms that have the same bits on a CPU."""
    width, half = scale.spec.dit.dim, torch.bfloat16
    x = randn((1, 300, width), half, scale.device) * 3
    y = randn((1, 300, width), torch.float32, scale.device)
    row = randn((1, 1, width), torch.float32, scale.device)
    angle = torch.rand(300, width // 2, device=scale.device) * 6
    turn = torch.polar(torch.ones_like(angle), angle)
    pairs = y.unflatten(-1, (-1, 2))
    turned, c, s = torch.view_as_complex(pairs) * turn, turn.real, turn.imag
    a, b = pairs.unbind(-1)
    forms: dict[str, tuple[Tensor, Tensor]] = {
        "rms_norm without a copy in float32": (
            F.rms_norm(x.float(), (width,), None, 1e-6).to(half),
            F.rms_norm(x, (width,), None, 1e-6),
        ),
        "addcmul of two dtypes": (torch.addcmul(y, x.float(), row), torch.addcmul(y, x, row)),
        "add of two dtypes": (y + x.float(), y + x),
        "real rotary embedding": (
            torch.view_as_real(turned),
            torch.stack((a * c - b * s, a * s + b * c), -1),
        ),
    }
    for what, (old, new) in forms.items():
        same, away = torch.equal(old, new), distance(new, old)
        record.measured(
            what, "the same bits" if same else f"{away:.2g} away", "the same bits", equal=same
        )


def compiled(record: Record, scale: Scale) -> None:
    """Compile a block as a run does, and compare it with the eager one."""
    refuse_without_compiler()
    model = random_expert(scale, 1)
    run = one_block(model, scale.latents[0], scale.device)
    eager, true = seconds(run, scale.device, scale.rounds), run()
    by: Any = run
    if scale.full:
        Compiler(scale.device, True, None, "bench").attach(model)
        how = "inductor"
    else:  # inductor takes a minute on a CPU; that it traces as a whole is checked
        traced: Any = torch.compile(run.block, fullgraph=True, backend="eager")
        by, how = (lambda: run.by(traced)), "the tracer"
    began = time.perf_counter()
    found = by()
    attention.synchronize(scale.device)
    first = time.perf_counter() - began
    error = distance(found, true)
    with weighing(scale.device) as peak:
        took = seconds(by, scale.device, scale.rounds)
    if scale.full:
        record.calibrate(compiled=took / eager)
    bound = 5e-2 if scale.dtype != torch.float32 else 1e-4
    record.passed(
        "the compiled block",
        error <= bound,
        f"{1e3 * took:.4g} ms, {took / eager:.0%} of eager, compiled in {first:.3g} s by {how},"
        f" {error:.2g} away",
        f"at most {bound:g} away; 0.89 of eager on an H100",
        seconds=took,
        eager=eager,
        compile=first,
        error=error,
        **peak.numbers(),
    )
