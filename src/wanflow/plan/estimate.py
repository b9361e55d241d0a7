"""How long a plan takes: what the traces counted, over what the machine achieves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.config import RequestError
from wanflow.geometry import geometry_of
from wanflow.plan.gpus import Rates, measured
from wanflow.plan.need import Phase
from wanflow.plan.solve import Plan, dtype_of
from wanflow.plan.trace import Work
from wanflow.request import CompleteRequest
from wanflow.runtime import choose_device


@dataclass(frozen=True)
class Stage:
    """A part of a run, in seconds. step: of each, where there are several; bound: what a step waits
    for; sending: of a step, to others.
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
    """Of a whole run, by the process that has the most to do. source: where its rates come from."""

    stages: tuple[Stage, ...]
    source: str

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def denoising(self) -> float:
        """Of the steps alone."""
        return sum(stage.step * stage.steps for stage in self.stages if "expert" in stage.name)


def rated(plan: Plan, model: Checkpoint, request: CompleteRequest) -> Plan:
    """The plan with its machine's rates: measured, where it is the one that is here and not in the
    table (under a second).
    """
    if plan.machine.rates is not None or plan.machine.described:
        return plan
    device = choose_device(plan.runtime.device)
    shape = model.spec.dit
    tokens = geometry_of(model.spec).tokens(request.size, request.frame_num)
    rates = measured(
        device, dtype_of(model, plan.runtime, plan.kind), shape.dim, shape.num_heads, tokens
    )
    return replace(plan, machine=replace(plan.machine, rates=rates))


def estimate(plan: Plan) -> Estimate:
    """Seconds by stage; the plan must have been traced, and its machine must have rates.

    Raises:
        RequestError: where one of the two is missing.
    """
    if plan.need is None or plan.machine.rates is None:
        raise RequestError(
            "there is nothing to estimate a time from: neither a GPU with known rates nor a"
            " measurement"
        )
    rates, stages = plan.machine.rates, list[Stage]()
    meanwhile = 0.0
    for phase in plan.need.phases:
        stages.append(_stage(phase, rates, meanwhile))
        # What is read ahead is read while the steps before it run.
        meanwhile = (
            stages[-1].step * stages[-1].steps
            if plan.runtime.prefetch and "expert" in phase.name
            else 0.0
        )
    return Estimate(tuple(stages), rates.source)


def _stage(phase: Phase, rates: Rates, meanwhile: float) -> Stage:
    loading = max(0.0, phase.read / rates.disk - meanwhile)
    if phase.kind == "gpu" and "expert" in phase.name:
        loading += phase.weights / rates.copy if not phase.copied else 0.0
    # Rates of a CPU are those of all its cores, which its processes share.
    sharing = phase.here if phase.kind == "cpu" and not phase.alone else 1
    parts = {
        "computing": compute_seconds(phase.work, rates, phase.kind == "cpu") * sharing,
        "copying weights to the GPU": phase.copied / rates.copy,
        "reading weights from the disk": phase.read_in_step / rates.disk,
        "the others' shares of the weights": phase.gathered / rates.link,
    }
    bound = max(parts, key=lambda name: parts[name])
    # What attention waits for is sent while nothing else is done. Shares of weights come while the
    # block before works.
    sending = sum(phase.sent.values()) / rates.link + phase.messages * rates.message
    step = parts[bound] + sending
    return Stage(
        phase.name, loading + step * phase.steps, loading, step, phase.steps, bound, sending
    )


def compute_seconds(work: Work, rates: Rates, on_cpu: bool) -> float:
    """Matmuls, attention and convolutions at their rates, then everything else at the memory's;
    none of it overlaps.
    """
    seconds = work.traffic / rates.memory
    for (kind, in_float32), flops in work.flops.items():
        rate = {
            "attention": rates.attention,
            "convolution": rates.float32,
            "quantised": rates.low or rates.matmul,
        }.get(kind, rates.matmul)
        if in_float32 and kind == "matmul" and not on_cpu:
            rate = rates.float32
        seconds += flops / rate
    # A GPU is handed operations while it works on earlier ones; a CPU does one after the other.
    return (
        seconds + work.kernels * rates.launch
        if on_cpu
        else max(seconds, work.kernels * rates.launch)
    )


# the user's document


@dataclass(frozen=True)
class Way:
    """A way to make a video: steps, passes through an expert, and whether the result is the model's
    own. fused: see FUSED.
    """

    name: str
    steps: int
    passes: int
    exact: bool
    fused: bool = False

    @property
    def guided(self) -> bool:
        """Whether every step has guidance, so that two groups can split it."""
        return self.passes == 2 * self.steps


# Of the bytes that elementwise operations move, so much is left where a compiler fuses those of a
# block (1.2 of 4.2 TB a pass at 720p).
FUSED = 0.29
WAYS = (
    Way("40 steps, as published", 40, 80, True),
    Way("40 steps, elementwise work fused (not built)", 40, 80, True, True),
    Way("8 steps, --preset lightning-motion", 8, 10, False),
    Way("8 steps, --preset lightning8", 8, 8, False),
    Way("4 steps, --preset lightning4", 4, 4, False),
)
CLAIMS = {
    1: (8, 12),
    2: (3, 6),
    4: (3, 6),
    8: (3, 6),
}  # minutes for 1280*720 and 5 seconds on so many A100 of 80 GB
CLAIMED_GB = (70, 75)
PEAK = 312e12  # bf16 FLOP/s on an A100's data sheet


@dataclass(frozen=True)
class Figure:
    """Minutes on so many GPUs, by way; what the document claims; and the least that the data
    sheet's FLOP/s allow for 40 steps.
    """

    gpus: int
    minutes: dict[str, float]
    claim: tuple[int, int]
    at_peak: float

    def reached_by(self, exact: bool) -> list[str]:
        """Ways that are no slower than the claim, the slowest first."""
        return [
            way.name
            for way in WAYS
            if way.exact == exact and self.minutes[way.name] <= self.claim[1]
        ]


def figures(guided: Mapping[int, Plan], plain: Mapping[int, Plan]) -> list[Figure]:
    """The document's figures against plans for so many GPUs each, with known rates, the weights
    being loaded.

    Args:
        guided: every step has guidance; one of a single GPU is among them.
        plain: no step has. A way with few guided steps makes two passes of each on these layouts.
    """

    def of_steps(plan: Plan, fused: bool) -> tuple[float, float]:
        """Seconds of a step, and of all that is no step."""
        whole, rates = estimate(plan), plan.machine.rates
        assert rates is not None and plan.need is not None
        phases = [phase for phase in plan.need.phases if "expert" in phase.name]
        steps = sum(phase.steps for phase in phases)
        saved = (
            (1 - FUSED)
            * sum(phase.work.traffic * phase.steps for phase in phases)
            / rates.memory
            / steps
            if fused
            else 0.0
        )
        rest = whole.seconds - whole.denoising - sum(stage.loading for stage in whole.stages)
        return whole.denoising / steps - saved, rest

    def minutes(way: Way, gpus: int) -> float:
        step, rest = of_steps(guided[gpus] if way.guided else plain[gpus], way.fused)
        return (rest + (way.steps if way.guided else way.passes) * step) / 60

    alone = guided[1].need
    assert alone is not None
    flops = sum(
        phase.work.total() * phase.steps for phase in alone.phases if "expert" in phase.name
    )
    return [
        Figure(
            gpus, {way.name: minutes(way, gpus) for way in WAYS}, claim, flops / PEAK / gpus / 60
        )
        for gpus, claim in CLAIMS.items()
        if gpus in guided
    ]
