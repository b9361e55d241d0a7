"""`wanflow bench`: stages of a run beside the plan; a check whose parts cannot hide each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny import FAMILY
from PIL import Image

from wanflow.bench import check, findings, report
from wanflow.bench.check import PARTS, SECONDS, Part, Result
from wanflow.bench.gguf import q8_0, write_q8_0
from wanflow.bench.nano import rms
from wanflow.bench.part import CODE
from wanflow.bench.record import Finding, Record, Skip, read_found
from wanflow.bench.tools import block_work, distance, one_block, random_expert, scale_of
from wanflow.bench.weights import random_checkpoint
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


def broken(monkeypatch: pytest.MonkeyPatch, limit: float = 60.0) -> tuple[Part, ...]:
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
    limits = {"hang": 5.0}
    parts = tuple(Part(p.name, p.title, limits.get(p.name, p.limit)) for p in parts)
    began = time.monotonic()
    results = {one.part.name: one for one in check.check(parts, tmp_path, "cpu")}
    assert time.monotonic() - began < 300 and list(results) == list(ENDS)
    assert [name for name, one in results.items() if not one.failed] == ["well"]
    for name, one in results.items():  # what was found before the end is kept
        assert one.findings[0] == Finding("before", "measured", name)
        assert one.calibration == {"matmul": 2e12}
    last = {name: one.findings[-1].value for name, one in results.items()}
    assert last["crash"] == "killed by SIGSEGV while it asked: the kernel"
    assert last["hang"] == "ended after 5 s while it asked: the kernel"
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
    result = check.run_part(Part("hang", "", 5), tmp_path, "cpu", 5.0)
    child = Path(f"/proc/{result.findings[1].value}/stat")
    for _ in range(600):
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


@pytest.mark.parametrize(("small", "state"), [(True, "skipped"), (False, "failed")])
def test_a_small_card_may_run_out_of_memory(small: bool, state: str) -> None:
    record = Record("part")
    record.small = small
    with record.asking("a block"):
        raise torch.OutOfMemoryError("tried to allocate 8 GiB")
    assert (record.findings[0].state, "8 GiB" in record.findings[0].value) == (state, True)


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


# the stages of a run


def test_random_weights_are_the_same_each_time() -> None:
    checkpoint = random_checkpoint("nano", 2, torch.device("cpu"))
    source, name = checkpoint.source("high"), "blocks.1.ffn.0.weight"
    whole = source.read(name, torch.float32)
    assert whole.shape == (640, 160) and 0.9 < whole.std() * 160**0.5 < 1.1
    assert torch.equal(source.read(name, torch.float32, slice(3, 9)), whole[3:9])
    half = torch.empty(640, 160, dtype=torch.bfloat16)
    assert source.read(name, out=half, dtype=torch.bfloat16) is half and half.any()
    assert checkpoint.spec.dit.num_layers == 2 and "blocks.2.ffn.0.weight" not in source.tensors


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What the command measures of nano with random weights, and what it keeps."""
    folder = tmp_path_factory.mktemp("bench") / "out"
    words = ["bench", "--random-weights", "nano", "--layers", "2", "--size", "32*32"]
    words += ["--frame_num", "5", "--repeat", "2", "--device", "cpu", "--out", str(folder)]
    assert main(words) == 0
    return json.loads((folder / "stages.json").read_text()), folder


def test_stages_stand_beside_the_plan(stages: tuple[dict[str, Any], Path]) -> None:
    document, _ = stages
    named = {one["name"]: one for one in document["stages"]}
    for expert in ("high", "low"):
        step = named[f"{expert}-noise expert: a step"]
        assert len(step["times"]) == 4  # of three steps the first counts apart, in two runs
        assert step["seconds"] == pytest.approx(sum(sorted(step["times"])[1:3]) / 2)
        assert step["flops_per_second"] == pytest.approx(step["flops"] / step["seconds"])
        assert step["share_of_plan"] == pytest.approx(step["planned"] / step["seconds"])
        assert step["planned_peak"] > 10**8
        assert named[f"{expert}-noise expert: first step beyond"]["seconds"] >= 0
    assert len(named["low-noise expert: switch, reading"]["times"]) == 2
    assert {"text encoder", "VAE: reading", "VAE", "mp4"} <= named.keys()
    assert document["attention"] == "sdpa" and document["request"]["sample_steps"] == 6
    assert document["calibration"]["device"] == document["device"]


