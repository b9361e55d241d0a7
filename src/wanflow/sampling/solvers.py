"""UniPC, DPM++ 2M and Euler for rectified flow, as pure functions of a state that is a value.

A state can be kept, saved, loaded elsewhere and continued, with the same bits as if nothing had
happened.

With alpha = 1 - sigma and lambda = log(alpha / sigma), both multistep solvers predict the data, x0
= x - sigma v, and integrate it exactly over a step h in lambda, with a polynomial through the last
predictions. Coefficients are float64, samples float32. Sources: UniPC (arXiv 2302.04867, B(h) =
e^-h - 1, order 2), DPM-Solver++ (arXiv 2211.01095, 2M, midpoint).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from wanflow.sampling.schedule import Schedule, Step

Velocity = Callable[[Tensor, Step], Tensor]


@dataclass(frozen=True)
class SolverState:
    """Where a run stands before step `index`.

    x: the sample. data: x0 predictions of the last steps, newest first (at most two). origin: the
        sample from which the last step set out, which UniPC's corrector returns to.
    """

    index: int
    x: Tensor
    data: tuple[Tensor, ...] = ()
    origin: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Everything but `index`, to be saved."""
        named = {"x": self.x} | {f"data.{i}": value for i, value in enumerate(self.data)}
        return named if self.origin is None else named | {"origin": self.origin}

    @classmethod
    def from_tensors(cls, index: int, named: dict[str, Tensor]) -> SolverState:
        """The inverse of `tensors`."""
        data = tuple(named[f"data.{i}"] for i in range(2) if f"data.{i}" in named)
        return cls(index, named["x"], data, named.get("origin"))


def advance(schedule: Schedule, state: SolverState, velocity: Velocity) -> SolverState:
    """One step: asks `velocity` once and returns the next state. x is float32, on any device."""
    step = schedule.step(state.index)
    v = velocity(state.x, step).to(state.x.dtype)
    if schedule.solver == "euler":
        return SolverState(
            state.index + 1, state.x + (schedule.sigmas[state.index + 1] - step.sigma) * v
        )
    predicted = state.x - step.sigma * v
    if schedule.solver == "dpm++":
        x, origin = _dpm(schedule, state, state.x, predicted), None
    else:
        origin = _correct(schedule, state, predicted) if state.index else state.x
        x = _unipc(schedule, state, origin, predicted)
    return SolverState(state.index + 1, x, (predicted, *state.data)[:2], origin)


def order(schedule: Schedule, index: int) -> int:
    """1 for the first and the last step, else 2."""
    return 1 if index in (0, len(schedule) - 1) else 2


def _log_snr(sigma: float) -> float:
    """lambda: -inf at pure noise, inf at pure data."""
    if sigma >= 1:
        return -math.inf
    return math.inf if sigma <= 0 else math.log(1 - sigma) - math.log(sigma)


def _span(schedule: Schedule, index: int) -> float:
    """The step in lambda from sigma[index] to sigma[index + 1]."""
    return _log_snr(schedule.sigmas[index + 1]) - _log_snr(schedule.sigmas[index])


def _first_order(schedule: Schedule, index: int, x: Tensor, data: Tensor) -> tuple[Tensor, float]:
    """Exact for constant data; also alpha * (e^-h - 1), the weight of what higher orders add."""
    now, after = schedule.sigmas[index], schedule.sigmas[index + 1]
    weight = (1 - after) * math.expm1(-_span(schedule, index))
    return (after / now) * x - weight * data, weight


def _dpm(schedule: Schedule, state: SolverState, x: Tensor, data: Tensor) -> Tensor:
    result, weight = _first_order(schedule, state.index, x, data)
    if order(schedule, state.index) == 1:
        return result
    # From pure noise the span before is infinite, and the correction vanishes by itself.
    ratio = _span(schedule, state.index - 1) / _span(schedule, state.index)
    return result - (0.5 * weight / ratio) * (data - state.data[0])


def _unipc(schedule: Schedule, state: SolverState, x: Tensor, data: Tensor) -> Tensor:
    result, weight = _first_order(schedule, state.index, x, data)
    if order(schedule, state.index) == 1:
        return result
    ratio = -_span(schedule, state.index - 1) / _span(schedule, state.index)
    return result - (0.5 * weight / ratio) * (state.data[0] - data)


def _correct(schedule: Schedule, state: SolverState, data: Tensor) -> Tensor:
    """Redo the step that led here, now that the data prediction at its end is known."""
    assert state.origin is not None
    index = state.index - 1
    before = state.data[0]
    result, weight = _first_order(schedule, index, state.origin, before)
    newest = data - before
    if order(schedule, index) == 1:
        return result - (0.5 * weight) * newest
    h = _span(schedule, index)
    ratio = -_span(schedule, index - 1) / h
    growth = math.expm1(-h)
    phi2 = growth / -h - 1
    phi3 = phi2 / -h - 0.5
    # The two weights a, b solve a + b = phi2 / B and ratio a + b = 2 phi3 / B, with B = e^-h - 1.
    total, tilted = phi2 / growth, 2 * phi3 / growth
    a = (total - tilted) / (1 - ratio)
    return (
        result - (weight * a / ratio) * (state.data[1] - before) - (weight * (total - a)) * newest
    )
