"""Tables and progress: plain and stable where nobody watches, live where somebody does."""

from __future__ import annotations

import io
import json
import os
import re
from typing import Any

import pytest
from rich.console import Console

from wanflow import screen
from wanflow.screen import Screen, show_lines, show_table, table_lines


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "EVERY", 0.0)
    monkeypatch.setattr(screen, "DRAW", 0.0)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """One whose console takes its file for a terminal."""
    monkeypatch.setenv("TERM", "xterm")  # a dumb one shows no bars
    shown = Screen()
    shown.console = Console(file=io.StringIO(), force_terminal=True, width=100, soft_wrap=True)
    return shown


def text(shown: Screen) -> str:
    assert isinstance(shown.console.file, io.StringIO)
    return shown.console.file.getvalue()


def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    head, rows = ("name", "GB", "what"), [("a", "1.5", "[red]"), ("longer", "120.0", "")]
    lines = ["name       GB  what", "a         1.5  [red]", "longer  120.0"]
    assert table_lines(head, rows, "lrl") == lines
    show_table(head, rows, "lrl")
    assert capsys.readouterr().out.splitlines() == lines
    assert table_lines(head, [], "lrl") == ["name  GB  what"]


def test_a_table_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    show_table(("name", "GB"), [("[red]", "1.5")], "lr")
    out = capsys.readouterr().out
    assert "[red]" in out and "─" in out


@pytest.mark.usefixtures("hurried")
def test_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen() as shown:
        shown.progress("training", 3, 5, "step")
        shown.progress("training", 4, 5, "step", "loss 0.5")
        shown.progress("training", 5, 5, "step")
    assert capsys.readouterr().err.splitlines() == [
        "training: step 4/5, loss 0.5, ETA 0 s",
        "training: step 5/5, took 0 s",
    ]


def test_a_quick_task_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen() as shown:
        for done in range(5):
            shown.progress("reading", done, 4, "bytes")
            shown.stage("trying")
    assert capsys.readouterr().err == ""
    shown.progress("denoising", 4, 4, "step", last_line=True)
    assert capsys.readouterr().err == "denoising: step 4/4, took 0 s\n"


@pytest.mark.usefixtures("hurried")
def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(quiet=True) as shown:
        shown.say("x")
        shown.stage("y")
        for done in range(3):
            shown.progress("z", done, 2, last_line=True)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("hurried")
def test_two_bars_share_a_terminal(terminal: Screen) -> None:
    with terminal:
        terminal.progress("denoising", 0, 2, "step")
        terminal.progress("denoising", 1, 2, "step", "low-noise [expert]")
        for done in range(3):
            terminal.progress("reading low", done * 10**9, 2 * 10**9, "bytes")
            assert terminal._bars is not None
            terminal._bars.refresh()
        terminal.say("a message")
        terminal.progress("denoising", 2, 2, "step")
        assert terminal._bars is None  # the last task has ended
        terminal.stage("one")
        terminal.stage("two")
        assert list(terminal._tasks) == ["two"]
    shown = text(terminal)
    for words in (
        "step 1/2, low-noise [expert], ETA",
        "step 2/2",
        "reading low",
        "1.0 GB of 2.0 GB",
        "a message",
        "two",
    ):
        assert words in shown, words
    assert shown.endswith("\x1b[?25h")  # the cursor is back


def test_the_cursor_comes_back_after_a_failure(terminal: Screen) -> None:
    with pytest.raises(OSError, match="full"), terminal:
        terminal.progress("fetching", 1, 3, "bytes")
        raise OSError("full")
    assert terminal._bars is None and "\x1b[?25h" in text(terminal)


def test_no_terminal_codes_in_a_pipe() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as end:
        shown = Screen()
        shown.console.file = end
        shown.progress("x", 2, 2, "step", last_line=True)
    with os.fdopen(reading) as start:
        assert start.read() == "x: step 2/2, took 0 s\n"