def test_the_work_of_a_step_is_that_of_the_model(stages: tuple[dict[str, Any], Path]) -> None:
    """Both branches of guidance, two blocks, by hand: projections, attention, text, head."""
    step = next(one for one in stages[0]["stages"] if one["name"].endswith(": a step"))
    tokens, text, dim, wide = 2 * 2 * 2, 32, 160, 640
    block = 2 * tokens * (6 * dim**2 + 2 * dim * wide) + 4 * tokens * (tokens + text) * dim
    assert 2 * 2 * block < step["flops"] < 1.5 * 2 * 2 * block


def test_what_is_kept(stages: tuple[dict[str, Any], Path]) -> None:
    document, folder = stages
    text = (folder / "stages.txt").read_text()
    assert document["title"] in text and "high-noise expert: a step" in text
    with Image.open(folder / "stages.png") as picture:
        assert picture.size[1] > 44 * len(document["stages"])
        colours = {colour for _, colour in picture.getcolors(1 << 20)}
    assert {report.BLUE, report.GREY} <= colours  # both bars are drawn
    assert read_calibration(folder / "stages.json").device == document["device"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ckpt_dir", "nano", "--random_weights", "nano"], "is in place of files: leave it out"),
        (["--ckpt_dir", "nano", "--layers", "2"], "add --random_weights t2v-A14B"),
        (["--parts", "vae"], "add --check"),
        (["--random_weights", "t2v-A14B", "--device", "cpu"], "needs a GPU with 80 GB"),
        (["--size", "31*32"], "multiple of 16"),
        (["--dtype", "float8"], "dtype 'float8' is none of"),
    ],
)
def test_refusals(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2 and message in capsys.readouterr().err


def test_a_peer_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wanflow.bench import against

    monkeypatch.setattr(against, "installed", lambda name: False)
    assert main(["bench", "--against", "diffusers"]) == 2
    assert "it is not installed; pip install diffusers" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["i2v", "ti2v"])
def test_a_model_with_more_channels_stands_beside_diffusers(kind: str) -> None:
    from wanflow.bench.against import _step
    from wanflow.bench.tools import Scale

    spec = FAMILY[kind]
    scale = Scale(torch.device("cpu"), spec, torch.float32, ((spec.vae.z_dim, 2, 4, 4),), (), 0)
    found: Any = SimpleNamespace(settings={}, kernel="math", compiled=False)
    with torch.no_grad():
        sides = _step(found, scale, 1, lambda *_: None)
    assert sides["equal"] and sides["max_difference"] < 1e-4


@pytest.mark.slow
def test_beside_diffusers(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--random_weights", "nano", "--layers", "1", "--size", "32*32", "--frame_num", "5"]
    assert main(["bench", *words, "--against", "diffusers", "--json", "--device", "cpu"]) == 0
    sides = json.loads(capsys.readouterr().out)["against"]
    for what in ("step", "decode"):
        assert sides[what]["equal"] and sides[what]["max_difference"] < 1e-4
        assert sides[what]["ratio"] > 0 and sides[what]["rounds"] == 3


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
def test_the_check_in_a_bare_container(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    planned = ["plan", "--ckpt_dir", "nano", "--device", "cpu", "--json"]
    assert main([*planned, "--calibration", str(out / "check.json")]) == 0
    assert "by wanflow bench" in capsys.readouterr().out
