"""Which expert works at which timestep."""

from __future__ import annotations

from typing import Literal

from wanflow.config import TRAIN_STEPS
from wanflow.sampling.schedule import Schedule

Expert = Literal["high", "low"]


def expert_at(timestep: float, boundary: float) -> Expert:
    """The high-noise expert from boundary * 1000 upwards (low signal-to-noise ratio), the low-noise
    expert below.
    """
    return "high" if timestep >= boundary * TRAIN_STEPS else "low"


def experts(schedule: Schedule, boundary: float) -> tuple[Expert, ...]:
    """The expert of every step."""
    return tuple(expert_at(timestep, boundary) for timestep in schedule.timesteps)
