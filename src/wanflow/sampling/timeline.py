"""Say what happens at each step of a request: timestep, expert, guidance, LoRA strengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wanflow.presets import Expert, ExpertSpec, ModelSpec
from wanflow.request import CompleteRequest
from wanflow.sampling.schedule import Schedule, Step, make_schedule


@dataclass(frozen=True)
class TimelineStep(Step):
    """A step of the schedule with everything that a velocity needs besides the sample.

    expert: the one that denoises it.
    guidance: the scale; 1 needs no second branch.
    strengths: of each LoRA of the request on this expert at this step.
    """

    expert: Expert
    guidance: float
    strengths: tuple[float, ...]

    @property
    def guided(self) -> bool:
        return self.guidance != 1


Timeline = tuple[TimelineStep, ...]


def schedule_of(request: CompleteRequest) -> Schedule:
    """Return the schedule that a request asks for."""
    return make_schedule(request.sample_solver, request.sample_steps, request.sample_shift)


def expert_at(timestep: float, experts: Sequence[ExpertSpec]) -> Expert:
    """Return the first expert whose range holds a timestep.

    The high-noise expert denoises from boundary * 1000 upwards, where the signal-to-noise ratio is
    low.
    """
    return next(expert.name for expert in experts if timestep >= expert.from_timestep)


def expert_per_step(schedule: Schedule, experts: Sequence[ExpertSpec]) -> tuple[Expert, ...]:
    """Return the expert of every step."""
    return tuple(expert_at(timestep, experts) for timestep in schedule.timesteps)


def timeline(request: CompleteRequest, spec: ModelSpec) -> Timeline:
    """Return every step of a request on a model."""
    schedule, loras = schedule_of(request), request.loras
    experts = spec.experts_at(request.boundary)
    steps = []
    for index, expert in enumerate(expert_per_step(schedule, experts)):
        step = schedule.step(index)
        strengths = tuple(lora.strength(expert, index + 1) for lora in loras)
        guidance = request.guidance(expert, index + 1)
        steps.append(TimelineStep(index, step.timestep, step.sigma, expert, guidance, strengths))
    return tuple(steps)


def handover(steps: Timeline, index: int) -> TimelineStep | None:
    """Return the next step after `index` that another expert denoises, if there is one."""
    return next((step for step in steps[index:] if step.expert != steps[index].expert), None)
