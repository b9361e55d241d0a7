"""`wanflow generate --preview`: the file, when it stays, and pictures in a terminal."""

from __future__ import annotations

import base64
import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers.common import PROMPT
from PIL import Image

from wanflow import preview
from wanflow.cli import main
from wanflow.cli.previewing import COLUMNS, ROWS, cells, iterm, kitty, protocol_of
from wanflow.pipeline import Progress
from wanflow.preview import Previewer

MAKE = ["generate", "--ckpt_dir", "nano", "--device", "cpu", "--prompt", PROMPT, "--seed", "3"]
MAKE += ["--sample_steps", "4", "--frame_num", "5", "--save_file"]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of the pictures that are there after each step, each step drawn."""
    found: list[list[str]] = []
    draw = Previewer.__call__

    def drawn(self: Previewer, progress: Progress) -> None:
        draw(self, progress)
        self.close()
        found.append(
            [file.name for pattern in ("*.png", "*.webp") for file in Path().glob(pattern)]
        )

    monkeypatch.setattr(Previewer, "__call__", drawn)
    monkeypatch.setattr(preview, "EVERY", 0.0)
    return found


def test_an_unnamed_preview_goes_with_the_run(
    seen: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*MAKE, "a.mp4", "--preview"]) == 0
    assert seen == [["a.preview.png"]] * 4
    assert [file.name for file in Path().iterdir()] == ["a.mp4"]
    assert "preview a.preview.png" in capsys.readouterr().err


def test_a_named_preview_stays(seen: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    for video in ("a.mp4", "b.mp4"):
        assert main([*MAKE, video, "--preview", "look.webp", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["preview"] == "look.webp"
    assert seen == [["look.webp"]] * 8
    with Image.open("look.webp") as picture:
        assert getattr(picture, "n_frames", 1) == 2
    assert sorted(file.name for file in Path().iterdir()) == ["a.mp4", "b.mp4", "look.webp"]


def test_what_is_no_preview_is_refused_first(capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save("photo.png")
    before = Path("photo.png").read_bytes()
    for name, said in (
        ("photo.png", "no preview"),
        ("a.gif", ".webp"),
        ("photo.png/a.png", "file"),
    ):
        assert main([*MAKE, "a.mp4", "--preview", name]) == 2
        shown = capsys.readouterr().err
        assert name in shown and said in shown and "seed" not in shown
    assert Path("photo.png").read_bytes() == before
    assert [file.name for file in Path().iterdir()] == ["photo.png"]


def test_a_run_that_stops_keeps_its_preview_and_goes_on_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = Previewer.__call__

    def interrupted(self: Previewer, progress: Progress) -> None:
        draw(self, progress)
        self.close()
        if progress.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Previewer, "__call__", interrupted)
    assert main([*MAKE, "a.mp4", "--preview"]) == 130
    assert Path("a.preview.png").exists()
    said = capsys.readouterr().err
    assert "--preview auto" in said
    monkeypatch.setattr(Previewer, "__call__", draw)
    resume = ["generate", "--resume", "a.latent.safetensors", "--save_file", "a.mp4"]
    assert main([*resume, "--preview", "auto"]) == 0
    assert [file.name for file in Path().iterdir()] == ["a.mp4"]


def in_a_terminal(words: list[str], **environ: str) -> str:
    """Run a command with a terminal of 100 columns as its standard error; return what that got."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, True)
    shown = bytearray()

    def read() -> None:
        while True:
            try:
                data = os.read(ours, 1 << 16)
            except OSError:  # the other side is closed
                return
            if not data:
                return
            shown.extend(data)

    thread = threading.Thread(target=read)
    env = {name: text for name, text in os.environ.items() if name not in ("TMUX", "TERM_PROGRAM")}
    env |= {"COLUMNS": "100", "LINES": "40", **environ}
    thread.start()
    try:
        subprocess.run(
            [sys.executable, "-m", "wanflow", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=theirs,
            env=env,
            check=True,
            timeout=300,
        )
    finally:
        os.close(theirs)
        thread.join(60)
        os.close(ours)
    return shown.decode()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pty")
def test_a_terminal_of_kitty_shows_pictures_above_the_bars() -> None:
    shown = in_a_terminal([*MAKE, "a.mp4", "--preview"], TERM="xterm-kitty")
    pictures = re.findall(
        r"\x1b_Ga=T,[^\x1b]*m=1;.*?m=0;[^\x1b]*\x1b\\|\x1b_Ga=T,[^\x1b]*m=0;[^\x1b]*\x1b\\",
        shown,
        re.S,
    )
    assert 2 <= len(pictures) <= 4  # of the first step and the last one, and what time allows
    for picture in pictures:
        text = "".join(re.findall(r"m=[01];([^\x1b]*)", picture))
        with Image.open(io.BytesIO(base64.b64decode(text))) as opened:
            assert opened.size == (2 * 64 + preview.GAP, 64)
    assert shown.rindex("denoising") > shown.rindex("\x1b_G")
    assert not Path("a.preview.png").exists()


def test_no_pictures_in_a_file_and_none_for_programs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert protocol_of({"TERM": "xterm-kitty"}) is kitty
    assert protocol_of({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}) is iterm
    assert protocol_of({"TERM": "screen-256color", "TERM_PROGRAM": "iTerm.app"}) is None
    assert protocol_of({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux"}) is None
    assert protocol_of({"TERM": "xterm-256color"}) is None and protocol_of({}) is None
    monkeypatch.setenv("TERM", "xterm-kitty")
    for flag in ("--quiet", "--json", "--verbose"):
        assert main([*MAKE, "a.mp4", "--preview", "--overwrite", flag]) == 0
        shown = capsys.readouterr()
        assert "\x1b" not in shown.out + shown.err


def test_the_cells_of_a_picture() -> None:
    assert cells(1292, 180, 80) == (80, 6)
    assert cells(1292, 180, 500) == (COLUMNS, 7)
    assert cells(180, 320, 500) == (13, ROWS)
    assert cells(64, 6400, 80) == (1, 50)
    data = b"\x89PNG" * 4000
    sent = kitty(data, 80, 6)
    commands = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", sent)
    assert all(len(text) <= 4096 for _, text in commands)
    assert [keys[-1] for keys, _ in commands] == ["1"] * (len(commands) - 1) + ["0"]
    assert base64.b64decode("".join(text for _, text in commands)) == data
    assert "c=80,r=6" in commands[0][0] and all("c=" not in keys for keys, _ in commands[1:])
    inline = re.fullmatch(r"\x1b\]1337;File=([^:]*):([^\x07]*)\x07", iterm(data, 80, 6))
    assert inline is not None and base64.b64decode(inline[2]) == data
    assert inline[1].split(";")[:4] == ["inline=1", "size=16000", "width=80", "height=6"]


def test_each_video_of_a_list_has_its_preview(seen: list[list[str]]) -> None:
    words = [*MAKE[: MAKE.index("--seed")], "--seeds", "1,2", "--sample_steps", "2"]
    assert main([*words, "--frame_num", "5", "--preview", "look.png"]) == 0
    assert len(seen) == 4 and all("look.png" in names for names in seen)
    assert Path("look.png").exists() and len(list(Path().rglob("*.mp4"))) == 2
