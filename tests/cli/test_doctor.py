"""Test `wanflow doctor` on machines described by files and values, and in a process of its own."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wanflow.cli import doctor as command
from wanflow.cli import main
from wanflow.doctor import environment, kernels, report
from wanflow.doctor.environment import Disk, System, disk, encoder, look_at_packages
from wanflow.doctor.kernels import MATMULS, KernelResult, try_attention, try_convolution, try_matmul
from wanflow.doctor.report import Report, problems
from wanflow.hardware import Device, cpu_name, memory, nvidia, usable_cores
from wanflow.transforms.attention_kernels import BACKENDS

ROOT = Path(__file__).parents[2]
GB = 10**9


def files(root: Path, **contents: str) -> Path:
    """Files under a root; `__` in a name is a folder, `DOT` a dot."""
    for name, text in contents.items():
        path = root / name.replace("__", "/").replace("DOT", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


# the machine, from files

MEMINFO = "MemTotal:       64000000 kB\nMemFree:         1000000 kB\nMemAvailable:   50000000 kB\n"


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ({}, (64_000_000 * 1024, 50_000_000 * 1024, False)),
        (
            {"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__memoryDOTmax": "max\n"},
            (64_000_000 * 1024, 50_000_000 * 1024, False),
        ),
        (  # a limit on the group above, part of what is used being cache
            {
                "proc__self__cgroup": "0::/job/step\n",
                "sys__fs__cgroup__job__step__memoryDOTmax": "max\n",
                "sys__fs__cgroup__job__memoryDOTmax": str(16 * GB),
                "sys__fs__cgroup__job__memoryDOTcurrent": str(10 * GB),
                "sys__fs__cgroup__job__memoryDOTstat": (
                    f"anon {4 * GB}\ninactive_file {6 * GB}\nactive_file 5\n"
                ),
            },
            (16 * GB, 12 * GB, True),
        ),
        (  # the tightest of two
            {
                "proc__self__cgroup": "0::/job/step\n",
                "sys__fs__cgroup__job__step__memoryDOTmax": str(8 * GB),
                "sys__fs__cgroup__job__step__memoryDOTcurrent": str(1 * GB),
                "sys__fs__cgroup__job__memoryDOTmax": str(16 * GB),
                "sys__fs__cgroup__job__memoryDOTcurrent": str(15 * GB),
            },
            (8 * GB, 1 * GB, True),
        ),
        (  # version 1, seen from inside a container: the path is another, only the mount is there
            {
                "proc__self__cgroup": "4:memory:/docker/0123\n3:cpu,cpuacct:/\n",
                "sys__fs__cgroup__memory__memoryDOTlimit_in_bytes": str(4 * GB),
                "sys__fs__cgroup__memory__memoryDOTusage_in_bytes": str(3 * GB),
                "sys__fs__cgroup__memory__memoryDOTstat": (
                    f"inactive_file 1\ntotal_inactive_file {2 * GB}\n"
                ),
            },
            (4 * GB, 3 * GB, True),
        ),
        (  # version 1 without a limit
            {
                "proc__self__cgroup": "4:memory:/\n",
                "sys__fs__cgroup__memory__memoryDOTlimit_in_bytes": "9223372036854771712\n",
            },
            (64_000_000 * 1024, 50_000_000 * 1024, False),
        ),
        (  # a limit beyond what there is
            {"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__memoryDOTmax": str(10**15)},
            (64_000_000 * 1024, 50_000_000 * 1024, False),
        ),
        ({"proc__self__cgroup": "rubbish\n::\n"}, (64_000_000 * 1024, 50_000_000 * 1024, False)),
    ],
)
def test_memory_obeys_the_containers_limit(
    tmp_path: Path, contents: dict[str, str], expected: tuple[int, int, bool]
) -> None:
    assert memory(files(tmp_path, proc__meminfo=MEMINFO, **contents)) == expected


def test_a_quota_of_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert usable_cores(tmp_path) == 8
    assert (
        usable_cores(
            files(
                tmp_path / "a",
                proc__self__cgroup="0::/\n",
                sys__fs__cgroup__cpuDOTmax="150000 100000\n",
            )
        )
        == 1.5
    )
    assert (
        usable_cores(
            files(
                tmp_path / "b",
                proc__self__cgroup="0::/\n",
                sys__fs__cgroup__cpuDOTmax="max 100000\n",
            )
        )
        == 8
    )
    one = {
        "sys__fs__cgroup__cpu__cpuDOTcfs_quota_us": "50000\n",
        "sys__fs__cgroup__cpu__cpuDOTcfs_period_us": "100000\n",
    }
    assert usable_cores(files(tmp_path / "c", proc__self__cgroup="3:cpu,cpuacct:/\n", **one)) == 0.5
    assert (
        usable_cores(
            files(
                tmp_path / "d",
                proc__self__cgroup="3:cpu,cpuacct:/\n",
                **{**one, next(iter(one)): "-1\n"},
            )
        )
        == 8
    )


def test_the_processors_name(tmp_path: Path) -> None:
    assert (
        cpu_name(files(tmp_path, proc__cpuinfo="processor : 0\nmodel name\t: Some CPU @ 2 GHz\n"))
        == "Some CPU @ 2 GHz"
    )


SMI = """#!/bin/sh
case "$*" in
*query-gpu*) printf 'NVIDIA A100-SXM4-80GB\\nNVIDIA A100-SXM4-80GB\\n';;
*) echo '| NVIDIA-SMI 580.65.06    Driver Version: 580.65.06    CUDA Version: 13.0 |';;
esac
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for nvidia-smi; returns its folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "nvidia-smi").write_text(SMI)
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_the_driver_is_asked_by_its_own_tool(smi: Path) -> None:
    assert nvidia() == ("580.65.06", "13.0", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-80GB"))
    (smi / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert nvidia(smi) == ("", "", ())


def test_the_driver_is_found_without_its_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    version = (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC"
        " 2023\nGCC version: gcc 11\n"
    )
    card = "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 1\n"
    root = files(
        tmp_path,
        proc__driver__nvidia__version=version,
        proc__driver__nvidia__gpus__0000__information=card,
    )
    assert nvidia(root) == ("535.129.03", "", ("NVIDIA H100 80GB HBM3",))
    assert nvidia(tmp_path / "nothing") == ("", "", ())


# what is wrong, of machines that are described

SYSTEM = System(
    wanflow="0",
    python="3.11",
    os="Linux",
    torch="2.13.0+cpu",
    cuda="",
    cudnn="",
    driver="",
    driver_cuda="",
    cards=(),
    cpu="a CPU",
    cores=8,
    cores_usable=8,
    ram=64 * GB,
    ram_free=60 * GB,
    ram_limited=False,
    shm=32 * GB,
)
GOOD = (
    KernelResult("attention", "cpu", "float32", "sdpa"),
    KernelResult("matmul", "cpu", "float32", "matmul"),
)
FINE = Report(
    SYSTEM, (Device("cpu", "a CPU"),), GOOD, {"cpu": {"float32": "sdpa"}}, Disk("/", GB), "", {}
)
CARD = {"driver": "580.65", "driver_cuda": "13.0", "cards": ("NVIDIA A100",)}
GPU = (Device("cpu", "a CPU"), Device("cuda:0", "NVIDIA A100"), Device("cuda:1", "NVIDIA A100"))
ON_GPU = (
    *GOOD,
    KernelResult("attention", "cuda:0", "bfloat16", "flash"),
    *(KernelResult("matmul", f"cuda:{n}", "bfloat16", "matmul") for n in range(2)),
)


def found(
    given: Report,
    broken: dict[str, str] | None = None,
    hidden: str | None = None,
    messages: tuple[str, ...] = (),
) -> list[tuple[str, str]]:
    return [
        (problem.level, problem.text) for problem in problems(given, broken or {}, hidden, messages)
    ]


def on(**changes: Any) -> Report:
    return replace(FINE, system=replace(SYSTEM, **changes))


def test_what_can_be_pinned_is_tried_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    given = replace(FINE, devices=GPU)
    monkeypatch.setattr(report, "probe_pinned", lambda *_: 2**30)
    assert report._pinned(FINE) is None
    assert report._pinned(given) == 2**30
    text = "".join(line for _, line in command.lines(replace(given, pinned=2**30)))
    assert "free, 1.0 GiB can be pinned" in text

    def broken(*given: object) -> int:
        raise RuntimeError("the driver is broken")

    monkeypatch.setattr(report, "probe_pinned", broken)
    monkeypatch.setattr(report, "system_name", lambda: "wsl")
    assert report._pinned(given) == SYSTEM.ram // 2


def test_a_good_machine_has_nothing() -> None:
    assert found(FINE) == []
    assert (
        found(replace(on(torch="2.13.0+cu130", cuda="13.0", **CARD), devices=GPU, tries=ON_GPU))
        == []
    )


@pytest.mark.parametrize(
    ("given", "more", "level", "words"),
    [
        (on(torch="2.9.1+cu128"), {}, "broken", "PyTorch 2.9.1+cu128 is too old"),
        (on(torch="1.13.0"), {}, "broken", "pip install 'torch>=2.10'"),
        (
            on(**CARD),
            {},
            "broken",
            (
                "built for CPUs only; pip install --force-reinstall torch --index-url"
                " https://download.pytorch.org/whl/cu130"
            ),
        ),
        (
            on(**{**CARD, "driver_cuda": "12.4"}),
            {},
            "broken",
            (
                "built for CPUs only; pip install --force-reinstall torch --index-url"
                " https://download.pytorch.org/whl/cu126"
            ),
        ),
        (
            on(driver="535.129"),
            {},
            "broken",
            (
                "an NVIDIA GPU (driver 535.129) cannot be used: this PyTorch (2.13.0+cpu) is built"
                " for CPUs only"
            ),
        ),
        (on(**CARD), {"hidden": ""}, "warning", "hidden by CUDA_VISIBLE_DEVICES=''"),
        (
            on(cuda="13.0", **{**CARD, "driver_cuda": "12.4"}),
            {},
            "broken",
            "built for CUDA 13.0 and the driver supports 12.4 at most",
        ),
        (
            on(cuda="12.8", **{**CARD, "driver_cuda": "11.4"}),
            {},
            "broken",
            "the driver supports CUDA 11.4 at most; install driver",
        ),
        (
            on(cuda="13.0", **CARD),
            {"messages": ("CUDA initialization: unknown error",)},
            "broken",
            "cannot be used: CUDA initialization: unknown error;",
        ),
        (on(shm=64 * 2**20), {}, "note", "/dev/shm holds only 64 MiB"),
        (
            replace(on(shm=64 * 2**20, cuda="13.0"), devices=GPU, tries=ON_GPU),
            {},
            "warning",
            "--shm-size=8g",
        ),
        (replace(FINE, pinned=2**30), {}, "note", "pins at most 1.0 GiB of 59.6 GiB of RAM"),
        (on(ram_limited=True), {}, "note", "this container may use 59.6 GiB of RAM"),
        (
            FINE,
            {"broken": {"av": "is not installed"}},
            "broken",
            "av is not installed; pip install",
        ),
        (
            FINE,
            {"broken": {"flash_attn": "does not import: x"}},
            "warning",
            "flash_attn does not import: x",
        ),
        (replace(FINE, encoder="no libx264"), {}, "broken", "H.264 is missing: no libx264"),
        (
            replace(FINE, packages={"sageattention": "1.0.6"}),
            {},
            "note",
            "with fp8 weights black frames",
        ),
        (
            replace(
                FINE,
                devices=(*FINE.devices, Device("mps", "Apple GPU")),
                tries=(*GOOD, *(replace(one, device="mps") for one in GOOD)),
            ),
            {},
            "note",
            "no float64",
        ),
        (
            replace(FINE, tries=(GOOD[0], replace(GOOD[1], why="it fails here (X)"))),
            {},
            "broken",
            "cpu (a CPU) cannot compute: it fails here (X)",
        ),
        (
            replace(FINE, tries=(replace(GOOD[0], why="noise"), GOOD[1])),
            {},
            "broken",
            "cannot compute: noise",
        ),
        (
            replace(on(cuda="13.0"), devices=GPU, tries=ON_GPU[:-1]),
            {},
            "broken",
            "cuda:1 (NVIDIA A100) cannot compute: nothing could be tried",
        ),
        (
            replace(
                on(cuda="13.0"),
                devices=GPU,
                packages={"flash_attn_interface": "3"},
                tries=(
                    *ON_GPU,
                    KernelResult(
                        "attention", "cuda:0", "bfloat16", "flash_attn_3", "no kernel image"
                    ),
                ),
            ),
            {},
            "warning",
            "attention flash_attn_3 is installed but fails on cuda:0: no kernel image",
        ),
    ],
)
def test_each_thing_that_is_known_to_go_wrong(
    given: Report, more: dict[str, Any], level: str, words: str
) -> None:
    (one,) = found(given, **more)
    assert one[0] == level and words in one[1]
    assert replace(
        given,
        problems=tuple(problems(given, **{"broken": {}, "hidden": None, "messages": (), **more})),
    ).fine == (level != "broken")


# what works


def test_attention_of_this_cpu() -> None:
    rows = {(one.dtype, one.way): one for one in try_attention(torch.device("cpu"))}
    assert {way for _, way in rows} == {"sdpa", "flash", "math"} and {
        dtype for dtype, _ in rows
    } == {"float32", "bfloat16", "float16"}
    for (dtype, _), one in rows.items():
        assert (
            one.why == ""
            and one.lse == ""
            and one.seconds is not None
            and one.seconds > 0
            and one.error is not None
        )
        assert one.error < {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}[dtype]


def test_a_kernel_that_lies_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "flash", replace(BACKENDS["flash"], attend=lambda q, k, v: q))
    rows = [one for one in try_attention(torch.device("cpu")) if one.way == "flash"]
    assert len(rows) == 3 and all("wrong numbers" in one.why for one in rows)


def test_matrix_products_of_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3, "fp8": 8e-2, "int8": 3e-2}
    rows = {one.dtype: one for one in try_matmul(torch.device("cpu"))}
    assert set(rows) == set(bounds)
    for dtype in ("float32", "bfloat16"):  # these, any CPU has
        assert rows[dtype].why == ""
    for dtype, one in rows.items():
        assert one.why or (
            one.error is not None
            and one.error < bounds[dtype]
            and one.tflops is not None
            and one.tflops > 0
        )

    def lacking(x: torch.Tensor, w: torch.Tensor) -> Callable[[], torch.Tensor]:
        raise RuntimeError("this device has none\nmore")

    monkeypatch.setitem(MATMULS, ("fp8", "_scaled_mm"), lacking)
    monkeypatch.setitem(MATMULS, ("int8", "_int_mm"), lambda x, w: lambda: x @ w)  # not transposed
    rows = {one.dtype: one for one in try_matmul(torch.device("cpu"))}
    assert (
        rows["fp8"].why == "it fails here (RuntimeError: this device has none)"
        and "wrong numbers" in rows["int8"].why
    )


