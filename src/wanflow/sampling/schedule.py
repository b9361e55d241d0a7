"""Noise schedules: which sigmas a run visits, and which timestep the model is told at each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from wanflow.config import SOLVERS, TRAIN_STEPS, RequestError, Solver


@dataclass(frozen=True)
class Step:
    """What a velocity function is told beside x. `timestep` is what the model sees; `sigma` what
    the solver computes with.
    """

    index: int
    timestep: float
    sigma: float


@dataclass(frozen=True)
class Schedule:
    """n timesteps and n + 1 sigmas, the last of them 0; sigmas are rounded to float32."""

    solver: Solver
    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.timesteps)

    def step(self, index: int) -> Step:
        return Step(index, self.timesteps[index], self.sigmas[index])


def make_schedule(solver: Solver, steps: int, shift: float) -> Schedule:
    """The official schedule of each solver.

    u falls evenly from its start to 0 (not reached) and is shifted towards noise: sigma = s u / (1
    + (s - 1) u). UniPC starts at 0.999 as float32 has it, the others at 1. UniPC and DPM++ tell the
    model 1000 sigma truncated to an integer *before* sigma is rounded to float32; Euler tells it
    1000 sigma. All of it in float64, with every operation rounded, because timesteps such as 875
    depend on the last bit, and with them the expert.

    Source: `golden/README.md`, "solvers". Where UniPC's first timesteps coincide (from 92 steps at
        shift 12) the official code skips a sigma; this schedule does not.

    Raises:
        RequestError: for settings no schedule can be made of.
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
    """Signal-to-noise ratio ((1 - sigma) / sigma)^2 of x = (1 - sigma) data + sigma noise; infinite
    at 0.
    """
    return ((1 - sigma) / sigma) ** 2 if sigma > 0 else float("inf")
