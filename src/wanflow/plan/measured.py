"""Plan by what `wanflow bench` measured of a device, in place of what is assumed of it."""

from __future__ import annotations

from dataclasses import replace

import torch

from wanflow.config import RequestError
from wanflow.hardware import cpu_name
from wanflow.plan.calibration import Calibration, read_calibration
from wanflow.plan.cards import Rates, same_model
from wanflow.plan.gpus import Kind, Machine
from wanflow.runtime import dtype_name
from wanflow.units import memory_size
from wanflow.untrusted import printable, user_path

NEAR = 0.1  # by this share the memory of one model of a card may differ


def calibrated(machine: Machine, file: str, kind: Kind, dtype: torch.dtype) -> Machine:
    """Return a machine with the rates and overheads that a file of `wanflow bench` holds.

    Raises:
        RequestError: for a file that is none, and for one of another device or dtype.
    """
    found = read_calibration(user_path(file))
    if not _is_of(found, machine, kind):
        size = f" with {memory_size(found.device_memory)}" if found.device_memory else ""
        here = machine.gpu_name or "a GPU without a name"
        here = f"{here} with {memory_size(machine.gpu)}" if kind == "gpu" else cpu_name() or "a CPU"
        raise RequestError(
            f"calibration {printable(file)}: measured on {printable(found.device)}{size}; this plan"
            f" is for {here}; measure there: wanflow bench --check --json > calibration.json"
        )
    if found.dtype != dtype_name(dtype):
        raise RequestError(
            f"calibration {printable(file)}: measured in {found.dtype}; this plan is in"
            f" {dtype_name(dtype)}; add --dtype {found.dtype}, or leave out --calibration"
        )
    given = {"context": found.context, "workspace": found.workspace, "gaps": found.fragmentation}
    measured = {name: value for name, value in given.items() if value is not None}
    overheads = machine.overheads
    if measured:
        rest = {"context", "gaps", "workspace"} - set(measured)
        source = source_of(found) + (f"; {', '.join(sorted(rest))}: assumed" if rest else "")
        overheads = replace(overheads, **measured, source=source)  # type: ignore[arg-type]
    return replace(machine, overheads=overheads, rates=rates_of(found, machine.rates))


def with_calibration(rates: Rates, file: str | None) -> Rates:
    """Return rates of a short measurement here, with those of a file in their place."""
    if file is None:
        return rates
    return rates_of(read_calibration(user_path(file)), rates) or rates


def rates_of(found: Calibration, assumed: Rates | None) -> Rates | None:
    """Return the measured rates, and the assumed ones where nothing was measured."""
    rates = found.rates(assumed)
    if rates is None or rates is assumed:
        return rates
    kernel = assumed.kernel if assumed and found.attention is None else "the fastest kernel there"
    compiled = found.compiled or 0.0
    return replace(rates, source=source_of(found), kernel=kernel, compiled=compiled)


def source_of(found: Calibration) -> str:
    """Say where a calibration comes from."""
    return f"measured on {printable(found.device)} by wanflow bench"


def _is_of(found: Calibration, machine: Machine, kind: Kind) -> bool:
    if kind == "cpu":
        return found.device in (cpu_name(), "cpu")
    near = abs(found.device_memory - machine.gpu) <= NEAR * machine.gpu
    return near and same_model(found.device, machine.gpu_name)
