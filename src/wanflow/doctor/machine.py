"""What this machine is: processor, memory, GPUs, and the software that they are used by."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from wanflow import __version__

UNLIMITED = 2**60  # cgroup v1 writes "no limit" as a number near 2**63


@dataclass(frozen=True)
class System:
    """The machine and its software. Bytes; 0 or "" where the system does not say."""

    wanflow: str
    python: str
    os: str
    torch: str
    cuda: str  # that PyTorch was built for; "" for a build without
    cudnn: str
    driver: str
    driver_cuda: str  # the newest CUDA that the driver serves
    cards: tuple[str, ...]  # what the NVIDIA driver sees, whether PyTorch can use it or not
    cpu: str
    cores: int
    cores_usable: float
    ram: int
    ram_free: int
    ram_limited: bool  # by a container
    shm: int


@dataclass(frozen=True)
class Device:
    """Where tensors can be. Bytes."""

    name: str
    model: str
    memory: int = 0
    memory_free: int = 0
    capability: str = ""


def system() -> System:
    driver, driver_cuda, cards = nvidia()
    total, free, limited = memory()
    return System(
        __version__,
        platform.python_version(),
        platform.platform(),
        torch.__version__,
        torch.version.cuda or "",
        _cudnn(),
        driver,
        driver_cuda,
        cards,
        cpu_name(),
        os.cpu_count() or 1,
        usable_cores(),
        total,
        free,
        limited,
        _shm(),
    )


def _cudnn() -> str:
    try:
        number = torch.backends.cudnn.version() if torch.version.cuda else None
    except RuntimeError:  # another cuDNN is in the way; the tries show what that breaks
        return "unusable"
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}" if number else ""


def _shm() -> int:
    """Bytes of shared memory."""
    try:
        return shutil.disk_usage("/dev/shm").total
    except OSError:
        return 0


def _run(*command: str) -> str:
    """What a command prints; "" where it is missing, fails or hangs."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=5, check=True, errors="replace"
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def nvidia(root: Path = Path("/")) -> tuple[str, str, tuple[str, ...]]:
    """The driver's version, the newest CUDA it serves, and its cards: without PyTorch, which may be
    unable to see them.
    """
    table = _run("nvidia-smi")
    version, serves = (
        re.search(r"Driver Version:\s*([\d.]+)", table),
        re.search(r"CUDA[\w ]*Version:\s*([\d.]+)", table),
    )
    names = _run("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") if table else ""
    cards = tuple(line.strip() for line in names.splitlines() if line.strip())
    if not version:
        version = re.search(
            r"Kernel Module.*?\s(\d+\.[\d.]+)", _text(root / "proc/driver/nvidia/version")
        )
    if not cards:
        infos = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
        cards = tuple(
            found[1].strip()
            for info in infos
            if (found := re.search(r"Model:\s*(.+)", _text(info)))
        )
    return version[1] if version else "", serves[1] if serves else "", cards


def free_memory() -> dict[str, int]:
    """Bytes that are free on each card that the NVIDIA driver sees, by its UUID without "GPU-"; of
    no card where the driver's tool is
    missing.
    """
    rows = re.findall(
        r"^(?:GPU-)?([\w-]+), (\d+)$",
        _run("nvidia-smi", "--query-gpu=uuid,memory.free", "--format=csv,noheader,nounits"),
        re.M,
    )
    return {name: int(size) * 2**20 for name, size in rows}


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def cpu_name(root: Path = Path("/")) -> str:
    found = re.search(r"(?:model name|Hardware)\s*:\s*(.+)", _text(root / "proc/cpuinfo"))
    return (
        found[1].strip()
        if found
        else _run("sysctl", "-n", "machdep.cpu.brand_string").strip() or platform.processor()
    )


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process' control groups, the innermost first; in a container only the
    root of them may be visible.
    """
    for names, path in re.findall(
        r"^\d+:([^:]*):(.*)$", _text(root / "proc/self/cgroup"), re.MULTILINE
    ):
        if names and controller not in names.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if names else "")
        group = mount / path.strip("/")
        yield from (
            folder
            for folder in (group, *group.parents)
            if folder.is_relative_to(mount) and folder.is_dir()
        )


def usable_cores(root: Path = Path("/")) -> float:
    """How many cores this process may use: its affinity, and a container's quota."""
    cores = float(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    for folder in _groups(root, "cpu"):
        words = _text(folder / "cpu.max").split() or [
            _text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
        ]
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            cores = min(cores, int(words[0]) / int(words[1]))
    return round(cores, 2)


def memory(root: Path = Path("/")) -> tuple[int, int, bool]:
    """Bytes of RAM in all and free, and whether a container's limit is what they follow; zeros
    where the system does not say.
    """
    table = dict(re.findall(r"(\w+):\s+(\d+) kB", _text(root / "proc/meminfo")))
    total, free = int(table.get("MemTotal", 0)) * 1024, int(table.get("MemAvailable", 0)) * 1024
    if not total and "SC_PHYS_PAGES" in getattr(
        os, "sysconf_names", ()
    ):  # macOS, which does not say what is free
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limited = False
    for folder in _groups(root, "memory"):
        for most, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit = _text(folder / most).strip()
            if not limit.isdigit() or not 0 < int(limit) < UNLIMITED:
                continue
            found = re.search(rf"^{cache} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
            in_use = int(_text(folder / used).strip() or 0) - (
                int(found[1]) if found else 0
            )  # the cache gives way
            if int(limit) < total or not total:
                total, limited = int(limit), True
            free = min(free or int(limit), max(0, int(limit) - in_use))
    return total, free, limited


def devices() -> tuple[tuple[Device, ...], list[str]]:
    """What PyTorch can use, and what it said about what it cannot."""
    found, trouble = [Device("cpu", cpu_name())], list[str]()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        except Exception as problem:  # a broken driver raises what it likes
            count = 0
            trouble.append(f"{type(problem).__name__}: {problem}")
        for n in range(count):
            try:
                card = torch.cuda.get_device_properties(n)
                free, total = torch.cuda.mem_get_info(n)
                found.append(
                    Device(f"cuda:{n}", card.name, total, free, f"{card.major}.{card.minor}")
                )
            except Exception as problem:
                trouble.append(
                    f"cuda:{n} {type(problem).__name__}:"
                    f" {str(problem).splitlines()[0] if str(problem) else ''}"
                )
    if torch.backends.mps.is_available():
        found.append(Device("mps", "Apple GPU", int(torch.mps.recommended_max_memory())))
    return tuple(found), trouble + [str(warning.message).splitlines()[0] for warning in said]
