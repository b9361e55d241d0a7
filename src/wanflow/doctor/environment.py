"""Examine what wanflow runs on: the system, packages, the video encoder, a disk for the weights."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module, metadata
from itertools import chain, islice
from pathlib import Path

import torch

from wanflow import __version__
from wanflow.hardware import cpu_name, memory, nvidia, usable_cores
from wanflow.transforms import attention
from wanflow.transforms.attention_kernels import BACKENDS
from wanflow.untrusted import user_path

Say = Callable[[str], None]

REQUIRED = (
    "numpy",
    "safetensors",
    "tokenizers",
    "ftfy",
    "av",
    "rich",
    "huggingface_hub",
    "filelock",
)
KERNEL_PACKAGES = [kernel.package for kernel in BACKENDS.values() if kernel.package]
SERVER = ("fastapi", "uvicorn", "python_multipart", "prometheus_client", "procrastinate", "psycopg")
OPTIONAL = (*KERNEL_PACKAGES, "gguf", "modelscope", *SERVER)
DISTRIBUTIONS = {kernel.package: kernel.distribution for kernel in BACKENDS.values()}
DISK_BYTES, DISK_CHUNK, DISK_SECONDS = 256 * 2**20, 16 * 2**20, 2.0
CACHED = (
    ()
    if hasattr(os, "posix_fadvise")
    else ("this system cannot drop its cache of read files: the read speed may be the cache's",)
)
MAX_FILES = 5000  # the search for weights ends here: the folder may be any folder
WEIGHTS = (".safetensors", ".gguf", ".pth", ".pt", ".bin")


@dataclass(frozen=True)
class System:
    """The machine and its software. Bytes; 0 or "" where unknown."""

    wanflow: str
    python: str
    os: str
    torch: str
    cuda: str  # that PyTorch was built for; "" for a build without
    cudnn: str
    driver: str
    driver_cuda: str  # the newest CUDA that the driver supports
    cards: tuple[str, ...]  # those the NVIDIA driver sees, usable by PyTorch or not
    cpu: str
    cores: int
    cores_usable: float
    ram: int
    ram_free: int
    ram_limited: bool  # by a container
    shm: int


def system() -> System:
    """Return the facts of this machine."""
    driver, driver_cuda, cards = nvidia()
    total, free, limited = memory()
    return System(
        wanflow=__version__,
        python=platform.python_version(),
        os=platform.platform(),
        torch=torch.__version__,
        cuda=torch.version.cuda or "",
        cudnn=_cudnn(),
        driver=driver,
        driver_cuda=driver_cuda,
        cards=cards,
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        cores_usable=usable_cores(),
        ram=total,
        ram_free=free,
        ram_limited=limited,
        shm=_shared_memory(),
    )


def _cudnn() -> str:
    try:
        number = torch.backends.cudnn.version() if torch.version.cuda else None
    except RuntimeError:  # PyTorch found another cuDNN; the benchmarks show what that breaks
        return "unusable"
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}" if number else ""


def _shared_memory() -> int:
    try:
        return shutil.disk_usage("/dev/shm").total
    except OSError:
        return 0


def look_at_packages() -> tuple[dict[str, str], dict[str, str]]:
    """Return {package: version, "" if missing}, and {package: reason} of those that are broken."""
    versions, broken = dict[str, str](), dict[str, str]()
    try:
        names = metadata.packages_distributions()
    except Exception:  # raised where one package's metadata is damaged
        names = {}
    for package in (*REQUIRED, *OPTIONAL):
        if not attention.installed(package):
            versions[package] = ""
            if package in REQUIRED:
                broken[package] = "is not installed"
            continue
        distribution = DISTRIBUTIONS.get(package) or names.get(package, [package])[0]
        versions[package] = attention.version_of(distribution)
        why = attention.import_failure(package)
        if why:
            broken[package] = f"is installed but does not import: {why}"
    return versions, broken


def encoder() -> str:
    """Encode a frame in H.264; return why that fails, "" if it does not."""
    try:
        av = import_module("av")
        context = av.CodecContext.create("libx264", "w")
        context.width = context.height = 64
        context.pix_fmt = "yuv420p"
        context.framerate, context.time_base = Fraction(16), Fraction(1, 16)
        packets = [*context.encode(av.VideoFrame(64, 64, "yuv420p")), *context.encode(None)]
    except Exception as error:
        return attention.failure(error)
    return "" if sum(packet.size for packet in packets) else "the encoder returned no data"


# the disk


@dataclass(frozen=True)
class Disk:
    """The folder for weights: free bytes, and bytes per second where they were measured."""

    folder: str
    free: int
    writes: float | None = None
    reads: float | None = None
    notes: tuple[str, ...] = ()


def disk(folder: Path, say: Say = lambda _: None) -> Disk:
    """Measure a folder's free space and the speed of its disk.

    A temporary file is written and read. Where none can be written, weights in the folder are read.
    The file has no name where the system allows that, so nothing remains if this process is killed.
    """
    notes = []
    requested = user_path(folder).absolute()
    existing = requested
    while not existing.is_dir() and existing != existing.parent:
        existing = existing.parent
    if existing != requested:
        notes.append(f"{folder} is no folder yet; {existing} was measured")
    try:
        free = shutil.disk_usage(existing).free
    except OSError as error:
        return Disk(str(existing), 0, notes=(*notes, f"it cannot be examined: {error.strerror}"))
    say(f"the speed of the disk under {existing}")
    if free < 4 * DISK_BYTES:
        notes.append("there is too little room to time writing")
    else:
        try:
            with tempfile.TemporaryFile(dir=existing, buffering=0) as file:
                writes, written = _write(file.fileno())
                reads = _read(file.fileno(), 0, written)
            return Disk(str(existing), free, writes, reads, (*notes, *CACHED))
        except OSError as error:
            notes.append(f"no file can be written there ({error.strerror})")
    weights = _largest_weights(requested)
    if weights is None:
        return Disk(str(existing), free, notes=(*notes, "so its speed was not measured"))
    try:
        with weights.open("rb", buffering=0) as file:
            reads = _read(file.fileno(), weights.stat().st_size // 2, DISK_BYTES)
    except OSError as error:
        notes.append(f"and {weights.name} cannot be read ({error.strerror})")
        return Disk(str(existing), free, notes=tuple(notes))
    notes.append(f"reading was timed on {weights.name}")
    return Disk(str(existing), free, None, reads, (*notes, *CACHED))


def _write(file: int) -> tuple[float, int]:
    """Write random bytes up to a limit of size and time; return (bytes per second, bytes)."""
    chunk = os.urandom(DISK_CHUNK)  # some file systems compress repeated bytes or zeros away
    start, written = time.perf_counter(), 0
    while written < DISK_BYTES and time.perf_counter() - start < DISK_SECONDS:
        written += os.write(file, chunk)
    os.fsync(file)
    return written / (time.perf_counter() - start), written


def _read(file: int, offset: int, limit: int) -> float:
    """Return the bytes per second of reading, past the system's cache where that can be dropped."""
    if not CACHED:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.lseek(file, offset, os.SEEK_SET)
    start, done = time.perf_counter(), 0
    while done < limit and time.perf_counter() - start < DISK_SECONDS:
        count = len(os.read(file, DISK_CHUNK))
        if not count:
            break
        done += count
    return done / (time.perf_counter() - start)


def _largest_weights(folder: Path) -> Path | None:
    files = chain.from_iterable(folder.glob(pattern) for pattern in ("*", "*/*", "*/*/*"))
    found = [
        (file.stat().st_size, file)
        for file in islice(files, MAX_FILES)
        if file.suffix in WEIGHTS and file.is_file()
    ]
    return max(found)[1] if found else None
