"""Examine this machine and name its problems, by running things rather than by a list of models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from wanflow.doctor.environment import (
    REQUIRED,
    Disk,
    System,
    disk,
    encoder,
    look_at_packages,
    system,
)
from wanflow.doctor.kernels import KernelResult, try_attention, try_convolution, try_matmul
from wanflow.hardware import Device, devices
from wanflow.runtime import DTYPES
from wanflow.transforms import attention
from wanflow.transforms.attention_kernels import BACKENDS
from wanflow.transforms.host_memory import pin_limit, probe_pinned, system_name
from wanflow.units import memory_size

OLDEST_TORCH = (2, 10)  # older releases have known bypasses of weights_only loading
SMALL_SHM = 2**30
WHEELS = "https://download.pytorch.org/whl"


@dataclass(frozen=True)
class Problem:
    """A known problem. "broken": wanflow cannot run without it."""

    level: Literal["broken", "warning", "note"]
    text: str


@dataclass(frozen=True)
class Report:
    """The results of one examination."""

    system: System
    devices: tuple[Device, ...]
    tries: tuple[KernelResult, ...]
    auto: dict[str, dict[str, str]]  # {device: {dtype: the attention kernel that `auto` picks}}
    disk: Disk
    encoder: str  # why no video can be written, "" if it can
    packages: dict[str, str]  # {name: version, "" if not installed}
    problems: tuple[Problem, ...] = ()
    pinned: int | None = None  # bytes of RAM that can be pinned for a GPU; None: there is none

    @property
    def fine(self) -> bool:
        return not any(problem.level == "broken" for problem in self.problems)

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {"fine": self.fine, **asdict(self)}

    def works(self, device: str, what: str) -> list[KernelResult]:
        """Return the results of one kind on a device that work."""
        return [r for r in self.tries if (r.device, r.what) == (device, what) and not r.why]


def examine(
    folder: Path, hidden: str | None = None, say: Callable[[str], None] = lambda _: None
) -> Report:
    """Examine everything; takes some seconds.

    Args:
        folder: where weights are or will be.
        hidden: the value of CUDA_VISIBLE_DEVICES, if it is set.
        say: called with what is examined next.
    """
    say("the machine")
    here, (found, messages) = system(), devices()
    tries: list[KernelResult] = []
    for index, device in enumerate(found):
        if device.model not in [earlier.model for earlier in found[:index]]:
            tries += try_attention(torch.device(device.name), say)  # one of several equal GPUs
            tries += try_convolution(torch.device(device.name), say)
        tries += try_matmul(torch.device(device.name), say)
    say("the packages and the video encoder")
    packages, broken = look_at_packages()
    no_encoder = f"av {broken['av']}" if "av" in broken else encoder()
    report = Report(here, found, tuple(tries), {}, disk(folder, say), no_encoder, packages)
    report = replace(report, auto=_auto(report), pinned=_pinned(report))
    return replace(report, problems=tuple(problems(report, broken, hidden, messages)))


def _pinned(report: Report) -> int | None:
    """Return how many bytes of RAM can be pinned, by trying; the driver limits it on Windows."""
    gpu = next((one.name for one in report.devices if one.name.startswith("cuda")), None)
    if gpu is None:
        return None
    probed = None
    with suppress(Exception):  # of a driver that is broken; other parts of the report show it
        probed = probe_pinned(torch.device(gpu), None, report.system.ram_free)
    return pin_limit(report.system.ram, probed, system_name())


def _auto(report: Report) -> dict[str, dict[str, str]]:
    """Return what `auto` picks: the fastest on a GPU, elsewhere the first that works."""
    chosen: dict[str, dict[str, str]] = {}
    for device in report.devices:
        works = {(each.dtype, each.way): each for each in report.works(device.name, "attention")}
        order = attention.order(attention.card_of(torch.device(device.name))) if works else ()
        for dtype in DTYPES:
            names = [name for name in order if (dtype, name) in works]
            # "sdpa" is the last: it runs one of the others, or plain matrix products.
            timed = [name for name in names if name != "sdpa" and works[dtype, name].seconds]
            pick = min(timed, key=lambda name: works[dtype, name].seconds or 0, default="")
            if pick or names:
                chosen.setdefault(device.name, {})[dtype] = pick or names[0]
    return chosen


def problems(
    report: Report, broken: dict[str, str], hidden: str | None, messages: Sequence[str]
) -> Iterator[Problem]:
    """Yield the known problems of such a machine.

    `broken` is {package: reason}, `hidden` the value of CUDA_VISIBLE_DEVICES if it is set, and
    `messages` are PyTorch's, about devices that it cannot use.
    """
    here = report.system
    if tuple(map(int, re.findall(r"\d+", here.torch)[:2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        yield Problem(
            "broken",
            f"PyTorch {here.torch} is too old, and loads damaged or hostile files; pip install"
            f" 'torch>={oldest}'",
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
    yield from _gpu_problems(report, hidden, messages)
    yield from _kernel_problems(report, broken)
    if report.pinned is not None and report.pinned < here.ram:
        pinned = f"{memory_size(report.pinned)} of {memory_size(here.ram)} of RAM"
        yield Problem(
            "note",
            f"the driver pins at most {pinned} (WSL2 and Windows limit it): blocks beyond it are"
            " streamed from pageable memory, which takes longer",
        )
    if any(device.name == "mps" for device in report.devices):
        yield Problem("note", "MPS has no float64: computations that need it run on the CPU")
    if 0 < here.shm < SMALL_SHM:
        several = sum(device.name.startswith("cuda") for device in report.devices) > 1
        yield Problem(
            "warning" if several else "note",
            f"/dev/shm holds only {here.shm / 2**20:.0f} MiB, too little for several GPUs; in"
            " Docker start with --shm-size=8g",
        )
    if here.ram_limited:
        limit = f"{memory_size(here.ram)} of RAM"
        yield Problem("note", f"this container may use {limit}; the machine has more")


def _kernel_problems(report: Report, broken: dict[str, str]) -> Iterator[Problem]:
    models = [device.model for device in report.devices]
    for index, device in enumerate(report.devices):
        first = device.model not in models[:index]  # attention ran on the first of equal GPUs
        computes = report.works(device.name, "matmul")
        attends = report.works(device.name, "attention") or not first
        if not computes or not attends:
            reasons = [each.why for each in report.tries if each.device == device.name and each.why]
            why = next(iter(reasons), "nothing could be tried")
            yield Problem("broken", f"{device.name} ({device.model}) cannot compute: {why}")
    cudnn = f" (cuDNN {report.system.cudnn})" if report.system.cudnn else ""
    for result in report.tries:
        if result.what == "convolution" and result.why:
            yield Problem(
                "broken",
                f"{result.way} in {result.dtype} on {result.device}{cudnn}: {result.why}; the VAE"
                " needs it: pip install --upgrade torch",
            )
    for result in report.tries:
        kernel = BACKENDS.get(result.way)
        if kernel is None or result.dtype != "bfloat16" or not result.why:
            continue
        if report.packages.get(kernel.package) and kernel.package not in broken:
            yield Problem(
                "warning",
                f"attention {result.way} is installed but fails on {result.device}: {result.why}",
            )
    if report.packages.get("sageattention"):
        yield Problem(
            "note",
            "attention sage is never chosen automatically: it changes the video, and with fp8"
            " weights black frames are known",
        )


def _gpu_problems(report: Report, hidden: str | None, messages: Sequence[str]) -> Iterator[Problem]:
    """Yield why PyTorch does not see an NVIDIA GPU."""
    here = report.system
    present = bool(here.driver or here.cards)
    if any(device.name.startswith("cuda") for device in report.devices) or not present:
        for text in messages:
            yield Problem("warning", f"CUDA: {text}")
        return
    cards = ", ".join(dict.fromkeys(here.cards)) or "an NVIDIA GPU"
    gpu = f"{cards} (driver {here.driver or 'unknown'})"
    newest = int(here.driver_cuda.partition(".")[0]) if here.driver_cuda else 0
    index = "cu130" if newest >= 13 else "cu126"
    install = f"pip install --force-reinstall torch --index-url {WHEELS}/{index}"
    if hidden is not None and hidden.strip() in ("", "-1"):
        unset = f"CUDA_VISIBLE_DEVICES={hidden!r}; unset it to use the GPU"
        yield Problem("warning", f"{gpu} is hidden by {unset}")
        return
    if newest and newest < 12:
        why = f"the driver supports CUDA {here.driver_cuda} at most; install driver 580 or newer"
    elif not here.cuda:
        why = f"this PyTorch ({here.torch}) is built for CPUs only; {install}"
    elif newest and newest < int(here.cuda.partition(".")[0]):
        why = (
            f"PyTorch is built for CUDA {here.cuda} and the driver supports {here.driver_cuda} at"
            f" most; install a newer driver, or {install}"
        )
    else:
        why = (
            f"{'; '.join(messages) or 'PyTorch sees no CUDA device'}; check nvidia-smi, and restart"
            " the machine after a driver update"
        )
    yield Problem("broken", f"{gpu} cannot be used: {why}")
