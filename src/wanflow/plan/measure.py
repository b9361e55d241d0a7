"""Measure the rates of a machine that no table knows, within a bound of time.

Every stretch grows until one call takes `LONG` seconds. So a slow machine is measured on less work,
and none takes longer than another.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from wanflow.assemble import choose_kernel
from wanflow.choices import choose_device
from wanflow.config import DiTConfig
from wanflow.geometry import geometry_of
from wanflow.models.dit import Attend, Block, Conditioning, rope_table, sdpa
from wanflow.plan.cards import DISK_RATE, GB, PCIE, Rates
from wanflow.plan.measured import with_calibration
from wanflow.plan.plan import Plan
from wanflow.plan.trace import Trace

GLOO = GB  # bytes/s between processes on one machine's CPU, assumed
COPY = {"cpu": 10 * GB, "cuda": 20 * GB}  # bytes/s from RAM to the device, assumed
LONG = 0.05  # seconds of one call that are enough to measure it
ROWS, FEWEST = 4096, 16  # tokens that are measured, at most and at least
WIDEST = 1024  # a wider matmul is no faster on a CPU, and takes seconds to fill


def rated(plan: Plan) -> Plan:
    """Return the plan with rates: measured in under a second if the machine here is unknown."""
    if plan.machine.rates is not None or plan.machine.described:
        return plan
    spec, device = plan.checkpoint.spec, choose_device(plan.runtime.device)
    tokens = geometry_of(spec).tokens(plan.request.size, plan.request.frame_num)
    kernel = "" if device.type == "cpu" else plan.runtime.attention
    attend: Attend = sdpa
    if kernel:  # of a GPU: that of the run, which differ by a factor
        chosen = choose_kernel(spec, plan.runtime, device, plan.dtype, plan.small)
        attend, kernel = chosen.attend, chosen.name
    shape = spec.dit.dim, spec.dit.num_heads, tokens
    rates = replace(measured(device, plan.dtype, *shape, attend), kernel=kernel)
    rates = with_calibration(rates, plan.runtime.calibration)
    return replace(plan, machine=replace(plan.machine, rates=rates))


def measured(
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    heads: int,
    tokens: int,
    attend: Attend = sdpa,
) -> Rates:
    """Measure the rates of a device, at the widths of a model and up to `ROWS` of its tokens."""
    on_cpu = device.type == "cpu"
    head = dim // heads
    heads = min(heads, max(1, WIDEST // head)) if on_cpu else heads
    dim = heads * head
    weight = torch.rand(4 * dim, dim, device=device, dtype=dtype)
    # A GPU launches the small one in more time than it computes it.
    channels, side = (32, 64) if on_cpu else (192, 512)
    image = torch.rand(1, channels, side, side, device=device)
    kernel = torch.rand(channels, channels, 3, 3, device=device)

    def linear(rows: int) -> Callable[[], Tensor]:
        x = torch.rand(rows, dim, device=device, dtype=dtype)
        return lambda: F.linear(x, weight)

    def attention(rows: int) -> Callable[[], Tensor]:
        qkv = torch.rand(1, rows, heads, head, device=device, dtype=dtype)
        return lambda: attend(qkv, qkv, qkv)

    def product(rows: int) -> Callable[[], Tensor]:
        large = torch.rand(rows, 4 * dim, device=device)
        return lambda: large * large

    def grown(make: Callable[[int], Callable[[], Tensor]]) -> tuple[int, float]:
        return _grown(make, max(FEWEST, min(ROWS, tokens)), device)

    with torch.no_grad():
        in_linear, linear_seconds = grown(linear)
        in_attention, attention_seconds = grown(attention)
        in_product, product_seconds = grown(product)
        convolution = _best_seconds(lambda: F.conv2d(image, kernel, padding=1), device)
        tiny = _tiny_block(device)
        with Trace() as trace:
            tiny()
        launch = _best_seconds(tiny, device) / trace.work.kernels
    return Rates(
        matmul=2 * weight.numel() * in_linear / linear_seconds,
        attention=4 * in_attention**2 * dim / attention_seconds,
        float32=2 * image.numel() * kernel[0].numel() / convolution,
        low=0,
        memory=3 * in_product * 4 * dim * 4 / product_seconds,
        copy=COPY.get(device.type, COPY["cuda"]),
        disk=DISK_RATE,
        launch=launch,
        source="a short measurement here",
        link=GLOO if on_cpu else PCIE,
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


def _grown(
    make: Callable[[int], Callable[[], Tensor]], most: int, device: torch.device
) -> tuple[int, float]:
    """Return how many rows a call of about `LONG` seconds takes, and the seconds of such a call.

    Args:
        make: returns the call for a number of rows.
        most: the most rows.
        device: what it runs on.
    """
    rows = min(FEWEST, most)
    while True:
        run = make(rows)
        run()  # the first one also prepares kernels and memory
        took = _once(run, device, 1)
        if took > LONG / 3 or rows >= most:
            return rows, took if took > LONG else min(took, _best_seconds(run, device))
        rows = min(most, 2 * rows)


def _best_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, the best of rounds that take `LONG` seconds."""
    best, spent = float("inf"), 0.0
    run()
    while spent < LONG:
        took = _once(run, device, 3)
        best, spent = min(best, took / 3), spent + took
    return best


def _once(run: Callable[[], object], device: torch.device, times: int) -> float:
    """Return the seconds of a few calls."""
    began = time.perf_counter()
    for _ in range(times):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
