"""Choose the fastest attention kernel of a GPU by its time there, and remember the choice.

Which is the fastest depends on the GPU, the versions and the width, and no table knows them all.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from wanflow.remembered import Remembered
from wanflow.transforms import attention
from wanflow.transforms.attention_kernels import BACKENDS

BUDGET = 0.05  # seconds of calls of one kernel
TOTAL = 4.0  # seconds after which no further kernel is timed, compiling included
# Beyond this length the order does not change, and a call takes 14 ms on an H100. It is no multiple
# of 128, as the lengths of videos.
MOST_TOKENS = 127 * 128 + 80
# A trial takes the memory of eight tensors as large as the queries (q, k, v, the output, copies in
# a kernel's own layout), and at most this share of what is free.
TENSORS, SHARE = 8, 0.25

logger = logging.getLogger("wanflow")


@dataclass(frozen=True)
class Width:
    """What attention computes on: heads of head_dim numbers, and a length."""

    heads: int
    head_dim: int
    dtype: torch.dtype
    tokens: int


def timed_width(
    device: torch.device, heads: int, head_dim: int, dtype: torch.dtype, tokens: int
) -> Width:
    """Return the width of a trial: that of the model, and as many tokens as time and memory let."""
    row = TENSORS * heads * head_dim * dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
    tokens = int(min(tokens, MOST_TOKENS, SHARE * free / row))
    return Width(heads, head_dim, dtype, max(tokens - (tokens - 80) % 128, 80))


def fastest_kernel(device: torch.device, width: Width, kept: Remembered, lse: bool = False) -> str:
    """Return the fastest exact kernel that is sound at this width; "auto" where none works.

    Args:
        device: a GPU.
        width: from `timed_width`.
        kept: what was measured on this GPU.
        lse: whether it must return the log-sum-exp, as a ring needs.
    """
    known = [
        name
        for name in attention.order(attention.card_of(device), small=False)
        if not attention.unsupported_reason(BACKENDS[name], device, width.dtype, width.head_dim)
    ]
    # What a kernel is: PyTorch's and cuDNN's versions are of the device's own key.
    kernels = [f"{name} {_version(name)}".strip() for name in known]
    length = width.tokens.bit_length()
    key = ("attention", *kernels, width.heads, width.head_dim, width.dtype, length, lse)
    found, how = _times(kept.get(*key), known), (device, width.dtype, width.head_dim)
    if not found or _why(attention.benchmark(BACKENDS[_fastest(found)], *how), lse):
        found = measure(device, width, known, lse)
        if not found:
            return "auto"
        kept.put({name: seconds * 1e3 for name, seconds in found.items()}, *key)
    name = _fastest(found)
    times = ", ".join(f"{one} {seconds * 1e3:.3g} ms" for one, seconds in found.items())
    logger.info("attention %s: the fastest for %s tokens here (%s)", name, width.tokens, times)
    return name


def measure(
    device: torch.device, width: Width, names: list[str], lse: bool = False
) -> dict[str, float]:
    """Return {kernel: seconds of a call} of those that are sound; a bound holds for all together.

    Those that time does not reach are left out; the first that works is always measured.
    """
    shape, began = (width.heads, width.tokens, width.tokens), time.monotonic()
    found: dict[str, float] = {}
    how = device, width.dtype, width.head_dim
    for name in names:
        if found and time.monotonic() - began > TOTAL:
            break
        kernel = BACKENDS[name]
        # The small trial comes first: it finds a kernel that gives wrong numbers in less time.
        trial = attention.benchmark(kernel, *how)
        if not trial.why:
            trial = attention.benchmark(kernel, *how, shape, BUDGET)
        if not _why(trial, lse):
            found[name] = trial.seconds
        else:
            logger.debug("attention %s: %s", name, _why(trial, lse))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def _why(trial: attention.Trial, lse: bool) -> str:
    return trial.why or (trial.lse_why if lse else "")


def _fastest(found: dict[str, float]) -> str:
    return min(found, key=found.__getitem__)


def _version(name: str) -> str:
    kernel = BACKENDS[name]
    return attention.version_of(kernel.distribution) if kernel.distribution else ""


def _times(value: Any, known: list[str]) -> dict[str, float]:
    """Return {kernel: seconds} of what was remembered, which may be anything; {} where it is."""
    if not isinstance(value, dict) or not value.keys() <= set(known):
        return {}
    if not all(type(ms) in (int, float) and 0 < ms < math.inf for ms in value.values()):
        return {}
    return {name: ms / 1e3 for name, ms in value.items()}
