"""The connection between a worker and the gang that it starts."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from wanflow.serve.line import FOLDER, Gang

GANG = """
import os, time
from wanflow.serve.line import WHERE, connected
while not os.path.exists(os.environ["GO"]):
    time.sleep(0.01)
line = connected(os.environ[WHERE])
line.say(say="idle")
line.hear(lambda message: (line.say(say="done", id=message["id"]), os._exit(3)))
"""
GUESS = bytes(16)  # of an answer to the challenge
WAIT_S = 60


@pytest.mark.parametrize("kind", ["in a folder", "no socket has so long a path", "nowhere"])
def test_a_gang_is_heard_wherever_temporary_files_go(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("d" * 100 if kind.startswith("no socket") else "d")
    if kind != "nowhere":
        folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    heard: Queue[Any] = Queue()
    gang = Gang([sys.executable, "-c", GANG], os.environ | {"GO": os.curdir}, heard.put)
    try:
        assert heard.get(timeout=WAIT_S) == {"say": "idle"}
        gang.say(do="make", id="one")
        assert heard.get(timeout=WAIT_S) == {"say": "done", "id": "one"}
        assert heard.get(timeout=WAIT_S) == {"say": "ended", "code": 3}
    finally:
        gang.kill()
    assert not list(folder.glob(f"{FOLDER}*"))


def test_strangers_on_loopback_are_sent_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(socket, "AF_UNIX", raising=False)
    heard: Queue[Any] = Queue()
    go = tmp_path / "go"
    gang = Gang([sys.executable, "-c", GANG], os.environ | {"GO": str(go)}, heard.put)
    place = gang._address
    assert isinstance(place, tuple)
    try:
        for words in (b"", b"GET / HTTP/1.0\r\n\r\n", len(GUESS).to_bytes(4, "big") + GUESS):
            with socket.create_connection(place, WAIT_S) as stranger:
                stranger.sendall(words)
        go.touch()
        assert heard.get(timeout=WAIT_S) == {"say": "idle"}
    finally:
        gang.kill()
    assert heard.get(timeout=WAIT_S)["say"] == "ended"
