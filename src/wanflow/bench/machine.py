"""Check the machine itself: versions, kernels, the memory of a context, and pinned memory."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from wanflow.bench.record import Record, Skip
from wanflow.bench.tools import Scale
from wanflow.hardware import cpu_name, gpu_memory_free, memory, nvidia
from wanflow.transforms.host_memory import HostMemory, clear_error
from wanflow.units import memory_size

PINNED = 16 << 20  # bytes of a range that is registered twice
LEAST_CONTEXT = 50_000_000  # bytes


def versions() -> dict[str, str]:
    """Return the versions of the software, without those that are not there."""
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": cudnn and f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}",
        "driver": nvidia()[0],
    }
    return {name: str(version) for name, version in found.items() if version}


def about_device(device: torch.device, dtype: str) -> dict[str, Any]:
    """Return the device and the software, as `plan.calibration.Calibration` names them."""
    name, size = cpu_name() or "cpu", memory()[0]
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        name, size = card.name, card.total_memory
    return {"device": name, "device_memory": size, "dtype": dtype, "versions": versions()}


def machine(record: Record, scale: Scale) -> None:
    """Find the versions, the memory of a context, and what the doctor says."""
    with record.asking("memory of a context"):
        _context(record, scale)
    with record.asking("versions"):
        found = versions()
        record.measured("versions", ", ".join(f"{k} {v}" for k, v in found.items()), **found)
    with record.asking("doctor"):
        _doctor(record, scale)


def _context(record: Record, scale: Scale) -> None:
    """Measure what a process takes of a GPU before its first tensor, by the driver's count."""
    if not scale.cuda:
        raise Skip("needs CUDA")
    index = scale.device.index or 0
    before = gpu_memory_free([index])[0]
    torch.ones(1 << 20, device=scale.device).sum().item()
    kept = torch.cuda.memory_reserved(scale.device)
    free, total = torch.cuda.mem_get_info(scale.device)
    context = before - gpu_memory_free([index])[0] - kept
    known = context >= LEAST_CONTEXT  # else nvidia-smi does not know this card
    if known:
        record.calibrate(context=context)
    taken = memory_size(context) if known else "nvidia-smi does not say it"
    record.measured(
        "memory of a context",
        f"{taken}; {memory_size(free)} of {memory_size(total)} are free",
        "0.4 to 0.6 GB",
        context=context,
        total=total,
        free=free,
    )


def _doctor(record: Record, scale: Scale) -> None:
    """Run the doctor; packages that this check does without count as a remark."""
    from wanflow.doctor.environment import REQUIRED
    from wanflow.doctor.report import examine

    report = examine(Path.cwd())
    packages = tuple(f"{name} " for name in REQUIRED)
    lacking = [p.text for p in report.problems if p.text.startswith(packages)]
    broken = [p.text for p in report.problems if p.level == "broken" and p.text not in lacking]
    broken = [text for text in broken if not text.startswith("no video can be written")]
    remarks = [p.text for p in report.problems if p.text not in broken]
    record.passed("doctor", not broken, "; ".join(broken) or "nothing is broken", "nothing broken")
    if remarks:
        record.measured("doctor's remarks", "; ".join(remarks))
    for result in report.tries:
        if result.device == str(scale.device) or result.device.startswith(scale.device.type):
            speed = "" if result.tflops is None else f"{result.tflops:.3g} TFLOP/s"
            what = f"{result.what} {result.way} in {result.dtype}"
            record.measured(what, result.why or speed, tflops=result.tflops, error=result.error)
    if report.disk.reads:
        record.calibrate(disk=report.disk.reads)


# pinned memory


def pinning(record: Record, scale: Scale) -> None:
    """Register ranges that the driver must refuse, and compute after that."""
    with record.asking("a range registered twice"):
        _twice(record, scale)
    with record.asking("two pinned buffers on one page"):
        _one_page(record, scale)


def _twice(record: Record, scale: Scale) -> None:
    if not scale.cuda:
        raise Skip("needs CUDA")
    runtime: Any = torch.cuda.cudart()
    buffer = torch.empty(PINNED, dtype=torch.uint8)
    torch.ones(1, device=scale.device)
    codes = [int(runtime.cudaHostRegister(buffer.data_ptr(), PINNED, 0)) for _ in range(2)]
    latched = ""
    try:
        torch.ones(1, device=scale.device).add_(1).item()
    except RuntimeError as error:
        latched = str(error).splitlines()[0]
    clear_error(runtime)
    works = torch.ones(1, device=scale.device).add_(1).item() == 2
    runtime.cudaHostUnregister(buffer.data_ptr())
    record.measured(
        "a range registered twice",
        f"the driver returns {codes}; the next kernel {latched or 'runs'}",
        "[0, 712]; the next kernel raises until the error is cleared",
        codes=codes,
        latched=latched,
    )
    record.passed("a kernel after the error is cleared", works, "it runs", "it runs")


def _one_page(record: Record, scale: Scale) -> None:
    """Pin two small buffers by wanflow's own way, use and free one, then use the other."""
    if not scale.cuda:
        raise Skip("needs CUDA")
    ram = HostMemory(True)
    first, second = ram.buffer(1000), ram.buffer(1000)
    apart = abs(first.data_ptr() - second.data_ptr()) // 4096
    del first
    second.fill_(3)
    copied = second.to(scale.device, non_blocking=True)
    torch.cuda.synchronize(scale.device)
    right = bool((copied == 3).all().item())
    what, pinned = "two pinned buffers on one page", "pinned" if ram.pin else "not pinned"
    record.passed(what, right, f"{apart} pages apart, {pinned}", "a right copy")
