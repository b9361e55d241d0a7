"""What wanflow needs around it: packages, the video encoder, a disk for the weights."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module, metadata
from itertools import chain, islice
from pathlib import Path

from wanflow.transforms import attention

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
OPTIONAL = (
    *(backend.package for backend in attention.BACKENDS.values() if backend.package),
    "gguf",
    "modelscope",
)
DISK_BYTES, DISK_CHUNK, DISK_SECONDS = 256 * 2**20, 16 * 2**20, 2.0
CACHED = (
    ()
    if hasattr(os, "posix_fadvise")
    else ("this system cannot be told to forget what it has read: reading may be its cache's",)
)
LOOKED_AT = 5000  # files, before the search for weights ends: the folder may be anything
WEIGHTS = (".safetensors", ".gguf", ".pth", ".pt", ".bin")


@dataclass(frozen=True)
class Disk:
    """The folder for weights. Bytes, and bytes per second where they were measured."""

    folder: str
    free: int
    writes: float | None = None
    reads: float | None = None
    notes: tuple[str, ...] = ()


def look_at_packages() -> tuple[dict[str, str], dict[str, str]]:
    """Versions of what wanflow uses, "" for what is not installed; and what is there, or needed,
    and does not import: {name: why}.
    """
    versions, broken = dict[str, str](), dict[str, str]()
    try:
        names = metadata.packages_distributions()
    except Exception:  # one package's damaged notes are enough for that
        names = {}
    for package in (*REQUIRED, *OPTIONAL):
        if not attention.installed(package):
            versions[package] = ""
            if package in REQUIRED:
                broken[package] = "is not installed"
            continue
        try:
            versions[package] = metadata.version(names.get(package, [package])[0])
        except metadata.PackageNotFoundError:
            versions[package] = "unknown version"
        why = attention.broken(package)
        if why:
            broken[package] = f"is installed but does not import: {why}"
    return versions, broken


def encoder() -> str:
    """Why no H.264 can be written here, found by writing some; "" if it can."""
    try:
        av = import_module("av")
        context = av.CodecContext.create("libx264", "w")
        context.width = context.height = 64
        context.pix_fmt, context.framerate, context.time_base = (
            "yuv420p",
            Fraction(16),
            Fraction(1, 16),
        )
        packets = [*context.encode(av.VideoFrame(64, 64, "yuv420p")), *context.encode(None)]
    except Exception as problem:
        return attention.words(problem)
    return "" if sum(packet.size for packet in packets) else "the encoder gave nothing"


def disk(folder: Path, say: Say = lambda _: None) -> Disk:
    """How much room a folder has, and how fast its disk is: by a temporary file, or, where none can
    be written, by weights that lie there.

    The temporary file has no name where the system allows that, so nothing stays behind even if
    this is killed.
    """
    notes = []
    there = folder.expanduser().absolute()
    while not there.is_dir() and there != there.parent:
        there = there.parent
    if there != folder.expanduser().absolute():
        notes.append(f"{folder} is no folder yet; {there} was measured")
    try:
        free = shutil.disk_usage(there).free
    except OSError as problem:
        return Disk(str(there), 0, notes=(*notes, f"it cannot be looked at: {problem.strerror}"))
    say(f"the speed of the disk under {there}")
    if free < 4 * DISK_BYTES:
        notes.append("there is too little room to time writing")
    else:
        try:
            with tempfile.TemporaryFile(dir=there, buffering=0) as file:
                writes, wrote = _write(file.fileno())
                reads = _read(file.fileno(), 0, wrote)
            return Disk(str(there), free, writes, reads, (*notes, *CACHED))
        except OSError as problem:
            notes.append(f"no file can be written there ({problem.strerror})")
    file_there = _weights(folder.expanduser())
    if file_there is None:
        return Disk(str(there), free, notes=(*notes, "so its speed was not measured"))
    try:
        with file_there.open("rb", buffering=0) as file:
            reads = _read(file.fileno(), file_there.stat().st_size // 2, DISK_BYTES)
    except OSError as problem:
        return Disk(
            str(there),
            free,
            notes=(*notes, f"and {file_there.name} cannot be read ({problem.strerror})"),
        )
    return Disk(
        str(there), free, None, reads, (*notes, f"reading was timed on {file_there.name}", *CACHED)
    )


def _write(file: int) -> tuple[float, int]:
    """Write random bytes until there are enough or time is up, and wait for the disk: (bytes per
    second, bytes).
    """
    chunk = os.urandom(DISK_CHUNK)  # some file systems store what repeats, or zeros, as nothing
    start, wrote = time.perf_counter(), 0
    while wrote < DISK_BYTES and time.perf_counter() - start < DISK_SECONDS:
        wrote += os.write(file, chunk)
    os.fsync(file)
    return wrote / (time.perf_counter() - start), wrote


def _read(file: int, offset: int, most: int) -> float:
    """Bytes per second, off the disk and not out of the system's memory where it can be told so."""
    if not CACHED:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.lseek(file, offset, os.SEEK_SET)
    start, done = time.perf_counter(), 0
    while done < most and time.perf_counter() - start < DISK_SECONDS:
        got = len(os.read(file, DISK_CHUNK))
        if not got:
            break
        done += got
    return done / (time.perf_counter() - start)


def _weights(folder: Path) -> Path | None:
    """The largest file of weights in a folder, of those that a few levels of it hold."""
    files = islice(
        chain.from_iterable(folder.glob(pattern) for pattern in ("*", "*/*", "*/*/*")), LOOKED_AT
    )
    found = [
        (file.stat().st_size, file) for file in files if file.suffix in WEIGHTS and file.is_file()
    ]
    return max(found)[1] if found else None
