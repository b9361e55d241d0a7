"""Estimate how long a plan takes: the traced work over the rates of the machine."""

from __future__ import annotations

from dataclasses import dataclass, replace

from wanflow.choices import compiling_saves
from wanflow.config import RequestError
from wanflow.geometry import geometry_of
from wanflow.plan.cards import REPORTED, Rates, cards_of
from wanflow.plan.phases import Phase
from wanflow.plan.plan import Plan
from wanflow.plan.trace import Work
from wanflow.presets import Expert
from wanflow.sampling.timeline import timeline
from wanflow.transforms.compile import UNMEASURED_S


@dataclass(frozen=True)
class Stage:
    """A part of a run, in seconds.

    Attributes:
        step: of each step.
        bound: what a step waits for.
        sending: of a step, to other ranks.
        expert: the one that denoises.
    """

    name: str
    seconds: float
    loading: float
    step: float
    steps: int
    bound: str
    sending: float = 0.0
    expert: Expert | None = None


@dataclass(frozen=True)
class Estimate:
    """The time of a run, on the rank with the most to do; `source` of its rates.

    compiling: seconds, of a run that is compiled.
    """

    stages: tuple[Stage, ...]
    source: str
    compiling: float = 0.0

    @property
    def seconds(self) -> float:
        return self.compiling + sum(stage.seconds for stage in self.stages)

    @property
    def denoising(self) -> float:
        """Seconds of all steps, without loading."""
        return sum(stage.step * stage.steps for stage in self.stages if stage.expert)


def estimate(plan: Plan, compiled: bool | None = None) -> Estimate:
    """Return seconds by stage, of a traced plan on a machine with rates.

    Args:
        plan: the plan.
        compiled: whether blocks are; None: as a run would have it.

    Raises:
        RequestError: where one of the two is missing.
    """
    rates = plan.machine.rates
    if plan.need is None or rates is None:
        raise RequestError(
            "no time can be estimated: neither a GPU with known rates nor a measurement is there"
        )
    if compiled is None:
        compiled = ways(plan)[0]
    stages: list[Stage] = []
    before = 0.0  # seconds of the steps during which the next expert is prefetched
    for phase in plan.need.phases:
        share = rates.compiled if compiled and phase.fused else 0.0
        if compiled and not share:
            work = replace(phase.work, traffic=phase.work.traffic - phase.fused)
            phase = replace(phase, work=work)
        stage = _stage(phase, rates, before, share or 1.0)
        stages.append(stage)
        prefetches = plan.runtime.prefetch and phase.expert is not None
        before = stage.step * stage.steps if prefetches else 0.0
    source = f"{rates.source}; attention by {rates.kernel}" if rates.kernel else rates.source
    return Estimate(tuple(stages), source, UNMEASURED_S if compiled else 0.0)


def ways(plan: Plan) -> tuple[bool, ...]:
    """Return whether blocks may run as they stand (False), compiled (True), or both.

    The first is what a run takes, before it knows this machine better.
    """
    asked = plan.runtime.compile
    if asked == "off" or plan.kind == "cpu" or plan.dtype.itemsize != 2:
        return (False,)
    if asked == "on":
        return (True,)
    request, spec = plan.request, plan.checkpoint.spec
    tokens = geometry_of(spec).tokens(request.size, request.frame_num)
    passes = sum(1 + step.guided for step in timeline(request, spec))
    saved = compiling_saves(spec.dit, tokens, passes, plan.layout.size, True)
    return (True, False) if saved > UNMEASURED_S else (False, True)


def by_way(plan: Plan) -> dict[str, Estimate]:
    """Return the estimates without and with a compiler, where that choice is open."""
    if plan.machine.rates is None or len(ways(plan)) < 2:
        return {}
    return {"eager": estimate(plan, False), "compiled": estimate(plan, True)}


def by_card(plan: Plan) -> dict[str, Estimate]:
    """Return the estimates of the known cards with as much memory, for a machine without rates."""
    machine = plan.machine
    if machine.rates is not None or not machine.gpu:
        return {}
    size = round(machine.gpu / REPORTED / 2**30)
    rated = {card.name: replace(machine, rates=card.rates) for card in cards_of(size)}
    return {name: estimate(replace(plan, machine=each)) for name, each in rated.items()}


def _stage(phase: Phase, rates: Rates, before: float, share: float) -> Stage:
    """Return the seconds of a phase; `share`: that computing takes of what it does by its work."""
    loading = max(0.0, phase.read / rates.disk - before)
    if phase.kind == "gpu" and phase.expert and not phase.copied:
        loading += phase.weights / rates.copy
    # Rates of a CPU are those of all its cores, which its ranks share.
    sharing = phase.here if phase.kind == "cpu" and not phase.alone else 1
    parts = {
        "computing": compute_seconds(phase.work, rates, phase.kind == "cpu") * sharing * share,
        "copying weights to the GPU": phase.copied / rates.copy,
        "reading weights from the disk": phase.read_in_step / rates.disk,
        "gathering the other ranks' shards": phase.gathered / rates.link,
    }
    bound = max(parts, key=lambda name: parts[name])
    # Attention waits for what it is sent. Shards are gathered while the block before runs.
    sending = sum(phase.sent.values()) / rates.link + phase.messages * rates.message
    step = parts[bound] + sending
    seconds = loading + step * phase.steps
    return Stage(phase.name, seconds, loading, step, phase.steps, bound, sending, phase.expert)


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