def test_convolutions_of_this_cpu() -> None:
    rows = [*try_convolution(torch.device("cpu"))]
    assert [(one.way, one.dtype, one.why) for one in rows] == [
        ("conv2d", "float32", ""),
        ("conv3d", "float32", ""),
    ]
    assert all(one.error is not None and one.error < 1e-5 for one in rows)
    assert all(one.seconds and one.tflops for one in rows)


def test_convolutions_of_a_gpu_are_tried_with_and_without_tf32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stand-in GPU whose conv3d in TF32 is wrong, as that of cuDNN 9.10.2 to 9.15."""
    gpu, conv3d, flags = "cuda", kernels.F.conv3d, torch.backends.cudnn.flags
    allowed: list[bool] = []

    def wrong(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        broken = x.dtype == torch.float32 and allowed[-1]
        return conv3d(x, w).roll(1, -1) if broken else conv3d(x, w)

    def noted(**given: Any) -> Any:
        allowed.append(given["allow_tf32"])
        return flags(**given)

    wrong.__name__ = "conv3d"
    monkeypatch.setattr(kernels.F, "conv3d", wrong)
    monkeypatch.setattr(torch.backends.cudnn, "flags", noted)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_: tensor)
    monkeypatch.setattr(kernels.attention, "shortest", lambda *_: 0.001)
    before = torch.backends.cudnn.allow_tf32
    rows = [*try_convolution(torch.device(gpu))]
    assert torch.backends.cudnn.allow_tf32 == before and allowed == [False, True, False, True]
    assert [(one.way, one.dtype, "wrong numbers" in one.why) for one in rows] == [
        ("conv2d", "float32", False),
        ("conv2d", "tf32", False),
        ("conv3d", "float32", False),
        ("conv3d", "tf32", True),
    ]
    given = replace(on(cuda="12.6", cudnn="91002", **CARD), tries=(*GOOD, *rows))
    ((level, text),) = [one for one in found(given) if "conv" in one[1]]
    assert level == "broken" and "conv3d in tf32 on cuda (cuDNN 91002): wrong numbers" in text
    table = "\n".join(line for _, line in command.lines(given))
    assert re.search(r"cuda +tf32 +conv3d .* 1.00 .*wrong numbers", table)
    assert [one["way"] for one in given.as_dict()["tries"]][-1] == "conv3d"


def test_on_a_gpu_the_fastest_sound_kernel_is_shown_as_autos(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    rows = [
        KernelResult("attention", "cuda:0", "bfloat16", way, why, seconds=seconds)
        for way, why, seconds in (
            ("cudnn", "", 0.003),
            ("flash", "", 0.002),
            ("efficient", "it gives wrong numbers", 0.001),
            ("sage", "", 0.001),
            ("sdpa", "", 0.001),
        )
    ]
    rows.append(KernelResult("attention", "cuda:0", "float32", "sdpa", seconds=0.1))
    given = replace(FINE, devices=GPU, tries=(*GOOD, *rows))
    assert report._auto(given) == {
        "cpu": {"float32": "sdpa"},
        "cuda:0": {"float32": "sdpa", "bfloat16": "flash"},
    }


def test_the_encoder_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert encoder() == ""

    def missing(name: str, mode: str) -> None:
        raise ValueError(f"unknown encoder {name}")

    monkeypatch.setattr(
        environment,
        "import_module",
        lambda _: SimpleNamespace(CodecContext=SimpleNamespace(create=missing)),
    )
    assert encoder() == "it fails here (ValueError: unknown encoder libx264)"


def test_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sageattention.py").write_text(
        "raise OSError('libcudart.so.13: cannot open\\nmore')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sageattention", raising=False)  # another test's stand-in
    monkeypatch.setattr(environment, "REQUIRED", (*environment.REQUIRED, "wanflow_needs_this"))
    versions, broken = look_at_packages()
    assert broken == {
        "sageattention": "is installed but does not import: OSError: libcudart.so.13: cannot open",
        "wanflow_needs_this": "is not installed",
    }
    assert (
        re.fullmatch(r"[\d.]+", versions["numpy"])
        and versions["sageattention"] == "unknown version"
        and versions["wanflow_needs_this"] == ""
    )
    assert all(re.match(r"\d", versions[name]) for name in environment.SERVER)


# the disk


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "DISK_BYTES", 4 * 2**20)
    monkeypatch.setattr(environment, "DISK_CHUNK", 2**20)


def read_only(*_: object, **__: object) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.usefixtures("quick")
def test_a_disk_is_timed_and_left_as_it_was(tmp_path: Path) -> None:
    timed = disk(tmp_path)
    assert timed.folder == str(tmp_path) and timed.free > 0 and timed.notes == environment.CACHED
    assert (
        timed.writes is not None
        and timed.reads is not None
        and min(timed.writes, timed.reads) > 1e5
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick")
def test_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    timed = disk(tmp_path / "a" / "b")
    assert (
        timed.folder == str(tmp_path) and timed.reads and "a/b is no folder yet" in timed.notes[0]
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick")
def test_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.tempfile, "TemporaryFile", read_only)
    room = SimpleNamespace(free=10**12)  # other programs change the real disk's
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda _: room)
    notes = (
        "no file can be written there (Read-only file system)",
        "so its speed was not measured",
    )
    assert disk(tmp_path) == Disk(str(tmp_path), 10**12, None, None, notes)
    (tmp_path / "high").mkdir()
    (tmp_path / "high" / "big.safetensors").write_bytes(os.urandom(6 * 2**20))
    (tmp_path / "small.gguf").write_bytes(b"x")
    (tmp_path / "bigger.txt").write_bytes(bytes(8 * 2**20))
    timed = disk(tmp_path)
    assert timed.writes is None and timed.reads is not None and timed.reads > 1e5
    assert timed.notes[:2] == (
        "no file can be written there (Read-only file system)",
        "reading was timed on big.safetensors",
    )
    assert (
        "so its speed was not measured" in disk(tmp_path / "elsewhere").notes
    )  # what lies in a parent is not searched


@pytest.mark.usefixtures("quick")
@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere"
)
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    assert "no file can be written there (Permission denied)" in disk(tmp_path).notes


def test_a_full_disk_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**8))
    monkeypatch.setattr(environment.tempfile, "TemporaryFile", lambda **_: pytest.fail("it writes"))
    timed = disk(tmp_path)
    assert timed.free == 10**8 and timed.notes == (
        "there is too little room to time writing",
        "so its speed was not measured",
    )


@pytest.mark.usefixtures("quick")
def test_a_disk_that_fails_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "no file can be written there (No space left on device)" in disk(tmp_path).notes
    assert not list(tmp_path.iterdir())


# the command


def run(*argv: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "wanflow", "doctor", *argv],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **(env or {})},
    )


NO_GPU = not torch.cuda.is_available() and nvidia()[0] == ""


@pytest.mark.slow
@pytest.mark.skipif(not NO_GPU, reason="written for a machine without a GPU")
def test_as_text_where_all_is_fine(tmp_path: Path) -> None:
    done = run("--ckpt_dir", str(tmp_path / "weights"))  # 5 s; `run` ends it after 120
    assert done.returncode == 0, done.stderr
    text = done.stdout
    for words in (
        "PyTorch",
        "processor",
        "RAM",
        "GPU        none",
        "disk",
        "B/s, reads",
        "H.264 can be written",
        "auto picks it",
        "_scaled_mm",
        "best settings",
        "WANFLOW_CKPT_DIR, the default of --ckpt_dir: ",
    ):
        assert words in text, words
    assert "no problem found" in text or "note:" in text
    assert "\x1b" not in text + done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_as_json_beside_a_package_that_is_broken_and_talks(tmp_path: Path) -> None:
    (tmp_path / "flash_attn.py").write_text(
        "print('hello from a package')\nraise ImportError('undefined symbol')"
    )
    done = run(
        "--json",
        "--ckpt_dir",
        str(tmp_path),
        env={"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])},
    )
    document = json.loads(
        done.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON")
    )
    assert done.returncode == (0 if document["fine"] else 1)
    assert set(document) == {
        "fine",
        "system",
        "devices",
        "tries",
        "auto",
        "disk",
        "encoder",
        "packages",
        "pinned",
        "problems",
        "advice",
        "code",
    }
    assert {
        "level": "warning",
        "text": "flash_attn is installed but does not import: ImportError: undefined symbol",
    } in document["problems"]
    assert document["system"]["torch"] == torch.__version__ and document["system"]["ram"] > 0
    assert document["devices"][0]["name"] == "cpu" and document["auto"]["cpu"]["float32"] == "sdpa"
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["flash_attn.py"]


@pytest.mark.slow
def test_packages_that_are_needed_and_broken(tmp_path: Path) -> None:
    """Without the one that draws and the one that encodes, the report still comes."""
    for package in ("rich", "av"):
        (tmp_path / f"{package}.py").write_text(
            "raise ImportError('cannot open shared object file')"
        )
    done = run(
        "--ckpt_dir",
        str(tmp_path),
        env={"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])},
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for package in ("rich", "av"):
        words = (
            "is installed but does not import: ImportError: cannot open shared object file; pip"
            " install --force-reinstall"
        )
        assert f"broken: {package} {words} {package}\n" in done.stdout
    assert "_scaled_mm" in done.stdout and "repaired first" in done.stderr


@pytest.mark.skipif(
    not NO_GPU or torch.version.cuda is not None, reason="written for PyTorch's build for CPUs"
)
@pytest.mark.usefixtures("smi", "quick")
def test_a_gpu_that_this_pytorch_cannot_use_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert main(["doctor", "--ckpt_dir", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert (
        "driver     NVIDIA 580.65.06, for CUDA up to 13.0: NVIDIA A100-SXM4-80GB, NVIDIA"
        " A100-SXM4-80GB" in output.out
    )
    line = next(line for line in output.out.splitlines() if line.startswith("broken: "))
    assert line.endswith(
        "is built for CPUs only; pip install --force-reinstall torch --index-url"
        " https://download.pytorch.org/whl/cu130"
    )
    assert output.err.endswith("repaired first\n")
    assert main(["doctor", "--json", "--ckpt_dir", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert (
        json.loads(output.out)["fine"] is False
        and "wanflow: broken: NVIDIA A100-SXM4-80GB (driver 580.65.06)" in output.err
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["doctor", "--ckpt_dir", str(tmp_path)]) == 0
    assert "is hidden by CUDA_VISIBLE_DEVICES" in capsys.readouterr().out


def test_a_pytorch_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "raise ImportError('libcudart.so.13: cannot open shared object file')"
    )
    done = run(env={"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "PyTorch cannot be loaded: libcudart.so.13: cannot open shared object file; pip install"
        in done.stderr
    )


@pytest.mark.slow
def test_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "sageattention.py").write_text(
        "import pathlib, time\npathlib.Path(__file__).with_name('reached').touch()\ntime.sleep(600)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])}
    process = subprocess.Popen(
        [sys.executable, "-m", "wanflow", "doctor"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    deadline = time.monotonic() + 180
    while not (tmp_path / "reached").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (
        (process.returncode, out) == (130, "")
        and err.endswith("wanflow: interrupted\n")
        and "Traceback" not in err
    )


def test_two_equal_gpus_are_tried_once_in_full(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried: list[tuple[str, str]] = []
    for name in ("try_attention", "try_convolution", "try_matmul"):
        monkeypatch.setattr(
            report,
            name,
            lambda device, say, name=name: tried.append((name, str(device))) or iter(()),
        )
    monkeypatch.setattr(report, "devices", lambda: (GPU, []))
    monkeypatch.setattr(report, "disk", lambda folder, say: Disk(str(folder), 0))
    examined = report.examine(tmp_path)
    assert tried == [
        ("try_attention", "cpu"),
        ("try_convolution", "cpu"),
        ("try_matmul", "cpu"),
        ("try_attention", "cuda:0"),
        ("try_convolution", "cuda:0"),
        ("try_matmul", "cuda:0"),
        ("try_matmul", "cuda:1"),
    ]
    assert [problem.level for problem in examined.problems if "cannot compute" in problem.text] == [
        "broken"
    ] * 3


def test_what_cannot_work_has_its_reason_in_the_table() -> None:
    rows = (
        *ON_GPU,
        KernelResult("attention", "cuda:0", "float32", "flash", "it does not compute in float32"),
        KernelResult("attention", "cuda:0", "bfloat16", "sage", lse="none"),
    )
    given = replace(
        on(cuda="13.0", cudnn="9.1.0", **CARD),
        devices=GPU,
        tries=rows,
        auto={"cuda:0": {"bfloat16": "flash"}},
    )
    text = "\n".join(line for _, line in command.lines(given))
    assert re.search(r"cuda:0 +float32 +flash .* it does not compute in float32", text)
    assert re.search(r"cuda:0 +bfloat16 +flash .*auto picks it", text)
    assert re.search(r"cuda:0 +bfloat16 +sage .*no log-sum-exp: none", text)
    assert "GPU        cuda:1: NVIDIA A100" in text and "CUDA 13.0, cuDNN 9.1.0" in text


def test_advice_without_a_gpu_names_what_is_needed_and_what_runs() -> None:
    first, second = command.advice(FINE, Path())
    assert "80 GB" in first and "no GPU" in first and "nano" in second


def test_advice_for_a_gpu_is_the_planners(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def settle(model: Any, request: Any, *_: object) -> SimpleNamespace:
        asked.append((model.spec.task, request.size))
        short = () if asked[-1] in fitting else ("90.0 GB of GPU memory",)
        return SimpleNamespace(
            fits=not short, short=short, reasons=("blocks are streamed",), offers=()
        )

    fitting = {("t2v-A14B", (832, 480)), ("ti2v-5B", (1280, 704))}
    monkeypatch.setattr(importlib.import_module("wanflow.plan.solve"), "solve", settle)
    given = replace(FINE, auto={"cuda:0": {"float32": "efficient", "bfloat16": "cudnn"}})
    assert command.advice(given, Path()) == [
        "Wan2.2-T2V-A14B, 1280*720, 81 frames: does not fit: 90.0 GB of GPU memory",
        "  blocks are streamed",
        "Wan2.2-T2V-A14B, 832*480, 81 frames: fits",
        "  blocks are streamed",
        "Wan2.2-TI2V-5B, 1280*704, 121 frames: fits",
        "  blocks are streamed",
        "attention: cudnn",
    ]
    old = replace(FINE, auto={"cuda:0": {"float32": "efficient", "float16": "efficient"}})
    assert command.advice(old, Path())[-1] == "attention: efficient, in float16"
    first = [("t2v-A14B", (1280, 720)), ("t2v-A14B", (832, 480)), ("ti2v-5B", (1280, 704))]
    assert asked == first * 2


@pytest.mark.usefixtures("quick")
def test_a_plan_that_fails_costs_only_its_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(command, "advice", fails)
    assert main(["doctor", "--ckpt_dir", str(tmp_path)]) in (0, 1)
    assert "none: the plan failed, RuntimeError: no driver" in capsys.readouterr().out
