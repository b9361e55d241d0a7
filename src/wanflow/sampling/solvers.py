"""Solve rectified flow by UniPC, DPM++ 2M or Euler, as pure functions of a state.

The state is a value: saved, loaded elsewhere and continued, it gives the same bits.

With alpha = 1 - sigma and lambda = log(alpha / sigma), both multistep solvers predict the data, x0
= x - sigma v. They integrate it exactly over a step h in lambda, with a polynomial through the last
predictions. Coefficients are float64, samples float32. Sources: UniPC (arXiv 2302.04867, B(h) =
e^-h - 1, order 2), DPM-Solver++ (arXiv 2211.01095, 2M, midpoint).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from wanflow.config import Solver
from wanflow.sampling.schedule import Schedule, Step

Velocity = Callable[[Tensor, Step], Tensor]


@dataclass(frozen=True)
class SolverState:
    """The state of a run before step `index`.

    x: the sample. data: x0 predictions of the last steps, newest first (at most two). origin: the
        sample before the last step, from which UniPC's corrector redoes it.
    """

    index: int
    x: Tensor
    data: tuple[Tensor, ...] = ()
    origin: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, for saving."""
        named = {"x": self.x} | {f"data.{i}": value for i, value in enumerate(self.data)}
        return named if self.origin is None else named | {"origin": self.origin}

    @classmethod
    def from_tensors(cls, index: int, named: dict[str, Tensor]) -> SolverState:
        """Return the state of these tensors; the inverse of `tensors`."""
        data = tuple(named[f"data.{i}"] for i in range(2) if f"data.{i}" in named)
        return cls(index, named["x"], data, named.get("origin"))


def state_names(solver: Solver, index: int) -> set[str]:
    """Return the names of the tensors that the state of a solver has before step `index`."""
    history = 0 if solver == "euler" else min(index, 2)
    origin = {"origin"} if solver == "unipc" and index else set()
    return {"x", *(f"data.{i}" for i in range(history)), *origin}


def advance(schedule: Schedule, state: SolverState, velocity: Velocity) -> SolverState:
    """Take one step: call `velocity` once, and return the next state. x is float32."""
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
    """Return a step's order: 1 for the first and the last, otherwise 2."""
    return 1 if index in (0, len(schedule) - 1) else 2


def _log_snr(sigma: float) -> float:
    """lambda: -inf at pure noise, inf at pure data."""
    if sigma >= 1:
        return -math.inf
    return math.inf if sigma <= 0 else math.log(1 - sigma) - math.log(sigma)


def _span(schedule: Schedule, index: int) -> float:
    """Return the step in lambda from sigma[index] to sigma[index + 1]."""
    return _log_snr(schedule.sigmas[index + 1]) - _log_snr(schedule.sigmas[index])


def _first_order(schedule: Schedule, index: int, x: Tensor, data: Tensor) -> tuple[Tensor, float]:
    """Return the step for constant data, and alpha * (e^-h - 1), the weight of higher orders."""
    now, after = schedule.sigmas[index], schedule.sigmas[index + 1]
    weight = (1 - after) * math.expm1(-_span(schedule, index))
    return (after / now) * x - weight * data, weight


def _dpm(schedule: Schedule, state: SolverState, x: Tensor, data: Tensor) -> Tensor:
    result, weight = _first_order(schedule, state.index, x, data)
    if order(schedule, state.index) == 1:
        return result
    # After a step from pure noise the ratio is infinite, so the correction vanishes.
    ratio = _span(schedule, state.index - 1) / _span(schedule, state.index)
    return result - (0.5 * weight / ratio) * (data - state.data[0])


def _unipc(schedule: Schedule, state: SolverState, x: Tensor, data: Tensor) -> Tensor:
    result, weight = _first_order(schedule, state.index, x, data)
    if order(schedule, state.index) == 1:
        return result
    ratio = -_span(schedule, state.index - 1) / _span(schedule, state.index)
    return result - (0.5 * weight / ratio) * (state.data[0] - data)


def _correct(schedule: Schedule, state: SolverState, data: Tensor) -> Tensor:
    """Redo the last step with the data prediction at its end."""
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
