"""Limits of training's numbers, by the flag that sets them; without torch."""

from __future__ import annotations

from collections.abc import Mapping

from wanflow.config import RequestError

LIMITS = {
    "rank": (1, 4096),
    "steps": (1, 10**8),
    "batch": (1, 65_536),
    "grad_accum": (1, 65_536),
    "seed": (0, 2**32 - 1),  # a step's generator takes a million times as much
    "save_every": (0, 10**6),
}


def check_limits(values: Mapping[str, float | None]) -> None:
    """Raise RequestError for a number beyond its limits; None is left open."""
    for flag, (low, high) in LIMITS.items():
        value = values.get(flag)
        if value is not None and not low <= value <= high:  # also for NaN
            got = f"{value}" if isinstance(value, float) or abs(value) < 10**30 else "more"
            raise RequestError(f"--{flag} must be from {low:,} to {high:,} (got {got})")
