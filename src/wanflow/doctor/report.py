"""Everything about this machine in one value, and what is wrong with it: found by trying, not
looked up in a table of names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from wanflow.doctor.environment import REQUIRED, Disk, disk, encoder, look_at_packages
from wanflow.doctor.kernels import DTYPES, KernelResult, try_attention, try_matmul
from wanflow.doctor.machine import Device, System, devices, system
from wanflow.runtime import dtype_name
from wanflow.transforms import attention

OLDEST_TORCH = (2, 10)  # below it, weights_only loading has known bypasses
SMALL_SHM = 2**30
WHEELS = "https://download.pytorch.org/whl"


@dataclass(frozen=True)
class Problem:
    level: Literal["broken", "warning", "note"]
    text: str


@dataclass(frozen=True)
class Report:
    system: System
    devices: tuple[Device, ...]
    tries: tuple[KernelResult, ...]
    auto: dict[str, dict[str, str]]  # {device: {dtype: the attention kernel that `auto` takes}}
    disk: Disk
    encoder: str  # why no video can be written, "" if it can
    packages: dict[str, str]  # {name: version, "" if not installed}
    problems: tuple[Problem, ...] = ()

    @property
    def fine(self) -> bool:
        return not any(problem.level == "broken" for problem in self.problems)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"fine": self.fine, **asdict(self)}


def examine(
    folder: Path, hidden: str | None = None, say: Callable[[str], None] = lambda _: None
) -> Report:
    """Look at everything; takes some seconds.

    Args:
        folder: where weights are or will be.
        hidden: the value of CUDA_VISIBLE_DEVICES, if it is set.
        say: told what is being tried.
    """
    say("the machine")
    here, found, trouble = system(), *devices()
    tries: list[KernelResult] = []
    models: set[str] = set()
    for device in found:
        if (
            device.model not in models
        ):  # of several equal GPUs one stands for all; the products below are tried on each
            tries += try_attention(torch.device(device.name), say)
        tries += try_matmul(torch.device(device.name), say)
        models.add(device.model)
    say("the packages and the video encoder")
    packages, broken = look_at_packages()
    no_encoder = f"av {broken['av']}" if "av" in broken else encoder()
    report = Report(
        here, found, tuple(tries), _auto(found, tries), disk(folder, say), no_encoder, packages
    )
    return replace(report, problems=tuple(problems(report, broken, hidden, trouble)))


def _auto(found: Sequence[Device], tries: Sequence[KernelResult]) -> dict[str, dict[str, str]]:
    chosen: dict[str, dict[str, str]] = {}
    for device in found:
        works = {
            (one.dtype, one.way)
            for one in tries
            if one.what == "attention" and one.device == device.name and not one.why
        }
        order = attention.order(torch.device(device.name)) if works else ()
        for dtype in map(dtype_name, DTYPES):
            first = next((way for way in order if (dtype, way) in works), None)
            if first:
                chosen.setdefault(device.name, {})[dtype] = first
    return chosen


def problems(
    report: Report, broken: dict[str, str], hidden: str | None, trouble: Sequence[str]
) -> Iterator[Problem]:
    """What is known to go wrong on such a machine; "broken" is what wanflow cannot do without."""
    here = report.system
    if tuple(map(int, re.findall(r"\d+", here.torch)[:2])) < OLDEST_TORCH:
        need = ".".join(map(str, OLDEST_TORCH))
        yield Problem(
            "broken",
            f"PyTorch {here.torch} is too old, and loads damaged or hostile files; pip install"
            f" 'torch>={need}'",
        )
    for package, why in broken.items():
        if package in REQUIRED:
            yield Problem("broken", f"{package} {why}; pip install --force-reinstall {package}")
        else:
            yield Problem("warning", f"{package} {why}")
    if report.encoder and "av" not in broken:
        yield Problem(
            "broken",
            f"no video can be written, H.264 is missing: {report.encoder}; pip install"
            " --force-reinstall av",
        )
    yield from _gpu_problems(report, hidden, trouble)
    for device in report.devices:
        works = {one.what for one in report.tries if one.device == device.name and not one.why}
        same = [
            other.name for other in report.devices if other.model == device.model
        ]  # attention was tried on the first of them
        if "matmul" not in works or (same[0] == device.name and "attention" not in works):
            why = next(
                (one.why for one in report.tries if one.device == device.name and one.why),
                "nothing could be tried",
            )
            yield Problem("broken", f"{device.name} ({device.model}) cannot compute: {why}")
    for one in report.tries:
        package = attention.BACKENDS[one.way].package if one.way in attention.BACKENDS else ""
        if (
            one.why
            and package
            and report.packages.get(package)
            and package not in broken
            and one.dtype == "bfloat16"
        ):
            yield Problem(
                "warning",
                f"attention {one.way} is installed but does not work on {one.device}: {one.why}",
            )
    if report.packages.get("sageattention"):
        yield Problem(
            "note",
            "attention sage is never chosen by itself: it changes the video, and with fp8 weights"
            " black frames are known",
        )
    if any(device.name == "mps" for device in report.devices):
        yield Problem("note", "MPS has no float64: what needs it is computed on the CPU")
    if 0 < here.shm < SMALL_SHM:
        several = sum(device.name.startswith("cuda") for device in report.devices) > 1
        text = (
            f"/dev/shm holds only {here.shm / 2**20:.0f} MiB, too little for several GPUs; in"
            " Docker start with --shm-size=8g"
        )
        yield Problem("warning" if several else "note", text)
    if here.ram_limited:
        yield Problem(
            "note", f"this container may use {here.ram / 1e9:.1f} GB of RAM; the machine has more"
        )


def _gpu_problems(report: Report, hidden: str | None, trouble: Sequence[str]) -> Iterator[Problem]:
    """An NVIDIA GPU that PyTorch does not see, and why."""
    here = report.system
    present = bool(here.driver or here.cards)
    if any(device.name.startswith("cuda") for device in report.devices) or not present:
        for text in trouble:
            yield Problem("warning", f"CUDA: {text}")
        return
    what = (
        f"{', '.join(dict.fromkeys(here.cards)) or 'an NVIDIA GPU'} (driver"
        f" {here.driver or 'unknown'})"
    )
    newest = int(here.driver_cuda.partition(".")[0]) if here.driver_cuda else 0
    index = "cu130" if newest >= 13 else "cu126"
    install = f"pip install --force-reinstall torch --index-url {WHEELS}/{index}"
    if hidden is not None and hidden.strip() in ("", "-1"):
        yield Problem(
            "warning",
            f"{what} is hidden by CUDA_VISIBLE_DEVICES={hidden!r}; unset it to use the GPU",
        )
    elif newest and newest < 12:
        yield Problem(
            "broken",
            f"{what} cannot be used: the driver serves CUDA {here.driver_cuda} at most; install"
            " driver 580 or newer",
        )
    elif not here.cuda:
        yield Problem(
            "broken",
            f"{what} cannot be used: this PyTorch ({here.torch}) is built for CPUs only; {install}",
        )
    elif newest and newest < int(here.cuda.partition(".")[0]):
        yield Problem(
            "broken",
            f"{what} cannot be used: PyTorch is built for CUDA {here.cuda} and the driver serves"
            f" {here.driver_cuda} at most; install a newer driver, or {install}",
        )
    else:
        why = "; ".join(trouble) or "PyTorch sees no CUDA device"
        why += (
            "; see whether nvidia-smi works, and restart the machine after an update of the driver"
        )
        yield Problem("broken", f"{what} cannot be used: {why}")
