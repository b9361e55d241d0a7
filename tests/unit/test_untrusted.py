"""What strangers wrote: only regular files, bounded, and printed harmlessly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wanflow.config import RequestError
from wanflow.untrusted import (
    JSON_DEPTH,
    check_regular,
    open_regular,
    parse_json,
    printable,
    read_bytes,
    user_path,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mred\x07", "a\ufffd[31mred\ufffd"),
        ("two\nlines\tof text", "two lines of text"),
        ("\ud800 \u202eright to left", "\ufffd \ufffdright to left"),
        ("红色的圆 ok", "红色的圆 ok"),
    ],
)
def test_text_is_shown_without_control_characters(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()


def test_long_text_is_cut() -> None:
    assert printable("x" * 1000, 10) == "xxxxxxx..."


@pytest.mark.parametrize("path", ["~no-such-user-here/x", "a\0b"])
def test_unusable_paths_are_refused(path: str) -> None:
    with pytest.raises(RequestError, match="path"):
        user_path(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        for refuse in (open_regular, check_regular):
            with pytest.raises(RequestError, match="give a"):
                refuse(path)
    for name in ("missing", "x" * 300, "a\0b"):
        with pytest.raises(RequestError, match="read|no such"):
            open_regular(tmp_path / name)


def test_a_longer_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert read_bytes(file, 5) == b"12345"
    with pytest.raises(RequestError, match="more than 4 bytes"):
        read_bytes(file, 4)


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"\xff", b"{", b"[NaN]", b"1" * 9999, b"[" * 65 + b"]" * 65]
)
def test_bad_json_is_refused(text: bytes) -> None:
    with pytest.raises(RequestError, match="source"):
        parse_json(text, "source")


def test_good_json_is_read() -> None:
    assert parse_json(b'{"a": [1, 2.5, null]}', "source") == {"a": [1, 2.5, None]}
    deep = "[" * (JSON_DEPTH - 1) + "]" * (JSON_DEPTH - 1)
    assert parse_json(deep, "source")
