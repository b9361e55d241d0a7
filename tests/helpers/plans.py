"""Plans of the published model on described machines."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from wanflow.checkpoint.checkpoint import published
from wanflow.plan.gpus import Machine, described
from wanflow.plan.plan import Plan
from wanflow.plan.solve import solve
from wanflow.presets import NANO, T2V_A14B, ModelSpec
from wanflow.request import Request
from wanflow.runtime import Runtime

# Wide enough that a block's activations and weights differ, small enough that five blocks trace in
# a second.
SMALL_DIT = replace(NANO.dit, dim=320, ffn_dim=1280, num_heads=5, num_layers=5)


def of(preset: ModelSpec, **options: Any) -> Any:
    return Request("any", seed=0, **options).complete(preset)


@cache
def plan_for(machine: Machine, runtime: Runtime = Runtime(), **options: Any) -> Plan:  # noqa: B008
    return solve(published(), of(T2V_A14B, **options), runtime, machine)


@cache
def together(
    processes: int,
    gpu: str = "a100-80gb",
    ram: int = 64,
    runtime: Runtime = Runtime(),  # noqa: B008
    **options: Any,
) -> Plan:
    """A plan for a machine with so many GPUs."""
    return solve(
        published(),
        of(T2V_A14B, **options),
        runtime,
        described(gpu, processes, ram=ram),
        processes=processes,
    )
