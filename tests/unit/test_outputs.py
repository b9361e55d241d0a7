"""Outputs: claimed by one run at a time, and named so that every system accepts the name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import datetime
from itertools import islice
from pathlib import Path

import pytest
from helpers.common import refusal

from wanflow.outputs import LONGEST_WORDS, Claims, Taken, automatic_names, refuse_without_room

WHEN = datetime(2026, 11, 23, 21, 45, 7)
LONGEST_ENDING = ".latent.safetensors.01234567.part"
HOLD = """
import sys, time
from pathlib import Path
from wanflow.outputs import Claims
claims = Claims()
claims.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_claimed_name_is_refused_with_its_holder_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with Claims() as ours, Claims() as others:
        ours.take(path)
        ours.take(path)  # it is ours
        others.take(tmp_path / "b.mp4")
        said = refusal(lambda: others.take(path))
        assert f"process {os.getpid()}" in said and "a.mp4.claim" in said
        with pytest.raises(Taken):  # another spelling of the same name
            others.take(tmp_path / "x" / ".." / "a.mp4")
        ours.close()
        others.take(path)
    assert not list(tmp_path.iterdir())


def test_the_claim_of_a_killed_process_blocks_nobody(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with Claims() as claims:
        assert f"process {holder.pid}" in refusal(lambda: claims.take(path))
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert path.with_name("a.mp4.claim").exists()
        claims.take(path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with Claims() as claims:
        (tmp_path / "file").touch()
        for path in (tmp_path / "file" / "a.mp4", Path("/proc/a.mp4")):
            said = refusal(lambda path=path: claims.take(path))
            assert str(path) in said and "choose another folder" in said


def test_a_file_that_only_looks_like_a_claim_is_kept(tmp_path: Path) -> None:
    claim = tmp_path / "a.mp4.claim"
    with Claims() as claims:
        for make in (
            lambda: claim.write_text("a letter"),
            lambda: claim.symlink_to("b"),
            claim.mkdir,
        ):
            make()
            assert "a.mp4" in refusal(lambda: claims.take(tmp_path / "a.mp4"))
            assert claim.is_symlink() or claim.is_dir() or claim.read_text() == "a letter"
            claim.rmdir() if claim.is_dir() else claim.unlink()
        claim.touch()  # of a process that was killed at this very moment
        claims.take(tmp_path / "a.mp4")
        for path in (".", "..", "/"):
            assert "is no name of a new" in refusal(lambda path=path: claims.take(Path(path)))


def test_the_next_free_name_is_claimed(tmp_path: Path) -> None:
    (tmp_path / "1.state").touch()
    names = [(tmp_path / f"{n}.mp4", tmp_path / f"{n}.state") for n in range(1, 9)]
    with Claims() as first, Claims() as second, Claims() as third:
        second.take(names[2][1])
        assert first.take_free(iter(names)) == names[1][0]
        assert third.take_free(iter(names)) == names[3][0]
        first.take(names[2][0])  # it was not kept where only a part of a group was free
    assert [path.name for path in tmp_path.iterdir()] == ["1.state"]


def test_a_full_disk_is_refused_beforehand(tmp_path: Path) -> None:
    refuse_without_room(tmp_path / "new" / "a", 1, "it")
    said = refusal(lambda: refuse_without_room(tmp_path / "a", 10**18, "the model"))
    assert "the model needs 1000000" in said and "free" in said


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("A red circle", "_a-red-circle"),
        ("一个红色的圆在移动", "_一个红色的圆在移动"),
        ("Красный круг", "_красный-круг"),
        ("लाल घेरा", "_लाल-घेरा"),
        ("red 🙂\u202e circle", "_red-circle"),
        ("", ""),
        ('a/b:c*?<>|"\\\0\n..', "_a-b-c"),
        ("Cafe\u0301  ÜBER", "_café-über"),
        ("x" * 10_000, "_" + "x" * 50),
        ("圆" * 100, "_" + "圆" * 40),
        ("con", "_con"),
        ("y" * 49 + " z", "_" + "y" * 49),
        ("\udce9", ""),
    ],
)
def test_automatic_names(prompt: str, words: str, tmp_path: Path) -> None:
    made = automatic_names("t2v-A14B", (1280, 720), prompt, 7, WHEN, ".mp4")
    first, second, third = islice(made, 3)
    assert first.name == f"t2v-A14B_1280x720{words}_seed7_20261123-214507.mp4"
    assert (second.stem, third.stem) == (f"{first.stem}-2", f"{first.stem}-3")
    (tmp_path / f"{second.stem}{LONGEST_ENDING}").touch()


def test_the_longest_name_leaves_room_for_its_endings() -> None:
    for letter in ("圆", "x", "\U00020000", "ä"):
        (name,) = islice(
            automatic_names("t2v-A14B", (16384, 16384), letter * 999, 2**63, WHEN, ".mp4"), 1
        )
        assert len(f"{name.stem}-9999{LONGEST_ENDING}".encode()) <= 255
        assert len(name.stem.encode()) > LONGEST_WORDS / 3
