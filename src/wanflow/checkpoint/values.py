"""Check the values of weights: NaN, infinity, constant tensors. Every byte is read, in pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wanflow.checkpoint.containers import Report, TensorSource
from wanflow.checkpoint.layouts import weight_groups
from wanflow.checkpoint.source import open_source
from wanflow.config import RequestError


class BadValuesError(OSError):
    """Weights that no model can have: exit code 1."""


def extremes(piece: Tensor) -> tuple[float, float]:
    """Return the least and the largest value: both NaN if one is NaN; 0 and 0 if it is empty.

    Checking these two for infinity takes a twentieth of the time of `isfinite`.
    """
    if not len(piece):
        return 0.0, 0.0
    low, high = torch.aminmax(piece)
    return float(low), float(high)


def finite(piece: Tensor) -> bool:
    """Return whether all values are finite."""
    return all(map(math.isfinite, extremes(piece)))


@dataclass(frozen=True)
class Finding:
    """A remarkable tensor. `bad`: no model can have such values."""

    path: str
    tensor: str
    what: str
    bad: bool


def check_values(path: Path, report: Report | None = None) -> Iterator[Finding]:
    """Read every tensor and yield those with NaN, infinity, or a single value."""
    for group in weight_groups(path) if path.is_dir() else [path]:
        name = group.name if group == path else group.relative_to(path).as_posix()
        try:
            source = open_source(group)
        except RequestError as error:
            yield Finding(name, "", str(error), True)
            continue
        done, total = 0, source.nbytes
        for tensor, info in source.tensors.items():
            if info.dtype.is_floating_point:
                try:
                    finding = _finding(source, tensor)
                except RequestError as error:
                    finding = str(error), True
                if finding:
                    yield Finding(name, tensor, *finding)
            done += info.nbytes
            if report is not None:
                report(done, total)


def _finding(source: TensorSource, name: str) -> tuple[str, bool] | None:
    nans = infinities = count = 0
    least, most = math.inf, -math.inf
    for piece in source.stream(name):
        low, high = extremes(piece)
        count += len(piece)
        least, most = min(least, low), max(most, high)
        if not math.isfinite(high - low):
            nans += int(piece.isnan().sum())
            infinities += int(piece.isinf().sum())
    counts = {"NaN": nans, "infinite": infinities}
    bad = [f"{number:,} {what}" for what, number in counts.items() if number]
    if bad:
        return f"{' and '.join(bad)} of {count:,} values", True
    if count > 1 and least == most:
        return f"all {most:g}" if most else "all zero", False
    return None
