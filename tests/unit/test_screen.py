"""Tables and progress: plain and stable where nobody watches, live where somebody does."""

from __future__ import annotations

import io
import os

import pytest
from rich.console import Console

from wanflow import screen
from wanflow.screen import Screen, show_table, table_lines


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "EVERY", 0.0)
    monkeypatch.setattr(screen, "DRAW", 0.0)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """One whose console takes its file for a terminal."""
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
