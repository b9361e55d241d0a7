"""RAM that blocks wait in: in whole pages, pinned for a GPU, one copy for all ranks of a machine.

A pinned page is one that the driver may copy from on its own. What can be pinned is limited on some
systems (WSL2: about 1 GB or half of RAM). A refusal is no error of the run: the rest stays
pageable, and copies from there take longer.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import platform
import re
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wanflow.remembered import of_device

if TYPE_CHECKING:
    from wanflow.parallel.groups import Group, ParallelContext

logger = logging.getLogger("wanflow")

PROBE = 2 << 30  # bytes that are pinned to see whether a small limit exists; takes below a second
LEAST = 64 << 20  # the smallest limit that differs from none
HALF = ("win32", "wsl")  # systems whose driver pins at most half of RAM
CUDART = r"\S*libcudart[^\s/]*\.so[^\s/]*$"


@dataclass(frozen=True)
class Shared:
    """Buffers of several ranks.

    Attributes:
        buffers: what a rank writes there, all see.
        copies: the same memory, copied where this process writes. Not to be read before it is
            filled.
        rank, ranks: which of how many fill it.
    """

    buffers: list[Tensor]
    copies: list[Tensor]
    rank: int = 0
    ranks: int = 1


class HostMemory:
    """Gives out buffers on the host.

    Args:
        pin: whether a GPU copies from them.
        ctx: this rank among several, which share what `shared` returns; None: it is alone.

    Attributes:
        pin: whether the next buffer is pinned. The first refusal ends it.
    """

    def __init__(self, pin: bool, ctx: ParallelContext | None = None) -> None:
        self.pin, self._ctx = pin, ctx
        self._alone = ctx is None or ctx.layout.size == 1

    @property
    def group(self) -> Group | None:
        """The ranks that share memory; None: there are no others. Every rank must ask for it."""
        if self._alone or self._ctx is None:
            return None
        from wanflow.parallel.machine import machine_group

        return machine_group(self._ctx)

    def buffer(self, nbytes: int) -> Tensor:
        """Return uint8 [nbytes] of this process, pinned where requested and possible."""
        buffer = self._as_tensor(private_memory(nbytes), nbytes)
        self.pin_buffer(buffer)
        return buffer

    def _as_tensor(self, memory: mmap.mmap, nbytes: int) -> Tensor:
        return as_tensor(memory, nbytes, huge=self.pin)

    def shared(self, sizes: Sequence[int]) -> Shared:
        """Return buffers that the ranks of this machine share, not yet pinned.

        Where there are no other ranks, or the system refuses, they are this process' own. Every
        rank must call it.
        """
        group = self.group
        if group is not None and group.size > 1 and self._ctx is not None:
            from wanflow.parallel.machine import shared_memory

            maps = shared_memory(group, self._ctx.info.device, [max(1, size) for size in sizes])
            if maps is not None:
                buffers, copies = (
                    [self._as_tensor(one, size) for one, size in zip(kind, sizes, strict=True)]
                    for kind in maps
                )
                return Shared(buffers, copies, group.rank, group.size)
            logger.warning(
                "this system shares no memory between processes: each of %d holds its own copy of"
                " the streamed blocks",
                group.size,
            )
        buffers = [self._as_tensor(private_memory(size), size) for size in sizes]
        return Shared(buffers, buffers)

    def agree(self, error: Exception | None, what: str) -> None:
        """Raise on every rank if one has an error; each must call it."""
        group = self.group
        if group is None or self._ctx is None:
            if error is not None:
                raise error
            return
        from wanflow.parallel.machine import agree

        agree(group, self._ctx.info.device, error, what)

    def pin_buffer(self, buffer: Tensor) -> None:
        """Pin a buffer in place, unless the system has refused one before."""
        if not self.pin or not buffer.nbytes:
            return
        code = pin(buffer)
        if code:
            self.pin = False
            logger.warning(
                "the driver refused to pin %d MB of RAM (CUDA error %d): copies to the GPU use"
                " pageable memory and take longer; `wanflow doctor` shows how much can be pinned",
                buffer.nbytes >> 20,
                code,
            )


def private_memory(nbytes: int) -> mmap.mmap:
    """Map zeroed memory of this process alone, in whole pages."""
    size = max(1, nbytes)
    if not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def as_tensor(memory: mmap.mmap, nbytes: int, huge: bool) -> Tensor:
    """Return mapped memory as uint8 [nbytes]; it is unmapped with the tensor's storage.

    Args:
        huge: ask for huge pages, before the first touch: there are 512 times fewer to pin.
    """
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]


def pin(buffer: Tensor) -> int:
    """Register a buffer of whole pages with the driver; return CUDA's error code, 0 where it did.

    PyTorch's pinned allocator rounds up to powers of two, which wastes 45 % for blocks of 703 MB.
    """
    runtime: Any = torch.cuda.cudart()
    code = int(runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
    if code:
        clear_error(runtime)
    else:  # before the storage is freed, which unmaps it
        storage = buffer.untyped_storage()
        weakref.finalize(storage, _unpin, runtime, buffer.data_ptr())
    return code


def _unpin(runtime: Any, address: int) -> None:
    if int(runtime.cudaHostUnregister(address) or 0):
        clear_error(runtime)


def clear_error(runtime: Any) -> None:
    """Take back the error that the CUDA runtime keeps for the next kernel of this thread.

    A failed call leaves it there, and the next launch, which has nothing to do with it, would raise
    it. PyTorch binds no call that clears it, so the library that it has loaded is asked. Where that
    is not found, a launch is made to raise it here.
    """
    for library in (runtime, *loaded_cudart()):
        clear = getattr(library, "cudaGetLastError", None)
        if clear is not None:
            clear()
    try:
        torch.zeros(1, device="cuda")
    except Exception as error:  # what was kept, of any type
        logger.debug("a CUDA error was kept and is cleared: %s", error)


def loaded_cudart(maps: Path = Path("/proc/self/maps")) -> Iterator[ctypes.CDLL]:
    """Yield the CUDA runtime libraries that this process has loaded."""
    if sys.platform == "win32":
        major = (torch.version.cuda or "").partition(".")[0]
        names = [f"cudart64_{major}.dll", f"cudart64_{major}0.dll"]
    else:
        try:
            names = sorted(set(re.findall(CUDART, maps.read_text(), re.MULTILINE)))
        except OSError:
            names = []
    for name in names:
        try:
            yield ctypes.CDLL(name)
        except OSError:
            continue


def system_name() -> str:
    """Return `sys.platform`, or "wsl" for Linux inside Windows."""
    return "wsl" if "microsoft" in platform.release().lower() else sys.platform


def pin_limit(ram: int, probed: int | None = None, system: str = "linux") -> int:
    """Return how many bytes of RAM can be pinned.

    Args:
        ram: of the machine.
        probed: by `probe_pinned`; None: unknown.
        system: of `system_name`.
    """
    most = ram // 2 if system in HALF else ram
    return most if probed is None or probed >= PROBE else min(most, probed)


def pinnable(device: torch.device, folder: str | Path | None, ram: int, free: int) -> int:
    """Return how many bytes of this machine's RAM can be pinned; tried where a limit is likely.

    Args:
        device: a GPU.
        folder: of `Runtime.machine_cache`; None: nothing is tried.
        ram: of the machine.
        free: of it.
    """
    system, probed = system_name(), None
    if system in HALF and folder is not None:
        with suppress(Exception):  # of a driver that is broken: the run says so
            probed = probe_pinned(device, folder, free)
    return pin_limit(ram, probed, system)


def probe_pinned(device: torch.device, folder: str | Path | None, free: int) -> int:
    """Return how many bytes could be pinned, at most `PROBE`; remembered for the machine.

    Args:
        device: a GPU.
        folder: of `Runtime.machine_cache`.
        free: bytes of RAM, of which a quarter is used at most; 0: unknown.
    """
    remembered = of_device(folder, device)
    found = remembered.get("pinned bytes")
    if type(found) is int and 0 <= found <= PROBE:
        return found
    size = PROBE
    while free and size > max(LEAST, free // 4):
        size //= 2
    asked = size
    while size >= LEAST and pin(as_tensor(private_memory(size), size, True)):
        size //= 2
    found = 0 if size < LEAST else size
    if found < asked or asked == PROBE:  # else RAM was short, which says nothing of the driver
        remembered.put(found, "pinned bytes")
        return found
    return PROBE
