"""Compute on as many CPU threads as pay for the work and as the machine has free.

More threads than free cores cost many times what they save: each waits for the slowest, spinning. A
count that the user chose stays: `OMP_NUM_THREADS`, or `torch.set_num_threads` with another number
than torch's own. The count changes a result by rounding.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from wanflow.conditioning import TextToVideo
from wanflow.config import DiTConfig
from wanflow.geometry import geometry_of
from wanflow.pipeline import Engine, Frames, OnPart, Run
from wanflow.sampling.solvers import Velocity

T = TypeVar("T")
# Operations of a block's largest projection that pay for a thread: nano at 64*64 and 17 frames has
# 16 million of them, and the published model at 1280*720 and 81 frames 11 million million.
PAYS = 50e6


def threads_for(config: DiTConfig, tokens: int) -> int:
    """Return on how many threads a model computes so many tokens."""
    pay = int(2 * tokens * config.dim * config.ffn_dim / PAYS)
    if pay <= 1:
        return 1
    from wanflow.hardware import free_cores

    return max(1, min(pay, free_cores()))


def chosen_by_user() -> bool:
    """Return whether the number of threads that torch has now is the user's choice."""
    if re.search(r"(OMP|MKL)_NUM_THREADS : (?!\[not set\])", torch.__config__.parallel_info()):
        return True
    cores = {os.cpu_count() or 1}
    if hasattr(os, "sched_getaffinity"):
        cores.add(len(os.sched_getaffinity(0)))
    # torch takes all, or one for each pair of hyper-threads.
    return torch.get_num_threads() not in {*cores, *(count // 2 for count in cores)}


@contextmanager
def at_most(count: int) -> Iterator[None]:
    """Compute on at most so many threads while the block lasts."""
    before = torch.get_num_threads()
    if count >= before or chosen_by_user():
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_free_threads(engine: Engine) -> Engine:
    """Return an engine of a CPU that computes on as many threads as pay and are free."""
    spec = engine.spec

    def velocity(run: Run, conditioning: TextToVideo) -> Velocity:
        request = run.request
        count = threads_for(spec.dit, geometry_of(spec).tokens(request.size, request.frame_num))
        with at_most(count):  # the text encoder
            asked = engine.velocity(run, conditioning)
        return at_most(count)(asked)

    def decode(latent: Tensor, on_part: OnPart | None) -> Iterator[Frames]:
        tokens = latent[0, 0].numel() // math.prod(spec.dit.patch_size)
        return each_at_most(threads_for(spec.dit, tokens), engine.decode(latent, on_part))

    return replace(engine, velocity=velocity, decode=decode)


def each_at_most(count: int, parts: Iterator[T]) -> Iterator[T]:
    """Yield what an iterator computes on at most so many threads; between parts nothing changes."""
    while True:
        with at_most(count):
            try:
                part = next(parts)
            except StopIteration:
                return
        yield part
