"""Servers that nobody should trust: any answer costs one line, and secrets stay home."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.answers import Answer, server
from helpers.hub import REPO, Hub
from PIL import Image

from wanflow import cli, extend
from wanflow.checkpoint.ledger import LEDGER, Ledger
from wanflow.config import RequestError
from wanflow.download import hubs, transfer
from wanflow.download.transfer import RemoteFile
from wanflow.pictures import open_picture

VAE = "Wan2.1_VAE.pth"
DATA = bytes(range(250)) * 400
PART = f"{VAE}.{hashlib.sha256(DATA).hexdigest()[:12]}.part"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses, and nothing of this machine's settings."""
    monkeypatch.setattr(transfer, "PAUSES", (0.01,))
    monkeypatch.setattr(hubs, "PAUSES", (0.01,))
    for name in ("HF_ENDPOINT", "HF_TOKEN", "DASH_API_KEY", "DASH_API_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub({REPO: {VAE: DATA}}) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "weights"


def run(hub: Hub | str, folder: Path, *more: str) -> int:
    """`wanflow download` of the VAE; its exit code."""
    url = hub if isinstance(hub, str) else hub.url
    command = ["download", "--only", "vae", "--endpoint", url, "--local_dir", str(folder)]
    return cli.main([*command, *more])


def errors(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


ENTRY = {"type": "file", "path": VAE, "size": 5, "oid": "1" * 40}
COMMIT = json.dumps({"id": REPO, "sha": "c" * 40}).encode()


def listing(body: bytes, **headers: str) -> Callable[[str], Answer]:
    return lambda path: Answer(body, headers=headers) if "/tree/" in path else Answer(COMMIT)


def refuses(
    answers: Callable[[str], Answer], folder: Path, capsys: pytest.CaptureFixture[str]
) -> str:
    with server(answers) as (url, _):
        assert run(url, folder) in (1, 2)
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1 and "Traceback" not in text
    assert not folder.exists()
    return text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("size", value) for value in ("5", None, 5.0, True, -1, 2**63, [], 1e300)),
        *(("path", value) for value in (5, None, "a\ud800", ["a"], "x" * 5000, "a\x1b[2J")),
        *(("oid", value) for value in (5, None, "../../x", "")),
        *(("lfs", value) for value in ({"oid": 5}, {"oid": "../x"}, "text", {})),
        ("type", None),
    ],
)
def test_a_listing_of_other_types(
    key: str, value: object, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if (key, value) == ("lfs", {}):
        pytest.skip("an empty object is as good as none")
    text = refuses(listing(json.dumps([{**ENTRY, key: value}]).encode()), folder, capsys)
    assert "\x1b" not in text


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 200_000,
        b"[5]",
        b"{}",
        b"5",
        b"null",
        b"[NaN]",
        b"\xff\xfe",
        b"",
        b'[{"type": "file"}]',
    ],
)
def test_a_listing_of_another_form(
    body: bytes, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refuses(listing(body), folder, capsys)


@pytest.mark.parametrize("sha", [None, 5, [], "../..", "x" * 5000, "a b"])
def test_a_commit_of_another_form(
    sha: object, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answers(path: str) -> Answer:
        return Answer(json.dumps({"sha": sha}).encode() if "/tree/" not in path else b"[]")

    refuses(answers, folder, capsys)


def test_the_token_follows_no_next_page_to_another_server(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with server(lambda path: Answer(b"[]")) as (other, stolen):
        link = f'<{other}/api/models/o/r/tree/x>; rel="next"'
        answers = listing(json.dumps([ENTRY]).encode(), Link=link)
        with server(answers) as (url, _):
            assert run(url, folder, "--token", "secret", "--dry_run") == 2
        assert not stolen
    assert "on another server" in errors(capsys)


def test_a_vision_model_sees_the_pictures() -> None:
    first, last = (
        open_picture(np.full((2000, 1000, 3), value, np.uint8), "image") for value in (40, 200)
    )
    with server(lambda path: Answer(content("the light comes on"))) as (url, asked):
        ask = partial(extend.extend, "morning", "en", None, url, "secret")
        assert ask(pictures=[first, last]) == "the light comes on" == ask()
    with_pictures, without = (json.loads(one.body) for one in asked)
    assert (with_pictures["model"], without["model"]) == ("qwen-vl-max", "qwen-plus")
    assert without["messages"][1]["content"] == "morning"
    assert with_pictures["messages"][0] != without["messages"][0]
    *shown, text = with_pictures["messages"][1]["content"]
    assert text == {"type": "text", "text": "morning"}
    for one, value in zip(shown, (40, 200), strict=True):
        kind, _, data = one["image_url"]["url"].partition(",")
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert (kind, image.size) == ("data:image/jpeg;base64", (512, 1024))
        assert abs(int(np.asarray(image).mean()) - value) < 3


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_the_token_follows_no_redirect_to_another_server(status: int, folder: Path) -> None:
    with Hub({REPO: {VAE: DATA}}) as other:
        to_other = lambda path: Answer(b"", status, {"Location": other.url + path})  # noqa: E731
        with server(to_other) as (url, asked):
            assert run(url, folder, "--token", "secret") == 0
        assert {one.authorization for one in asked} == {"Bearer secret"}
        assert other.log and {one.token for one in other.log} == {None}


def test_redirects_and_pages_without_end(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuses(lambda path: Answer(b"", 302, {"Location": path}), folder, capsys)
    body = json.dumps([ENTRY]).encode()

    def pages(path: str) -> Answer:
        if "/tree/" not in path:
            return Answer(COMMIT)
        return Answer(body, headers={"Link": f'<{path}>; rel="next"'})

    assert "more than 100 pages" in refuses(pages, folder, capsys)


def test_answers_without_end(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hubs, "LISTING_BYTES", 1 << 20)

    def endless(block: bytes, pause: float, head: bytes) -> Callable[[str], Answer]:
        def write(handler: Any) -> None:
            handler.wfile.write(head)
            while True:
                handler.wfile.write(block)
                time.sleep(pause)

        return lambda path: Answer(write=write)

    ok = b"HTTP/1.1 200 OK\r\n"
    assert "longer than" in refuses(endless(b" " * 9999, 0, ok + b"\r\n"), folder, capsys)
    monkeypatch.setattr(hubs, "ANSWER_SECONDS", 1.0)
    assert "in 1 s" in refuses(endless(b" ", 0.05, ok + b"\r\n"), folder, capsys)
    assert "in 1 s" in refuses(endless(b"x", 0.05, ok + b"X: "), folder, capsys)
    silent = lambda path: Answer(write=lambda handler: time.sleep(5))  # noqa: E731
    assert "in 1 s" in refuses(silent, folder, capsys)


def test_a_retry_after_that_is_no_number(hub: Hub, folder: Path) -> None:
    stream = transfer._Stream(RemoteFile(VAE, VAE, REPO, 5, None), io.BytesIO(), lambda count: None)
    busy = lambda path: Answer(b"", 429, {"Retry-After": "\xb2"})  # noqa: E731
    with server(busy) as (url, _):
        stream.remote = dataclasses.replace(stream.remote, url=url)
        assert stream.request(threading.Event()) == (0.0, "the server answered 429")


def test_a_file_whose_head_trickles_is_given_up(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "HEAD_SECONDS", 0.3)

    def write(handler: Any) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        for _ in range(100):
            handler.wfile.write(b"x")
            time.sleep(0.05)

    def answers(path: str) -> Answer:
        if "/resolve/" in path:
            return Answer(write=write)
        return listing(json.dumps([ENTRY]).encode())(path)

    with server(answers) as (url, _):
        assert run(url, folder) == 1
    assert "did not answer" in errors(capsys)


def test_a_file_that_trickles_is_given_up(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "SLOWEST", 1e9)
    monkeypatch.setattr(transfer, "WINDOW", 0.02)
    hub.fault(VAE, "slow", 0.05, -1)
    assert run(hub, folder) == 1
    assert "without progress (fewer than" in errors(capsys)


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="this system cannot refuse links")
def test_a_planted_link_is_not_followed(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    planted = folder / PART
    planted.parent.mkdir(parents=True)
    planted.symlink_to(precious)
    assert run(hub, folder) == 1
    planted.unlink()
    os.mkfifo(planted)
    assert run(hub, folder) == 1
    assert "Traceback" not in errors(capsys) and precious.read_text() == "mine"


@pytest.mark.parametrize(
    "more",
    [
        *(
            ["--endpoint", url]
            for url in (
                "http://[::1",
                "http://127.0.0.1:abc",
                "http://\u2025.com",
                "http://127.0.0.1:9\n",
                "http://127.0.0.1:99999",
                "ftp://127.0.0.1",
                "http://",
                "http://" + "a" * 5000,
            )
        ),
        ["--token", "two\nlines"],
        ["--token", "caf\xe9"],
        ["--revision", "x" * 5000],
        ["--repo", "x" * 5000],
        ["--repo", "a/b\x1b"],
        ["--local_dir", "~no-such-user-here/x"],
    ],
)
def test_words_that_no_server_takes(
    more: list[str], hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(hub, folder, *more) == 2
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1 and text.strip().isprintable() and len(text) < 1000


def test_a_dry_run_without_a_network(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("http://127.0.0.1:9", folder, "--dry_run") == 0
    shown = capsys.readouterr()
    text = shown.out + shown.err
    assert "508 MB  vae" in text and "508 MB in all" in text and not folder.exists()


def test_a_ledger_that_names_files_elsewhere(hub: Hub, folder: Path) -> None:
    assert run(hub, folder) == 0
    ledger = json.loads((folder / LEDGER).read_text())
    entry = ledger["files"][VAE]
    for name in ("../outside", "/etc/passwd", "a\\..\\b", "a//b"):
        ledger["files"][name] = entry
    ledger["files"]["numbers"] = {"sha256": 5, "size": "5"}
    (folder / LEDGER).write_text(json.dumps(ledger))
    assert set(Ledger(folder).entries) == {VAE}
    assert run("http://127.0.0.1:9", folder, "--verify") == 0


# the server that extends prompts


def extended(url: str, key: str | None = "secret", seconds: float = 5.0) -> str:
    return extend.extend("a red circle", "en", None, url, key, seconds)


def content(text: object) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def test_a_server_on_this_machine_is_asked_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with server(lambda path: Answer(content("a red circle moves"))) as (url, _):
        assert extended(url) == "a red circle moves"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_follows_no_redirect(status: int, caplog: pytest.LogCaptureFixture) -> None:
    with server(lambda path: Answer(content("stolen"))) as (other, stolen):
        away = lambda path: Answer(b"", status, {"Location": other + path})  # noqa: E731
        with server(away) as (url, asked):
            assert extended(url) == "a red circle"
        assert [one.authorization for one in asked] == ["Bearer secret"] and not stolen
    assert "not extended" in caplog.text


@pytest.mark.parametrize(
    "answer",
    [
        Answer(write=lambda handler: handler.wfile.write(b"garbage\r\n\r\n")),
        Answer(content("x")[:-5], headers={"Content-Length": "999"}),
        Answer(content("x"), headers={"X": "y" * 70_000}),
        Answer(b"[" * 100_000),
        Answer(b" " * (2 << 20)),
        Answer(content("x" * 10_000)),
        Answer(content("\ud800")),
        Answer(content(5)),
        Answer(content("  ")),
        Answer(b'{"choices": 5}'),
        Answer(content("x"), 500),
    ],
)
def test_an_answer_of_another_form_leaves_the_prompt(
    answer: Answer, caplog: pytest.LogCaptureFixture
) -> None:
    with server(lambda path: answer) as (url, _):
        assert extended(url) == "a red circle"
    assert "not extended" in caplog.text and len(caplog.text) < 1000


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "])
def test_an_answer_that_trickles_ends(head: bytes, caplog: pytest.LogCaptureFixture) -> None:
    def write(handler: Any) -> None:
        handler.wfile.write(head)
        while True:
            handler.wfile.write(b" ")
            time.sleep(0.05)

    with server(lambda path: Answer(write=write)) as (url, _):
        begin = time.monotonic()
        assert extended(url, seconds=0.5) == "a red circle"
        assert time.monotonic() - begin < 60  # it has no end of its own
    assert "in 0 s" in caplog.text


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:x", "http://127.0.0.1:9/a b", "file:///etc", "x"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(RequestError, match="not the address of a server"):
        extended(url)


def test_a_key_that_is_none_is_refused() -> None:
    with pytest.raises(RequestError, match="DASH_API_KEY"):
        extended("http://127.0.0.1:9", "two\nlines")
