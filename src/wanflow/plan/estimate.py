"""Estimate how long a plan takes: the traced work over the rates of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from wanflow.config import DiTConfig, RequestError
from wanflow.geometry import geometry_of
from wanflow.models.dit import Block, Conditioning, rope_table
from wanflow.plan.gpus import DISK_RATE, GB, PCIE, Rates
from wanflow.plan.phases import Phase
from wanflow.plan.plan import Plan
from wanflow.plan.trace import Trace, Work
from wanflow.runtime import choose_device

GLOO = GB  # bytes/s between processes on one machine's CPU, assumed
COPY = {"cpu": 10 * GB, "cuda": 20 * GB}  # bytes/s from RAM to the device, assumed


@dataclass(frozen=True)
class Stage:
    """A part of a run, in seconds.

    Attributes:
        step: of each step.
        bound: what a step waits for.
        sending: of a step, to other ranks.
    """

    name: str
    seconds: float
    loading: float
    step: float
    steps: int
    bound: str
    sending: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """The time of a run, on the rank with the most to do; `source` of its rates."""

    stages: tuple[Stage, ...]
    source: str

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def denoising(self) -> float:
        """Seconds of all steps, without loading."""
        return sum(stage.step * stage.steps for stage in self.stages if "expert" in stage.name)


def estimate(plan: Plan) -> Estimate:
    """Return seconds by stage, of a traced plan on a machine with rates.

    Raises:
        RequestError: where one of the two is missing.
    """
    rates = plan.machine.rates
    if plan.need is None or rates is None:
        raise RequestError(
            "no time can be estimated: neither a GPU with known rates nor a measurement is there"
        )
    stages: list[Stage] = []
    before = 0.0  # seconds of the steps during which the next expert is prefetched
    for phase in plan.need.phases:
        stage = _stage(phase, rates, before)
        stages.append(stage)
        prefetches = plan.runtime.prefetch and phase.expert is not None
        before = stage.step * stage.steps if prefetches else 0.0
    return Estimate(tuple(stages), rates.source)


def _stage(phase: Phase, rates: Rates, before: float) -> Stage:
    loading = max(0.0, phase.read / rates.disk - before)
    if phase.kind == "gpu" and phase.expert and not phase.copied:
        loading += phase.weights / rates.copy
    # Rates of a CPU are those of all its cores, which its ranks share.
    sharing = phase.here if phase.kind == "cpu" and not phase.alone else 1
    parts = {
        "computing": compute_seconds(phase.work, rates, phase.kind == "cpu") * sharing,
        "copying weights to the GPU": phase.copied / rates.copy,
        "reading weights from the disk": phase.read_in_step / rates.disk,
        "gathering the other ranks' shards": phase.gathered / rates.link,
    }
    bound = max(parts, key=lambda name: parts[name])
    # Attention waits for what it is sent. Shards are gathered while the block before runs.
    sending = sum(phase.sent.values()) / rates.link + phase.messages * rates.message
    step = parts[bound] + sending
    seconds = loading + step * phase.steps
    return Stage(phase.name, seconds, loading, step, phase.steps, bound, sending)


def compute_seconds(work: Work, rates: Rates, on_cpu: bool) -> float:
    """Return the seconds of work in which nothing overlaps."""
    kinds = {
        "matmul": rates.matmul,
        "attention": rates.attention,
        "convolution": rates.float32,
        "quantised": rates.low or rates.matmul,
    }
    seconds = work.traffic / rates.memory
    for (kind, in_float32), flops in work.flops.items():
        slow = in_float32 and kind == "matmul" and not on_cpu
        seconds += flops / (rates.float32 if slow else kinds[kind])
    # A GPU launches operations while earlier ones run; a CPU does not.
    launches = work.kernels * rates.launch
    return seconds + launches if on_cpu else max(seconds, launches)


# rates of this machine


def rated(plan: Plan) -> Plan:
    """Return the plan with rates: measured in under a second if the machine here is unknown."""
    if plan.machine.rates is not None or plan.machine.described:
        return plan
    spec, device = plan.checkpoint.spec, choose_device(plan.runtime.device)
    tokens = geometry_of(spec).tokens(plan.request.size, plan.request.frame_num)
    rates = measured(device, plan.dtype, spec.dit.dim, spec.dit.num_heads, tokens)
    return replace(plan, machine=replace(plan.machine, rates=rates))


def measured(device: torch.device, dtype: torch.dtype, dim: int, heads: int, tokens: int) -> Rates:
    """Measure the rates of a device, at the widths of a model and up to 4096 of its tokens."""
    rows = max(16, min(4096, tokens))
    x = torch.randn(rows, dim, device=device, dtype=dtype)
    weight = torch.randn(4 * dim, dim, device=device, dtype=dtype)
    qkv = torch.randn(1, heads, rows, dim // heads, device=device, dtype=dtype)
    image = torch.randn(1, 32, 64, 64, device=device)
    kernel = torch.randn(32, 32, 3, 3, device=device)
    large = torch.randn(rows, 4 * dim, device=device)

    def seconds(run: Callable[[], object]) -> float:
        return _best_seconds(run, device)

    with torch.no_grad():
        linear = seconds(lambda: F.linear(x, weight))
        attention = seconds(lambda: F.scaled_dot_product_attention(qkv, qkv, qkv))
        convolution = seconds(lambda: F.conv2d(image, kernel, padding=1))
        product = seconds(lambda: large * large)
        tiny = _tiny_block(device)
        with Trace() as trace:
            tiny()
        launch = seconds(tiny) / trace.work.kernels
    return Rates(
        matmul=2 * weight.numel() * rows / linear,
        attention=4 * rows**2 * dim / attention,
        float32=2 * image.numel() * kernel[0].numel() / convolution,
        low=0,
        memory=3 * large.nbytes / product,
        copy=COPY.get(device.type, COPY["cuda"]),
        disk=DISK_RATE,
        launch=launch,
        source="a short measurement here",
        link=GLOO if device.type == "cpu" else PCIE,
    )


def _tiny_block(device: torch.device) -> Callable[[], Tensor]:
    """Return a block so small that its time is that of launching its operations."""
    config = DiTConfig(dim=16, ffn_dim=16, num_heads=2, num_layers=1)
    block = Block(config).to(device).requires_grad_(False)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    text = randn(1, 4, 2, 8), randn(1, 4, 2, 8)
    rope = rope_table((1, 2, 2), 8, device)
    conditioning = Conditioning(randn(1, 1, 16), randn(1, 1, 6, 16), None, rope, (text,))
    x = randn(1, 4, 16)
    return lambda: cast(Tensor, block(x, conditioning, text))


def _best_seconds(run: Callable[[], object], device: torch.device, total: float = 0.05) -> float:
    """Return the seconds of one call, the best of rounds that take `total` seconds."""
    best, spent = float("inf"), 0.0
    run()
    while spent < total:
        began = time.perf_counter()
        for _ in range(3):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = time.perf_counter() - began
        best, spent = min(best, took / 3), spent + took
    return best
