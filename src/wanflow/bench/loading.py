"""Check how fast weights are read: a plain read of a file, and wanflow's own."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wanflow.bench.record import Record
from wanflow.bench.tools import Scale, randn
from wanflow.checkpoint.load import load_module
from wanflow.checkpoint.source import open_source
from wanflow.files import fsync
from wanflow.transforms.attention import synchronize
from wanflow.transforms.host_memory import HostMemory

PIECES = 8  # tensors of the file
BLOCK = 16 << 20  # bytes of a read


class _Shelf(nn.Module):
    """A module of so many matrices, on meta."""

    def __init__(self, side: int, dtype: torch.dtype) -> None:
        super().__init__()
        for number in range(PIECES):
            value = torch.empty(side, side, dtype=dtype, device="meta")
            self.register_parameter(f"w{number}", nn.Parameter(value, requires_grad=False))


def loading(record: Record, scale: Scale) -> None:
    """Read float32 weights from a file that the system has cached, then from the disk."""
    side = int((scale.file / 4 / PIECES) ** 0.5)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.safetensors"
        values = {f"w{n}": randn((side, side), torch.float32, "cpu") for n in range(PIECES)}
        with record.asking("writing a file"):
            save_file(values, file)
            size = file.stat().st_size
            with file.open("rb") as opened:
                fsync(opened)
        with record.asking("a plain read, not cached"):
            cold = _drop(file)
            took = _read(file)
            if cold:
                record.calibrate(disk=size / took)
            value = f"{size / took / 1e9:.3g} GB/s{'' if cold else ', perhaps cached'}"
            record.measured("a plain read, not cached", value, seconds=took, bytes=size)
        with record.asking("a plain read, cached"):
            plain = min(_read(file) for _ in range(2))
            value = f"{size / plain / 1e9:.3g} GB/s"
            record.measured("a plain read, cached", value, seconds=plain)
        for dtype in dict.fromkeys((torch.float32, torch.bfloat16)):
            what = f"wanflow's reading into {str(dtype).removeprefix('torch.')}"
            with record.asking(what):
                _load(file, side, dtype, scale)
                began = time.perf_counter()
                shelf = _load(file, side, dtype, scale)
                took = time.perf_counter() - began
                right = torch.equal(shelf.get_parameter("w3").cpu(), values["w3"].to(dtype))
                value = f"{size / took / 1e9:.3g} GB/s, {plain / took:.0%} of a plain read"
                record.passed(what, right, value, "the file's values", seconds=took)
        with record.asking("raw bytes, converted on the device"):
            began = time.perf_counter()
            _raw(file, scale)
            took = time.perf_counter() - began
            value = f"{size / took / 1e9:.3g} GB/s, {plain / took:.0%} of a plain read"
            record.measured("raw bytes, converted on the device", value, seconds=took)


def _load(file: Path, side: int, dtype: torch.dtype, scale: Scale) -> _Shelf:
    shelf = _Shelf(side, dtype)
    load_module(shelf, open_source(file), scale.device, memory=HostMemory(scale.cuda))
    synchronize(scale.device)
    return shelf


def _raw(file: Path, scale: Scale) -> list[Tensor]:
    """Read a file as it is into one host buffer, and convert its pieces on the device."""
    buffer, found = bytearray(BLOCK), []
    view = memoryview(buffer)
    with file.open("rb", buffering=0) as opened:
        opened.seek(0)
        while count := opened.readinto(view):
            piece = torch.frombuffer(buffer, dtype=torch.uint8)[: count // 4 * 4]
            found.append(piece.to(scale.device).view(torch.float32).to(torch.bfloat16))
    synchronize(scale.device)
    return found


def _read(file: Path) -> float:
    """Return the seconds of reading a file once."""
    buffer = bytearray(BLOCK)
    began = time.perf_counter()
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass
    return time.perf_counter() - began


def _drop(file: Path) -> bool:
    """Ask the system to forget what it has cached of a file; return whether it can."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True
