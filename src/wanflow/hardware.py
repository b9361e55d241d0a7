"""Look up this machine: devices, memory, cores and the NVIDIA driver, within container limits.

torch is imported only where a device is asked.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READINGS, READING_S = 5, 0.01  # of what runs: a process that works for a moment does not count
UNLIMITED = 2**60  # cgroup v1 writes "no limit" as a number near 2**63


@dataclass(frozen=True)
class Device:
    """A device that PyTorch can compute on; memory in bytes."""

    name: str
    model: str
    memory: int = 0
    memory_free: int = 0
    capability: str = ""


def devices() -> tuple[tuple[Device, ...], list[str]]:
    """Return the devices that PyTorch can use, and its messages about those it cannot."""
    import torch

    found, messages = [Device("cpu", cpu_name())], list[str]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        except Exception as error:  # a broken driver can raise any type
            count = 0
            messages.append(f"{type(error).__name__}: {error}")
        for n in range(count):
            try:
                card = torch.cuda.get_device_properties(n)
                free, total = torch.cuda.mem_get_info(n)
                capability = f"{card.major}.{card.minor}"
                found.append(Device(f"cuda:{n}", card.name, total, free, capability))
            except Exception as error:
                first = next(iter(str(error).splitlines()), "")
                messages.append(f"cuda:{n} {type(error).__name__}: {first}")
    if torch.backends.mps.is_available():
        found.append(Device("mps", "Apple GPU", int(torch.mps.recommended_max_memory())))
    return tuple(found), messages + [str(one.message).splitlines()[0] for one in caught]


# the NVIDIA driver, without PyTorch, which may be unable to see its cards


def nvidia(root: Path = Path("/")) -> tuple[str, str, tuple[str, ...]]:
    """Return the driver's version, the newest CUDA it supports, and its cards; "" if unknown."""
    table = _run("nvidia-smi")
    version = re.search(r"Driver Version:\s*([\d.]+)", table)
    cuda = re.search(r"CUDA[\w ]*Version:\s*([\d.]+)", table)
    names = _run("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") if table else ""
    cards = tuple(line.strip() for line in names.splitlines() if line.strip())
    proc = root / "proc/driver/nvidia"
    if not version:
        version = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", _text(proc / "version"))
    if not cards:
        texts = [_text(info) for info in sorted((proc / "gpus").glob("*/information"))]
        models = [re.search(r"Model:\s*(.+)", text) for text in texts]
        cards = tuple(model[1].strip() for model in models if model)
    return version[1] if version else "", cuda[1] if cuda else "", cards


def gpu_driver(root: Path = Path("/")) -> bool:
    """Return whether a driver for GPUs is here, so that PyTorch is worth asking."""
    return platform.system() == "Darwin" or (root / "dev/kfd").exists() or bool(nvidia(root)[2])


def gpu_memory_free(indices: Sequence[int]) -> list[int]:
    """Return the free bytes of CUDA devices, by their numbers.

    nvidia-smi is asked, since a question through CUDA costs a context of 0.5 GB on each card. It
    numbers cards in another order than CUDA, and knows no MIG instance: UUIDs tell them apart.
    Where it does not know all of them, CUDA answers.
    """
    import torch

    table = _run("nvidia-smi", "--query-gpu=uuid,memory.free", "--format=csv,noheader,nounits")
    rows = re.findall(r"^(?:GPU-)?([\w-]+), (\d+)$", table, re.MULTILINE)
    free = {uuid: int(mebibytes) * 2**20 for uuid, mebibytes in rows}
    cards = [torch.cuda.get_device_properties(index) for index in indices]
    uuids = [str(getattr(card, "uuid", "")).removeprefix("GPU-") for card in cards]
    if all(uuid in free for uuid in uuids):
        return [free[uuid] for uuid in uuids]
    return [_asked(index) for index in indices]


def _asked(index: int) -> int:
    """Return a CUDA device's free bytes by CUDA; 0 of one that others hold for themselves."""
    import torch

    try:
        return int(torch.cuda.mem_get_info(index)[0])
    except RuntimeError:
        return 0


