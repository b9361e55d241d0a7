"""`wanflow bench --check`: every part in a process of its own, and a page of what was found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from wanflow.bench import check, findings
from wanflow.bench.check import PARTS, SECONDS, Part, Result
from wanflow.bench.gguf import q8_0, write_q8_0
from wanflow.bench.nano import rms
from wanflow.bench.part import CODE
from wanflow.bench.record import Finding, Record, Skip, read_found
from wanflow.bench.tools import block_work, distance, one_block, random_expert, scale_of
from wanflow.checkpoint.source import open_source
from wanflow.cli import main
from wanflow.opening import resolve
from wanflow.plan.calibration import read_calibration

BARE = ("av", "ftfy", "rich", "PIL", "huggingface_hub", "filelock", "shtab", "gguf")
# What a part of these tests does after its first finding.
ENDS = {
    "crash": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "hang": "import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)",
    "exit": "import sys; print('the last words'); sys.exit(3)",
    "raise": "\nwith record.asking('a question'): raise RuntimeError('cuBLAS says no')\nend()",
    "well": "end()",
}


def broken(monkeypatch: pytest.MonkeyPatch, limit: float = 20.0) -> tuple[Part, ...]:
    """Make parts of these tests the parts of a check."""

    def command(part: Part, file: Path, device: str, limit: float) -> list[str]:
        code = (
            "from pathlib import Path; from wanflow.bench.record import Record;"
            f" record = Record({part.name!r}, Path({str(file)!r}));"
            " end = lambda: record.save(ended=True);"
            " record.about = {'device': 'a card', 'device_memory': 8, 'dtype': 'bfloat16'};"
            f" record.calibrate(matmul=2e12); record.measured('before', {part.name!r});"
            f" record.now = 'the kernel'; record.save(); {ENDS[part.name]}"
        )
        return [sys.executable, "-c", code]

    parts = tuple(Part(name, f"it ends by {name}", limit) for name in ENDS)
    monkeypatch.setattr(check, "command", command)
    monkeypatch.setattr(check, "PARTS", parts)
    monkeypatch.setattr(check, "NAMES", tuple(ENDS))
    return parts


def states(result: Result) -> list[str]:
    return [one.state for one in result.findings]


def test_one_failure_hides_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts = broken(monkeypatch)
    limits = {"hang": 2.0}
    parts = tuple(Part(p.name, p.title, limits.get(p.name, p.limit)) for p in parts)
    began = time.monotonic()
    results = {one.part.name: one for one in check.check(parts, tmp_path, "cpu")}
    assert time.monotonic() - began < 60 and list(results) == list(ENDS)
    assert [name for name, one in results.items() if not one.failed] == ["well"]
    for name, one in results.items():  # what was found before the end is kept
        assert one.findings[0] == Finding("before", "measured", name)
        assert one.calibration == {"matmul": 2e12}
    last = {name: one.findings[-1].value for name, one in results.items()}
    assert last["crash"] == "killed by SIGSEGV while it asked: the kernel"
    assert last["hang"] == "ended after 2 s while it asked: the kernel"
    assert last["exit"].endswith("exit code 3 while it asked: the kernel (the last words)")
    assert last["raise"] == "RuntimeError: cuBLAS says no"
    assert "Traceback" in results["raise"].findings[-1].numbers["traceback"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_what_a_part_started_ends_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken(monkeypatch)
    monkeypatch.setitem(
        ENDS,
        "hang",
        "import subprocess, time; child = subprocess.Popen(['sleep', '600']);"
        " record.measured('child', str(child.pid)); time.sleep(600)",
    )
    result = check.run_part(Part("hang", "", 2), tmp_path, "cpu", 2.0)
    child = Path(f"/proc/{result.findings[1].value}/stat")
    for _ in range(50):
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child of a part that was ended runs on")


def test_the_time_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts = broken(monkeypatch)
    assert sum(part.limit for part in PARTS) <= SECONDS == 480
    late = [one.findings[0].value for one in check.check(parts[3:], tmp_path, "cpu", seconds=0)]
    assert late == ["not started: the time of the check was spent"] * 2


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["bench", "--check", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_fails_at_its_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(monkeypatch)
    folder = tmp_path / "made" / "out"
    code, out, err = run(capsys, "--json", "--out", str(folder), "--parts", "raise", "well")
    document = json.loads(out)
    assert code == document["code"] == 1 and not document["passed"]
    assert [one["passed"] for one in document["parts"]] == [False, True]
    assert document["folder"] == str(folder) and document["device"] == "a card"
    assert "Wrong: raise; see" in document["error"] and "raise" in err.splitlines()[-1]
    text = (folder / "findings.md").read_text()
    assert "- raise: a question: RuntimeError: cuBLAS says no; expected no error" in text
    assert text.index("## What is wrong") < text.index("## raise: ") < text.index("## well: ")
    kept = json.loads((folder / "check.json").read_text())
    assert kept["parts"] == document["parts"]
    assert read_calibration(folder / "check.json").matmul == 2e12
    assert sorted(path.name for path in folder.iterdir()) == [
        "check.json", "findings.md", "raise.json", "raise.log", "well.json", "well.log"
    ]  # fmt: skip
    code, out, err = run(capsys, "--out", str(folder), "--parts", "well")
    assert code == 2 and "holds files; name a new folder" in err
    code, out, err = run(capsys, "--out", str(tmp_path / "b"), "--parts", "well")
    assert code == 0 and "# Findings on a card" in out and "**0 wrong, 0 right" in out


def test_ctrl_c_keeps_what_was_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(monkeypatch)
    whole = check.run_part

    def interrupted(part: Part, *rest: Any) -> Result:
        if part.name == "well":
            raise KeyboardInterrupt
        return whole(part, *rest)

    monkeypatch.setattr(check, "run_part", interrupted)
    code, out, _ = run(capsys, "--json", "--out", str(tmp_path / "o"), "--parts", "raise", "well")
    assert code == 130 and [one["name"] for one in json.loads(out)["parts"]] == ["raise"]
    text = (tmp_path / "o" / "findings.md").read_text()
    assert "The check was interrupted." in text and "cuBLAS says no" in text


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "--parts", "wings")
    assert code == 2 and "--parts wings: expected one of machine, nano, pinning" in err


def test_every_part_has_code() -> None:
    assert list(CODE) == [part.name for part in PARTS]


# what a part writes


def test_a_record_is_whole_at_any_time(tmp_path: Path) -> None:
    file = tmp_path / "part.json"
    record = Record("part", file)
    record.save()
    assert read_found(file).asking == "the start"
    with record.asking("a"):
        record.passed("a", True, "2", "2", number=2)
    with record.asking("b"):
        raise Skip("needs CUDA")
    with record.asking("c"):
        raise ValueError("no\nkernel")
    record.calibrate(matmul=1e12, low=None)
    found = read_found(file)
    assert [(one.what, one.state) for one in found.findings] == [
        ("a", "passed"), ("b", "skipped"), ("c", "failed")
    ]  # fmt: skip
    assert found.findings[2].value == "ValueError: no kernel" and found.asking == "c"
    assert found.calibration == {"matmul": 1e12}
    record.save(ended=True)
    assert read_found(file).asking == ""


@pytest.mark.parametrize("text", ["", "{", "[]", '{"findings": 3}', '{"findings": [{"a": 1}]}'])
def test_a_damaged_record_holds_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "part.json").write_text(text)
    assert read_found(tmp_path / "part.json").findings == []


def test_a_calibration_out_of_range_is_none() -> None:
    about = {"device": "a card", "device_memory": 8, "dtype": "bfloat16", "versions": {}}
    part = Part("block", "", 1)
    right = Result(part, (), 1.0, {"matmul": 1e12}, about)
    assert (findings.calibration_of([right]) or {})["matmul"] == 1e12
    assert findings.calibration_of([Result(part, (), 1.0, {"matmul": -1}, about)]) is None
    assert findings.calibration_of([]) is None


# what parts measure with


def test_q8_0_reads_back(tmp_path: Path) -> None:
    source = resolve("nano").source("high")
    write_q8_0(source, tmp_path / "high.gguf")
    read = open_source(tmp_path / "high.gguf")
    assert set(read.tensors) == set(source.tensors) and "GGUF of wan" in read.container
    name, norm = "blocks.0.ffn.0.weight", "blocks.0.self_attn.norm_q.weight"
    assert read.tensors[name].packing == "Q8_0" and not read.tensors[norm].packing
    assert 0 < distance(read.read(name, torch.float32), source.read(name, torch.float32)) < 5e-3
    assert torch.equal(read.read(norm, torch.float32), source.read(norm, torch.float32))
    assert q8_0(torch.zeros(1, 32)).tolist() == [[0] * 34]


def test_a_block_runs_as_in_a_pass() -> None:
    scale = scale_of(torch.device("cpu"))
    latent = scale.latents[1]
    torch.manual_seed(0)
    model = random_expert(scale, 1)
    run = one_block(model, latent, "cpu")
    with torch.no_grad():
        assert torch.equal(run(), run.by(next(iter(model.blocks))))
    tokens, dim, wide = scale.tokens(latent), scale.spec.dit.dim, scale.spec.dit.ffn_dim
    flops = block_work(scale, latent).flops
    assert flops["matmul", True] == 2 * tokens * (6 * dim**2 + 2 * dim * wide)
    assert rms(torch.ones(4), torch.ones(4)) == 0 == distance(torch.ones(4), torch.ones(4))


# a bare container


def bare(folder: Path) -> dict[str, str]:
    """An environment whose processes cannot import what a bare container lacks."""
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Bare:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {BARE!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Bare())\n"
    )
    source = str(Path(check.__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), source])}


def test_nothing_more_is_imported(tmp_path: Path) -> None:
    modules = sorted({place.split(".")[0] for places in CODE.values() for place in places})
    code = (
        "import importlib, sys\n"
        "from wanflow.cli import main\n"
        f"for name in {modules!r}: importlib.import_module('wanflow.bench.' + name)\n"
        "import wanflow.assemble, wanflow.opening, wanflow.doctor.report\n"
        f"assert not set(sys.modules) & set({BARE!r})\n"
        "sys.exit(main(['bench', '--check', '--parts', 'pinning', '--device', 'cpu']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=bare(tmp_path),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "a range registered twice | needs CUDA" in done.stdout
    assert "pinning: pinned memory" in done.stderr  # progress, without rich


@pytest.mark.slow
def test_the_check_in_a_bare_container(tmp_path: Path) -> None:
    """All parts, small, on the CPU; from a copy of the source, without what it must not need."""
    out = tmp_path / "out"
    words = ["bench", "--check", "--json", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "wanflow", *words],
        capture_output=True,
        text=True,
        env=bare(tmp_path),
        cwd=tmp_path,
    )
    document = json.loads(done.stdout)
    wrong = [
        one for part in document["parts"] for one in part["findings"] if one["state"] == "failed"
    ]
    assert done.returncode == 0 and document["passed"], wrong
    assert [part["name"] for part in document["parts"]] == [part.name for part in PARTS]
    values = {
        one["what"]: one["value"]
        for part in document["parts"]
        for one in part["findings"]
        if one["state"] == "skipped"
    }
    assert values.pop("a clip by the command line").startswith("needs av, ftfy, rich")
    assert values["memory of a context"] == "needs CUDA"
    rates = read_calibration(out / "check.json")
    assert min(rates.matmul or 0, rates.attention or 0, rates.memory or 0, rates.disk or 0) > 1e6
