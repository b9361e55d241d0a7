"""What goes to standard output and to standard error: one path or one document, and the rest."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.common import PROMPT

from wanflow.cli import main
from wanflow.cli.inspect import _whole
from wanflow.cli.output import Output, _LogLines
from wanflow.clipfiles import read_recipe
from wanflow.described import SIGNALS
from wanflow.hardware import peak_memory
from wanflow.screen import Screen

MAKE = ["generate", "--ckpt_dir", "nano", "--device", "cpu", "--prompt", PROMPT, "--seed", "3"]
MAKE += ["--sample_steps", "2", "--frame_num", "5", "--save_file"]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_the_path_is_the_one_line_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*MAKE, "a b.mp4"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "a b.mp4\n"
    last = shown.err.splitlines()[-1]
    size = Path("a b.mp4").stat().st_size
    assert last.startswith(f"saved a b.mp4: {size / 1000:.0f} kB in ") and " s a step, " in last
    assert re.search(r"peak [\d.]+ [MG]iB of RAM$", last)  # of this process, with the tests before
    assert main(["replay", "a b.mp4", "--save_file", "b.mp4", "--quiet"]) == 0
    assert capsys.readouterr() == ("b.mp4\n", "")
    assert main(["convert", "nano", "out", "--to", "bf16", "--quiet"]) == 0
    assert capsys.readouterr() == ("out\n", "")


def test_one_document_and_lines_of_progress(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*MAKE, "a.mp4", "--json", "--contact_sheet"]) == 0
    shown = capsys.readouterr()
    made = json.loads(shown.out)
    assert (made["path"], made["contact_sheet"], made["code"]) == ("a.mp4", "a_sheet.png", 0)
    assert made["bytes"] == Path("a.mp4").stat().st_size and made["seed"] == 3
    assert made["recipe"]["request"]["prompt"] == PROMPT
    assert 0 < made["seconds_per_step"] < made["seconds"] and made["peak_memory"]["ram"] > 1e8
    assert {"denoising", "decoding"} <= made["stages"].keys()
    lines = events(shown.err)
    done = [line for line in lines if line["event"] == "progress" and line["task"] == "denoising"]
    assert (done[-1]["done"], done[-1]["total"], done[-1]["eta"]) == (2, 2, 0)


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["generate", "--ckpt_dir", "nano"], 2, "--prompt is missing"),
        (["generate", "--promt", "x"], 2, "did you mean --prompt?"),
        (["inspect", "nowhere"], 2, "nowhere is missing"),
        (["replay", "nowhere.mp4"], 2, "nowhere.mp4"),
        (["plan", "--gpu", "rtx4090", "--size", "1*1"], 2, "multiple of 16"),
        (["genrate"], 2, "did you mean generate?"),
    ],
)
def test_a_failure_is_a_document_too(
    argv: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, "--json"]) == code
    shown = capsys.readouterr()
    failed = json.loads(shown.out)
    assert failed["code"] == code and words in failed["error"]
    assert events(shown.err)[-1] == {"event": "error", "text": f"wanflow: {failed['error']}"}
    assert main([*argv, "--quiet"]) == code
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err == f"wanflow: {failed['error']}\n"


def test_the_document_of_a_stopped_run_tells_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Screen, "decoding", stop)
    assert main([*MAKE, "a.mp4", "--json"]) == 130
    stopped = json.loads(capsys.readouterr().out)
    assert (stopped["error"], stopped["code"], stopped["step"]) == ("interrupted", 130, 2)
    assert Path(stopped["state"]).exists() and stopped["state"] in stopped["resume"]
    assert stopped["seconds"] > 0 and stopped["seconds_per_step"] > 0


def test_verbose_names_times_and_kernels(caplog: pytest.LogCaptureFixture) -> None:
    assert main([*MAKE, "a.mp4", "--verbose"]) == 0
    for words in ("reading VAE took ", "attention kernel ", "vae from "):
        assert any(words in message for message in caplog.messages), words
    caplog.clear()
    assert main([*MAKE, "b.mp4"]) == 0
    assert not [record for record in caplog.records if record.levelname == "DEBUG"]


def test_the_log_is_lines_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.LogRecord("wanflow", logging.WARNING, "", 0, "a\x1b[31m\nb", None, None)
    _LogLines(Output()).emit(record)
    assert capsys.readouterr() == ("", "wanflow: a\ufffd[31m\ufffdb\n")
    _LogLines(Output(json=True)).emit(record)
    assert events(capsys.readouterr().err) == [{"event": "warning", "text": "a\x1b[31m\nb"}]


def test_what_a_library_prints_stays_off_standard_output(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Output().guarded(page=False):
        print("NCCL version 2")
    with Output().guarded(page=True):
        print("a page")
    assert capsys.readouterr() == ("a page\n", "NCCL version 2\n")


@pytest.mark.skipif(os.name == "nt", reason="names of files are bytes on POSIX")
def test_a_script_gets_the_bytes_of_a_name(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    name = "圆\x1b[31m.mp4"
    assert main([*MAKE, name]) == 0
    shown = capfdbinary.readouterr()
    assert shown.out == os.fsencode(name) + b"\n"
    assert b"\x1b" not in shown.err and "圆\ufffd[31m".encode() in shown.err


@pytest.mark.skipif(os.name == "nt", reason="names of files are Unicode on Windows")
def test_a_prompt_is_read_as_utf8_where_the_locale_is_ascii(in_tmp: Path) -> None:
    ascii_only = os.environ | {"LC_ALL": "POSIX", "PYTHONUTF8": "0"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "wanflow", *words]
        return subprocess.run(command, env=ascii_only, capture_output=True, text=True, timeout=300)

    asked = [*MAKE[:-1], "--prompt", f"{PROMPT} 圆"]
    done = run(*asked)
    assert done.returncode == 0, done.stderr
    name = done.stdout.strip()
    assert name.isascii() and read_recipe(Path(name))["request"]["prompt"] == f"{PROMPT} 圆"
    refused = run(*asked, "--save_file", "圆.mp4")
    assert refused.returncode == 2 and "PYTHONUTF8=1" in refused.stderr


@pytest.mark.skipif(os.name == "nt", reason="closes descriptors as a POSIX shell does")
@pytest.mark.parametrize("argv", [["inspect", "nowhere"], [*MAKE, "a.mp4", "--dtype", "nonsense"]])
def test_errors_stay_off_standard_output_where_standard_error_is_closed(argv: list[str]) -> None:
    command = shlex.join([sys.executable, "-m", "wanflow", *argv]) + " 2>&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps a folder that a process is in")
def test_a_folder_that_was_deleted_under_a_command_is_named(in_tmp: Path) -> None:
    asked = shlex.join([sys.executable, "-m", "wanflow", *MAKE, "a.mp4"])
    command = f"mkdir gone && cd gone && rmdir ../gone && {asked}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "was deleted" in done.stderr and "cd " in done.stderr


def test_a_folder_is_hashed_as_one_task() -> None:
    shown: list[tuple[int, int]] = []
    report = _whole(lambda done, total: shown.append((done, total)), 30)
    for done, size in ((5, 10), (10, 10), (8, 20), (20, 20)):
        report(done, size)
    assert shown == [(5, 30), (10, 30), (18, 30), (30, 30)]


@pytest.mark.slow
def test_a_document_of_several_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    several = ["--gpus", "cpu,cpu", "--ulysses_size", "3"]
    before = [signal.getsignal(number) for number in SIGNALS]
    assert main([*MAKE, "a.mp4", "--json", *several]) == 2
    assert [signal.getsignal(number) for number in SIGNALS] == before  # the launcher gives back
    shown = capfd.readouterr()
    failed = json.loads(shown.out)
    assert failed["code"] == 2 and "does not make 2 ranks" in failed["error"]
    assert events(shown.err)[-1] == {"event": "error", "text": f"wanflow: {failed['error']}"}


def test_peak_memory(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("Name:\tx\nVmHWM:\t   2048 kB\nVmRSS:\t 1 kB\n")
    assert peak_memory(tmp_path)["ram"] == 2 << 20
    assert peak_memory()["ram"] > 50e6


def test_a_script_of_completions_is_a_document_too(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", "bash", "--json"]) == 0
    assert "complete " in json.loads(capsys.readouterr().out)["script"]


@pytest.mark.parametrize(("flag", "shown"), [("--json", True), ("--quiet", False)])
def test_warnings_of_libraries_are_log_lines(flag: str, shown: bool) -> None:
    """In a process of its own: pytest takes the log and the warnings of this one."""
    code = (
        "import warnings, wanflow.cli as cli\n"
        "cli._module = lambda name: warnings.warn('a library warns') or cli.import_module(\n"
        "    f'wanflow.cli.{cli.COMMANDS[name].module}')\n"
        f"cli.entry(['download', '--list', {flag!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert any("a library warns" in line["text"] for line in lines) is shown
