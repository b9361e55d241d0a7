"""How several processes share one video: settled before anything is traced, since what a process
works on follows from it.
"""

from __future__ import annotations

from dataclasses import replace

from wanflow.assemble import layout_of
from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.config import RequestError
from wanflow.parallel.groups import Layout, choose_layout, sizes
from wanflow.presets import ModelSpec
from wanflow.request import CompleteRequest
from wanflow.runtime import Runtime
from wanflow.sampling.timeline import timeline
from wanflow.transforms.attention_kernels import BACKENDS

PER_MACHINE = 8  # processes that one machine has at most, where nothing else is said


def used_here(processes: int, per_machine: int | None) -> int:
    """How many of the processes one machine has, where nothing, or a number, is said."""
    return min(processes, per_machine or PER_MACHINE)


def guided_steps(request: CompleteRequest, spec: ModelSpec) -> list[bool]:
    """Which steps have guidance."""
    return [step.guided for step in timeline(request, spec)]


def settle_layout(
    model: Checkpoint, request: CompleteRequest, runtime: Runtime, processes: int, machine: int
) -> tuple[Runtime, Layout]:
    """The runtime with cfg_parallel, ring_size and ulysses_size settled; what is set stays.

    Guidance is split where every step has it. In a step without, both groups would compute the
    same: one such step costs more time than exchanging a velocity in the others saves.

    Args:
        machine: how many of the processes one machine has.

    Raises:
        RequestError: when what is set does not make so many processes.
    """
    if processes < 1:
        raise RequestError(f"{processes} is no number of processes")
    kernel = BACKENDS.get(runtime.attention)
    cfg = None if runtime.cfg_parallel is None else 2 if runtime.cfg_parallel else 1
    layout = choose_layout(
        processes,
        model.spec.dit.num_heads,
        all(guided_steps(request, model.spec)),
        kernel is None or kernel.with_lse is not None,
        machine,
        cfg=cfg,
        ring=runtime.ring_size,
        ulysses=runtime.ulysses_size,
    )
    settled = replace(
        runtime, cfg_parallel=layout.cfg == 2, ring_size=layout.ring, ulysses_size=layout.ulysses
    )
    assert layout_of(settled) == layout
    return settled, layout


def layout_reasons(model: Checkpoint, request: CompleteRequest, layout: Layout) -> list[str]:
    """Why this layout, in words; nothing for one process."""
    if layout.size == 1:
        return []
    words = []
    if layout.cfg == 2:
        words.append(
            "one half of the processes for each branch of guidance, which exchange one velocity a"
            " step"
        )
    elif any(guided := guided_steps(request, model.spec)) and not all(guided):
        words.append("guidance is not split: steps without it would be computed twice")
    if layout.ulysses > 1:
        words.append(f"{layout.ulysses} share the attention heads")
    if layout.ring > 1:
        words.append(f"keys and values go round among {layout.ring}")
    reasons = [f"{layout.size} processes as {layout}: {', '.join(words)}"]
    shares, heads = sizes(model.spec.dit.num_heads, layout.ulysses), model.spec.dit.num_heads
    if max(shares) * layout.ulysses > heads:
        lost = max(shares) * layout.ulysses / heads - 1
        reasons.append(
            f"{heads} heads on {layout.ulysses} are up to {max(shares)} each, so attention takes"
            f" {lost:.0%} longer than evenly cut"
        )
    return reasons
