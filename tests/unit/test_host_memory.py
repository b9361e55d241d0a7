"""Pinned memory that is refused or short falls back for good; the driver is a fake."""

from __future__ import annotations

import ctypes
import gc
import logging
import mmap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from wanflow.checkpoint.containers import TensorInfo, TensorSource, open_safetensors
from wanflow.checkpoint.reading import Upload
from wanflow.models.dit import WanDiT
from wanflow.plan.report import pinned_lines
from wanflow.transforms import block_streaming, host_memory
from wanflow.transforms.block_streaming import BlockBuffers, HostBlocks, Streaming
from wanflow.transforms.host_memory import (
    PROBE,
    HostMemory,
    loaded_cudart,
    pin_limit,
    pinnable,
    probe_pinned,
)

CPU = torch.device("cpu")
OUT_OF_MEMORY, ALREADY = 2, 712
PAGE = mmap.PAGESIZE


class Cudart:
    """A CUDA runtime that pins so many bytes, and keeps a refusal for the next launch."""

    def __init__(self, limit: int = 1 << 60, code: int = OUT_OF_MEMORY) -> None:
        self.limit, self.code = limit, code
        self.pinned: dict[int, int] = {}
        self.asked: list[int] = []
        self.kept = 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.asked.append(nbytes)
        pages = range(address // PAGE, -(-(address + nbytes) // PAGE))
        taken = {
            page
            for start, size in self.pinned.items()
            for page in range(start // PAGE, -(-(start + size) // PAGE))
        }
        if taken & set(pages):
            self.kept = ALREADY
        elif sum(self.pinned.values()) + nbytes > self.limit:
            self.kept = self.code
        else:
            self.pinned[address] = nbytes
            return 0
        return self.kept

    def cudaHostUnregister(self, address: int) -> int:
        size = self.pinned.pop(address)
        ctypes.string_at(address, size)  # it is still mapped
        return 0

    def launch(self) -> None:
        """Start a kernel: it raises what an earlier call left."""
        if self.kept:
            self.kept = 0
            raise RuntimeError("CUDA error: out of memory")


@pytest.fixture(params=["asked", "launched"])
def cudart(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cudart]:
    """The error is cleared by the loaded library, or by a launch where that is not found."""
    fake = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)

    def last_error() -> int:
        fake.kept, kept = 0, fake.kept
        return kept

    libraries = [SimpleNamespace(cudaGetLastError=last_error)]
    monkeypatch.setattr(
        host_memory, "loaded_cudart", lambda: libraries if request.param == "asked" else []
    )
    zeros = torch.zeros

    def launching(*args: Any, **options: Any) -> Tensor:
        if options.get("device") == "cuda":
            fake.launch()
            options = {}
        return zeros(*args, **options)

    monkeypatch.setattr(torch, "zeros", launching)
    yield fake
    gc.collect()
    assert not fake.pinned


class Copies:
    """A copy stream whose launches raise an error that is kept."""

    stream = SimpleNamespace(synchronize=lambda: None)

    def __init__(self, cudart: Cudart) -> None:
        self.cudart = cudart

    def copy(self, target: Tensor, source: Tensor, after: object) -> None:
        self.cudart.launch()
        target.copy_(source)

    def wait(self, event: object) -> None:
        self.cudart.launch()

    def mark(self) -> None:
        return None


@pytest.mark.parametrize("code", [OUT_OF_MEMORY, ALREADY])
@pytest.mark.parametrize("blocks", [0, 2])
@torch.no_grad()
def test_a_refusal_ends_pinning_and_not_the_run(
    blocks: int,
    code: int,
    cudart: Cudart,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The driver pins some blocks; all stream, one message says so, and nothing is kept."""
    from helpers.tiny import TINY

    torch.manual_seed(0)
    model = WanDiT(TINY).eval().requires_grad_(False)
    model.blocks.extend(WanDiT(TINY).eval().requires_grad_(False).blocks)  # type: ignore[attr-defined]
    layouts = {n: BlockBuffers(block).layout for n, block in enumerate(model.blocks)}
    weights = [
        {name: getattr(leaf, key).clone() for name, (leaf, key) in BlockBuffers(b).leaves.items()}
        for b in model.blocks
    ]
    cudart.code, cudart.limit = code, blocks * layouts[0].nbytes
    monkeypatch.setattr(block_streaming, "CopyStream", lambda device: Copies(cudart))

    def fetch(index: int, views: Any) -> None:
        for name, view in views.items():
            view.copy_(weights[index][name])

    memory = HostMemory(True)
    with caplog.at_level(logging.WARNING, "wanflow"):
        waiting = HostBlocks(layouts, memory)
        waiting.fill_and_meet(fetch)
        streaming = Streaming(model, fetch, (), CPU, waiting.buffers, memory=memory)
        for _ in range(2):
            for index, block in enumerate(streaming.stream()):
                assert torch.equal(block.ffn[0].weight, weights[index]["ffn.0.weight"])
        further = memory.buffer(5 * PAGE)
    assert len(cudart.pinned) == blocks and len(cudart.asked) == blocks + 1
    (told,) = caplog.records
    assert f"refused to pin 0 MB of RAM (CUDA error {code})" in told.getMessage()
    assert "wanflow doctor" in told.getMessage()
    assert not memory.pin and cudart.kept == 0
    assert further.nbytes == 5 * PAGE
    streaming.close()
    del waiting, streaming


def test_no_two_buffers_share_a_page(cudart: Cudart) -> None:
    memory = HostMemory(True)
    buffers = [memory.buffer(size) for size in (1, 100, PAGE - 1, PAGE, PAGE + 1, 3)]
    assert all(buffer.data_ptr() % PAGE == 0 for buffer in buffers)
    assert len(cudart.pinned) == len(buffers) and memory.pin
    assert memory.buffer(0).nbytes == 0


def test_a_buffer_is_pinned_as_long_as_a_view_of_it_lives(cudart: Cudart) -> None:
    view = HostMemory(True).buffer(3 * PAGE)[PAGE : PAGE + 8].view(torch.float32)
    gc.collect()
    assert len(cudart.pinned) == 1
    view.fill_(2.0)
    del view  # the fake reads the memory while it takes the pin back
    gc.collect()
    assert not cudart.pinned


def test_without_a_gpu_nothing_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: pytest.fail("asked the driver"))
    buffer = HostMemory(False).buffer(100)
    assert buffer.dtype == torch.uint8 and not buffer.any() and not buffer.is_pinned()


@pytest.mark.parametrize(
    ("limit", "free", "expected"),
    [
        (1 << 60, 1 << 40, PROBE),  # no limit was met
        (1 << 30, 1 << 40, 1 << 30),
        ((1 << 30) + 5, 1 << 40, 1 << 30),
        (0, 1 << 40, 0),
        (1 << 60, 1 << 30, PROBE),  # RAM was short, and the driver refused nothing
        (1 << 27, 1 << 30, 1 << 27),
    ],
)
def test_the_limit_is_probed_once(
    limit: int,
    free: int,
    expected: int,
    cudart: Cudart,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host_memory, "private_memory", lambda size: SimpleNamespace(size=size))
    monkeypatch.setattr(host_memory, "as_tensor", lambda memory, nbytes, huge: memory)

    def pin(memory: Any) -> int:  # of memory that is not really there
        cudart.asked.append(memory.size)
        return OUT_OF_MEMORY if memory.size > limit else 0

    monkeypatch.setattr(host_memory, "pin", pin)
    assert probe_pinned(CPU, tmp_path, free) == expected
    assert max(cudart.asked) <= min(PROBE, free // 4)
    asked = len(cudart.asked)
    assert probe_pinned(CPU, tmp_path, free) == expected
    remembered = expected < PROBE or free > 4 * PROBE
    assert (len(cudart.asked) == asked) == remembered
    (tmp_path / "x").write_text("{}")
    assert probe_pinned(CPU, None, free) == expected  # nothing is kept


def test_what_can_be_pinned_on_a_system() -> None:
    ram = 32 << 30
    assert pin_limit(ram) == pin_limit(ram, PROBE) == ram
    assert pin_limit(ram, 1 << 30) == 1 << 30
    assert pin_limit(ram, None, "wsl") == pin_limit(ram, PROBE, "win32") == ram // 2
    assert pin_limit(ram, 1 << 30, "wsl") == 1 << 30


@pytest.mark.parametrize(
    ("system", "folder", "expected", "tried"),
    [
        ("linux", "cache", 32, False),  # no driver limits it there
        ("wsl", "cache", 1, True),
        ("win32", None, 16, False),  # nothing could be remembered
    ],
)
def test_the_plan_asks_where_a_limit_is_likely(
    system: str, folder: str | None, expected: int, tried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def probe(*given: object) -> int:
        asked.append(given)
        return 1 << 30

    monkeypatch.setattr(host_memory, "system_name", lambda: system)
    monkeypatch.setattr(host_memory, "probe_pinned", probe)
    assert pinnable(CPU, folder, 32 << 30, 8 << 30) == expected << 30
    assert bool(asked) == tried


def test_the_plan_says_what_cannot_be_pinned() -> None:
    phases = [SimpleNamespace(shared=20 << 30, top=(), name="x")]
    machine = SimpleNamespace(pinned=1 << 30)
    assert "1.0 GiB at most, and 20.0 GiB wait in RAM" in "".join(pinned_lines(machine, phases))
    machine.pinned = 20 << 30
    assert not list(pinned_lines(machine, phases))


def test_the_loaded_runtime_is_found(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    library = next(iter_libraries(Path("/proc/self/maps")), None)
    if library is None:
        pytest.skip("no /proc")
    fake = tmp_path / "libcudart.so.12"
    fake.symlink_to(library)
    maps.write_text(
        f"7f0000000000-7f0000001000 r-xp 00000000 08:01 1   {fake}\n"
        f"7f0000001000-7f0000002000 rw-p 00000000 08:01 1   {fake}\n"
        "7f0000002000-7f0000003000 r-xp 00000000 08:01 1   /lib/libcudart_of_others.so.x/no\n"
        "7f0000002000-7f0000003000 r-xp 00000000 08:01 1   /gone/libcudart-1b2c.so.13\n"
    )
    assert [one._name for one in loaded_cudart(maps)] == [str(fake)]
    assert list(loaded_cudart(tmp_path / "none")) == []


def iter_libraries(maps: Path) -> Iterator[str]:
    if maps.exists():
        yield from (line.split()[-1] for line in maps.read_text().splitlines() if "libm.so" in line)


# reading to a GPU, which a CPU stands for


@pytest.mark.parametrize("piece", [64, 100, 4096, 1 << 20])
def test_an_upload_gives_what_a_read_gives(piece: int, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    values = {
        "a": torch.randn(37, 12, generator=generator),
        "b": torch.randn(9, generator=generator).to(torch.float16),
        "c": torch.randn(5, 2, 3, generator=generator).to(torch.bfloat16),
        "d": torch.tensor(2.5),
        "e": torch.empty(0, 4),
        "f": torch.randn(3, 500, generator=generator),
    }
    save_file(values, tmp_path / "x.safetensors")
    source = open_safetensors(tmp_path / "x.safetensors")
    upload = Upload(CPU, HostMemory(False), piece)
    taken = {name for name in values if upload.takes(source, name)}
    assert {"b", "c", "d"} <= taken and ("f" in taken) == (piece >= 2000) and "e" not in taken
    for name in taken:
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(upload.read(source, name, dtype), source.read(name, dtype)), name
        if values[name].ndim:
            rows = slice(1, 4)
            expected = source.read(name, torch.float32, rows)
            assert torch.equal(upload.read(source, name, torch.float32, rows), expected)
    packed = TensorSource(tmp_path, {"p": TensorInfo((4, 4), torch.float32, "F8_E4M3", 16)})
    assert not upload.takes(packed, "p")


def test_a_buffer_is_filled_again_only_after_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two buffers take turns; each waits for its own copy, and not for the other's."""
    from safetensors.torch import save_file

    save_file({"a": torch.arange(64.0).view(8, 8)}, tmp_path / "x.safetensors")
    source = open_safetensors(tmp_path / "x.safetensors")
    events: list[str] = []
    upload = Upload(CPU, HostMemory(False), 32)

    def mark() -> Any:
        number = sum(one.startswith("copied") for one in events)
        events.append(f"copied {number}")
        return SimpleNamespace(synchronize=lambda: events.append(f"waited {number}"))

    monkeypatch.setattr(upload, "_mark", mark)
    assert torch.equal(upload.read(source, "a", torch.float32), torch.arange(64.0).view(8, 8))
    expected = ["copied 0", "copied 1"]
    for number in range(2, 8):
        expected += [f"waited {number - 2}", f"copied {number}"]
    assert events == expected