@pytest.mark.usefixtures("hurried")
def test_lines_for_programs(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(screen, "EVENT", 0.0)
    with Screen(events=True) as shown:
        shown.say("a\nb\x1b[31m")
        shown.progress("reading", 0, 4, "bytes")
        shown.progress("reading", 4, 4, "bytes", "fast")
    said, first, last = map(json.loads, capsys.readouterr().err.splitlines())
    assert said == {"event": "message", "text": "a\nb\x1b[31m"}
    assert (first["done"], first["total"], first["eta"]) == (0, 4, None)
    assert (last["task"], last["done"], last["note"], last["eta"]) == ("reading", 4, "fast", 0)
    assert shown.stages["reading"] >= 0
    with Screen(quiet=True, events=True) as shown:
        shown.say("x")
        shown.progress("reading", 1, 1)
    assert capsys.readouterr().err == ""


HOSTILE = "a\x1b]0;owned\x07\x9b31m\nwanflow: saved\u202e"
HARMLESS = "a\ufffd]0;owned\ufffd\ufffd31m\ufffdwanflow: saved\ufffd"


@pytest.mark.usefixtures("hurried")
def test_names_of_strangers_cannot_act_on_the_terminal(
    terminal: Screen, capsys: pytest.CaptureFixture[str]
) -> None:
    with Screen() as shown:
        shown.say(HOSTILE)
        shown.progress(HOSTILE, 0, 2, note=HOSTILE)
        shown.progress(HOSTILE, 1, 2, note=HOSTILE)
    assert capsys.readouterr().err.count(HARMLESS) >= 3
    show_lines([("bold", HOSTILE)])
    show_table(("file", "size"), [(HOSTILE, "1")], "lr")
    out = capsys.readouterr().out
    assert out.count(HARMLESS) == 2 and "\x1b" not in out
    for width in (80, 300):
        terminal.console.width = width
        show_table(("file", "size"), [(HOSTILE, "1")], "lr", terminal.console)
        with terminal:
            terminal.progress(HOSTILE, 1, 2)
    assert "\x1b]" not in text(terminal) and "\x9b" not in text(terminal)


def test_words_that_look_like_emoji_stay(capsys: pytest.CaptureFixture[str]) -> None:
    Screen().say(":cat:.mp4")
    show_lines([("", ":cat: [red]")])
    shown = capsys.readouterr()
    assert (shown.err, shown.out) == (":cat:.mp4\n", ":cat: [red]\n")


HEAD = ("what", "file", "form", "parameters", "size")
ROWS = [
    (
        *("high-noise expert", "high_noise_model/diffusion_pytorch_model.safetensors"),
        *("safetensors, official names", "2,739,744", "5.5 MB"),
    ),
    ("tokenizer", "google/umt5-xxl/tokenizer.json", "tokenizer.json", "", "26 kB"),
]


@pytest.mark.parametrize("width", [80, 100, 140])
def test_a_table_breaks_no_word(width: int) -> None:
    out = Console(file=io.StringIO(), force_terminal=True, width=width, no_color=True)
    show_table(HEAD, ROWS, "lllrr", out)
    assert isinstance(out.file, io.StringIO)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", out.file.getvalue()).splitlines()
    assert max(map(len, lines)) <= width
    shown = " ".join(" ".join(lines).split())
    for row in ROWS:
        for word in " ".join(row).split():
            assert word in shown, (word, lines)
    assert any("5.5 MB" in line for line in lines)  # a number keeps its unit


@pytest.mark.parametrize(
    ("width", "words"),
    [
        (120, "step 3/40, high-noise expert, ETA"),
        (80, "step 3/40, high-noise expert, ETA"),
        (40, "step 3/40, ETA"),
        (24, "7 %"),
    ],
)
@pytest.mark.usefixtures("hurried")
def test_a_bar_fits_its_line(terminal: Screen, width: int, words: str) -> None:
    terminal.console.width = width
    with terminal:
        for step in range(4):
            terminal.progress("denoising", step, 40, "step", "high-noise expert")
        assert terminal._bars is not None
        terminal._bars.refresh()
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\r", text(terminal)).replace("\r", "\n").splitlines()
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text(terminal)).split("\r")[-1]
    assert words in drawn, last
    assert max(len(line.strip("\n")) for line in drawn.split("\n")) <= width


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(
    monkeypatch: pytest.MonkeyPatch, terminal: Screen
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    terminal.console = Console(file=io.StringIO(), force_terminal=True, width=100)
    terminal.progress("x", 2, 2, "step", last_line=True)
    assert text(terminal) == "x: step 2/2, took 0 s\n"


def test_a_step_takes_its_median_time() -> None:
    shown = Screen(quiet=True)
    assert shown.seconds_per_step is None
    shown._step_times = [9.0, 1.0, 1.1, 1.2, 1.3]  # the first one has loaded an expert
    assert shown.seconds_per_step == 1.2


def test_a_terminal_gets_whole_words_and_whole_commands(terminal: Screen) -> None:
    terminal.console.width = 30
    terminal.say("  a sentence that is longer than the line", "do: wanflow plan " + 4 * "--flags ")
    first, second, command = text(terminal).splitlines()
    assert (first, second) == ("  a sentence that is longer", "    than the line")
    assert command.startswith("do: wanflow plan --flags") and len(command) > 30


def test_tasks_at_once_share_the_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(screen.time, "monotonic", lambda: now)
    with Screen() as shown:
        for tick in range(100):
            now = 0.1 * tick
            for what in ("denoising", "reading", "copying"):
                shown.progress(what, tick, 100, "bytes")
        now = 10.0
        for what in ("reading", "copying", "denoising"):
            shown.progress(what, 100, 100, "bytes", last_line=what == "denoising")
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 6 and lines[-1].startswith("denoising: ")


def test_nothing_is_printed_where_standard_error_is_closed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", None)
    screen.print_line("a message")
    assert capsys.readouterr().out == ""
