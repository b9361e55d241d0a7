"""Make noise schedules: the sigmas that a run visits, and the timestep of each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from wanflow.config import SOLVERS, TRAIN_STEPS, RequestError, Solver


@dataclass(frozen=True)
class Step:
    """One step: the model sees `timestep`, the solver computes with `sigma`."""

    index: int
    timestep: float
    sigma: float


@dataclass(frozen=True)
class Schedule:
    """The n timesteps and n + 1 sigmas of a run; the last sigma is 0. Sigmas are float32."""

    solver: Solver
    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.timesteps)

    def step(self, index: int) -> Step:
        return Step(index, self.timesteps[index], self.sigmas[index])


def make_schedule(solver: Solver, steps: int, shift: float) -> Schedule:
    """Return the official schedule of a solver.

    u falls evenly from its start towards 0 and is shifted towards noise: sigma = s u / (1 + (s - 1)
    u). UniPC starts at float32's 0.999, the others at 1. Euler's timestep is 1000 sigma. UniPC's
    and DPM++'s is truncated to an integer, *before* sigma is rounded to float32. The arithmetic is
    float64 and rounds every operation: timesteps such as 875 depend on the last bit, and the expert
    depends on them.

    Source: `golden/README.md`, "solvers". Where UniPC's first timesteps coincide (from 92 steps at
        shift 12) the official code skips a sigma; this schedule does not.

    Raises:
        RequestError: for settings that make no schedule.
    """
    if solver not in SOLVERS:
        raise RequestError(f"sample_solver {solver!r} is none of {', '.join(SOLVERS)}")
    if steps < 1 or not 0 < shift < math.inf:
        raise RequestError(f"no schedule has {steps} steps at shift {shift}")
    start = 0.9990000128746033 if solver == "unipc" else 1.0
    spacing = -start / steps
    exact = []
    for index in range(steps):
        u = start + index * spacing
        exact.append((shift * u) / (1 + (shift - 1) * u))
    timesteps = [sigma * TRAIN_STEPS for sigma in exact]
    if solver != "euler":
        timesteps = [float(int(timestep)) for timestep in timesteps]
    sigmas = [float(np.float32(sigma)) for sigma in (*exact, 0.0)]
    return Schedule(solver, tuple(timesteps), tuple(sigmas))


def snr(sigma: float) -> float:
    """Return the signal-to-noise ratio ((1 - sigma) / sigma)^2; infinite at 0."""
    return ((1 - sigma) / sigma) ** 2 if sigma > 0 else float("inf")