def thread_on(device: Any, name: str, count: int = 1) -> ThreadPoolExecutor:
    """Return a pool of threads, by default one, that work on a torch device.

    The current GPU of a new thread is number 0: work there would make a context on it.
    """
    if device.type != "cuda":
        return ThreadPoolExecutor(count, name)
    import torch

    return ThreadPoolExecutor(count, name, torch.cuda.set_device, (device,))


# processor and RAM


def cpu_name(root: Path = Path("/")) -> str:
    """Return the processor's name, "" if unknown."""
    found = re.search(r"(?:model name|Hardware)\s*:\s*(.+)", _text(root / "proc/cpuinfo"))
    if found:
        return found[1].strip()
    return _run("sysctl", "-n", "machdep.cpu.brand_string").strip() or platform.processor()


def usable_cores(root: Path = Path("/")) -> float:
    """Return how many cores this process may use, by its affinity and a container's quota."""
    # From Python 3.13 on, the affinity and what the user says by PYTHON_CPU_COUNT.
    count = getattr(os, "process_cpu_count", None)
    if count is None and hasattr(os, "sched_getaffinity"):
        count = lambda: len(os.sched_getaffinity(0))  # noqa: E731
    cores = float((count or os.cpu_count)() or 1)
    for folder in _cgroups(root, "cpu"):
        quota = _text(folder / "cpu.max").split() or [
            _text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
        ]
        if len(quota) == 2 and all(number.isdigit() for number in quota) and int(quota[1]):
            cores = min(cores, int(quota[0]) / int(quota[1]))
    return round(cores, 2)


def free_cores(root: Path = Path("/")) -> int:
    """Return how many of `usable_cores` others leave free now, at least 1.

    Linux counts what runs; elsewhere all count as free.
    """
    others = []
    for _ in range(READINGS):
        # "0.20 0.18 0.12 1/80 11206": one of 80 runs, which is this process.
        running = re.search(r" (\d+)/\d+ ", _text(root / "proc/loadavg"))
        others.append(int(running[1]) - 1 if running else 0)
        time.sleep(READING_S)
    idle = (os.cpu_count() or 1) - min(others)
    return max(1, min(int(usable_cores(root)), idle))


def memory(root: Path = Path("/")) -> tuple[int, int, bool]:
    """Return RAM in total and free, in bytes (0 if unknown), and whether a container limits it."""
    table = dict(re.findall(r"(\w+):\s+(\d+) kB", _text(root / "proc/meminfo")))
    total, free = int(table.get("MemTotal", 0)) * 1024, int(table.get("MemAvailable", 0)) * 1024
    if not total and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # macOS: no free memory
    limited = False
    for folder in _cgroups(root, "memory"):
        for limit_file, used_file, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit = _text(folder / limit_file).strip()
            if not limit.isdigit() or not 0 < int(limit) < UNLIMITED:
                continue
            stat = re.search(rf"^{cache} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
            reclaimable = int(stat[1]) if stat else 0
            used = int(_text(folder / used_file).strip() or 0) - reclaimable
            if int(limit) < total or not total:
                total, limited = int(limit), True
            free = min(free or int(limit), max(0, int(limit) - used))
    return total, free, limited


def peak_memory(root: Path = Path("/")) -> dict[str, int]:
    """Return the most bytes that this process has held: `ram`, and `gpu` where it used one."""
    peak = {}
    found = re.search(r"^VmHWM:\s+(\d+) kB", _text(root / "proc/self/status"), re.MULTILINE)
    if found:
        peak["ram"] = int(found[1]) * 1024
    elif sys.platform != "win32":
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak["ram"] = used if sys.platform == "darwin" else used * 1024
    torch = sys.modules.get("torch")  # a process without it has used no GPU
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        cards = range(torch.cuda.device_count())
        peak["gpu"] = max(torch.cuda.max_memory_allocated(card) for card in cards)
    return peak


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Yield this process' cgroup folders, innermost first; a container may show only the root."""
    text = _text(root / "proc/self/cgroup")
    for names, path in re.findall(r"^\d+:([^:]*):(.*)$", text, re.MULTILINE):
        if names and controller not in names.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if names else "")
        group = mount / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount) and folder.is_dir():
                yield folder


def _run(*command: str) -> str:
    """Return what a command prints; "" where it is missing, fails or hangs."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=5, check=True, errors="replace"
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
