"""Begin a `Plan`: choose the settings of a run that need no trace, as all of a small model's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from wanflow.assemble import layout_of, refuse_together
from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.choices import all_resident, choose_device, choose_dtype, is_small, with_defaults
from wanflow.config import RequestError
from wanflow.parallel.groups import Layout, choose_layout, sizes
from wanflow.plan.gpus import Kind, Machine
from wanflow.request import CompleteRequest
from wanflow.runtime import Runtime
from wanflow.sampling.timeline import timeline
from wanflow.transforms.attention_kernels import BACKENDS

if TYPE_CHECKING:
    from wanflow.plan.phases import Need

GPUS_PER_MACHINE = 8  # at most, where nothing else is known


@dataclass(frozen=True)
class Plan:
    """How a request runs on a machine, and why: `set_up` begins it, `solve` completes it.

    Attributes:
        runtime: has no open setting once the plan is complete.
        dtype: of the experts.
        here: how many of the ranks one machine has.
        need: None until the run is traced; a small model runs without.
        short: what does not fit.
        offers: settings that would help, and change the video or the request.
    """

    checkpoint: Checkpoint
    request: CompleteRequest
    runtime: Runtime
    machine: Machine
    kind: Kind
    dtype: torch.dtype
    layout: Layout
    here: int
    reasons: tuple[str, ...]
    need: Need | None = None
    short: tuple[str, ...] = ()
    offers: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return not self.short

    @property
    def small(self) -> bool:
        return is_small(expert_parameters(self.checkpoint) * self.dtype.itemsize)

    def all_resident(self) -> Plan:
        """Return the complete plan of a small model: all of it stays on the device."""
        layers = self.checkpoint.spec.dit.num_layers
        runtime = all_resident(self.runtime, layers, self.kind == "gpu")
        reasons = (*self.reasons, "the model is small: all of it stays in memory")
        return replace(self, runtime=runtime, reasons=reasons)


def set_up(
    checkpoint: Checkpoint,
    request: CompleteRequest,
    runtime: Runtime,
    machine: Machine,
    processes: int = 1,
    per_machine: int | None = None,
) -> Plan:
    """Begin a plan: choose device, dtype and layout, which need no trace.

    The processes share the video, and each has a GPU of its own. `per_machine` of them share the
    RAM of one machine; None: up to 8.

    Raises:
        RequestError: for a layout of another number of processes, and for settings that cannot go
            together.
    """
    kind, here = kind_of(runtime, machine), ranks_here(processes, per_machine)
    parameters = expert_parameters(checkpoint)
    dtype = choose_dtype(runtime.dtype, kind == "cpu", parameters * 4, machine.bfloat16)
    if runtime.calibration is not None:
        from wanflow.plan.measured import calibrated

        machine = calibrated(machine, runtime.calibration, kind, dtype)
    refuse_together(runtime, checkpoint.spec.dit.num_layers, processes)
    runtime, layout = with_layout(checkpoint, request, runtime, processes, here)
    reasons = (*_dtype_reasons(machine, kind, dtype), *_layout_reasons(checkpoint, request, layout))
    if processes > 1:
        runtime = with_defaults(runtime, vae_tile=0)  # ranks decode in strips
    return Plan(checkpoint, request, runtime, machine, kind, dtype, layout, here, reasons)


def kind_of(runtime: Runtime, machine: Machine) -> Kind:
    """Return where a run computes; a described machine uses its GPU, if it has one."""
    if machine.described:
        return "gpu" if machine.gpu and runtime.device != "cpu" else "cpu"
    return "gpu" if choose_device(runtime.device).type == "cuda" else "cpu"


def expert_parameters(checkpoint: Checkpoint) -> int:
    """Return the number of one expert's parameters."""
    return checkpoint.parameters(checkpoint.spec.expert_names[0])


def ranks_here(processes: int, per_machine: int | None) -> int:
    """Return how many of the processes one machine has."""
    return min(processes, per_machine or GPUS_PER_MACHINE)


def with_layout(
    checkpoint: Checkpoint, request: CompleteRequest, runtime: Runtime, processes: int, here: int
) -> tuple[Runtime, Layout]:
    """Return the runtime with cfg_parallel, ring_size and ulysses_size chosen, and the layout.

    Guidance is split where every step has it. In a step without, both groups would compute the
    same: one such step costs more than exchanging a velocity saves in the others. No ring is chosen
    for SageAttention, of which not every version returns the log-sum-exp.

    Raises:
        RequestError: when the set sizes do not multiply to the number of processes.
    """
    if processes < 1:
        raise RequestError(f"the number of processes must be at least 1 (got {processes})")
    kernel = BACKENDS.get(runtime.attention)
    layout = choose_layout(
        processes,
        checkpoint.spec.dit.num_heads,
        all(_guided(checkpoint, request)),
        kernel is None or (kernel.exact and kernel.with_lse is not None),
        here,
        cfg=None if runtime.cfg_parallel is None else 1 + runtime.cfg_parallel,
        ring=runtime.ring_size,
        ulysses=runtime.ulysses_size,
    )
    chosen = replace(
        runtime, cfg_parallel=layout.cfg == 2, ring_size=layout.ring, ulysses_size=layout.ulysses
    )
    assert layout_of(chosen) == layout
    return chosen, layout


def _dtype_reasons(machine: Machine, kind: Kind, dtype: torch.dtype) -> Iterator[str]:
    if kind == "gpu" and not machine.bfloat16 and dtype == torch.float16:
        yield (
            f"{machine.gpu_name} does not compute in bfloat16: the experts run in float16, with the"
            " memory-efficient attention kernel; the text encoder, whose values overflow float16,"
            " stays in bfloat16, slower; the VAE in float32"
        )


def _guided(checkpoint: Checkpoint, request: CompleteRequest) -> list[bool]:
    return [step.guided for step in timeline(request, checkpoint.spec)]


def _layout_reasons(checkpoint: Checkpoint, request: CompleteRequest, layout: Layout) -> list[str]:
    if layout.size == 1:
        return []
    guided, parts = _guided(checkpoint, request), []
    if layout.cfg == 2:
        parts.append("each half computes one branch of guidance, and they exchange a velocity")
    elif any(guided) and not all(guided):
        parts.append("guidance is not split, since steps without it would be computed twice")
    if layout.ulysses > 1:
        parts.append(f"{layout.ulysses} share the attention heads")
    if layout.ring > 1:
        parts.append(f"keys and values pass round a ring of {layout.ring}")
    reasons = [f"{layout.size} processes as {layout}: {', '.join(parts)}"]
    heads = checkpoint.spec.dit.num_heads
    most = max(sizes(heads, layout.ulysses))
    if most * layout.ulysses > heads:
        slower = most * layout.ulysses / heads - 1
        reasons.append(
            f"{heads} heads on {layout.ulysses} are up to {most} each: attention takes"
            f" {slower:.0%} longer than with even shares"
        )
    return reasons
