"""`wanflow serve` as its users have it: real processes, nano, and a client that is not ours."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers.serving import wait_for

from wanflow.cli.serve import check_serve, environment
from wanflow.config import RequestError
from wanflow.serve.supervise import listen

PROMPT = "a red circle moves left on a blue background"


class Server:
    """A server of its own, on a port of its own."""

    def __init__(self, folder: Path, *words: str, port: int = 0) -> None:
        command = [sys.executable, "-m", "wanflow", "serve", "--ckpt_dir", "nano"]
        command += ["--port", str(port), "--data_dir", str(folder), *words]
        self.log = folder.with_suffix(".log")
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stderr=log, start_new_session=True)
        found = wait_for(lambda: re.search(r"127\.0\.0\.1:(\d+)", self.log.read_text()))
        self.port = int(found[1])

    def ask(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with suppress(OSError, http.client.HTTPException):
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        return 0, {}

    def ready(self) -> None:
        wait_for(lambda: self.ask("GET", "/readyz")[0] == 200)

    def ended(self, id: str) -> dict[str, Any]:
        def look() -> Any:
            video = self.ask("GET", f"/v1/videos/{id}")[1]
            return video.get("status") in ("completed", "failed", "cancelled") and video

        return dict(wait_for(look))

    def children(self) -> list[int]:
        """The processes of this server, in /proc: itself is not among them."""
        return descendants(self.process.pid)


def descendants(pid: int) -> list[int]:
    found, parents = [], {pid}
    table = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            table[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    while parents:
        parents = {child for child, parent in table.items() if parent in parents}
        found += sorted(parents)
    return found


def lives(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def of(pids: list[int], words: str) -> int:
    """The process whose command line has these words."""
    for pid in pids:
        with suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            if words in line:
                return pid
    raise AssertionError(f"no process of {words}")


@contextmanager
def serving(folder: Path, *words: str, port: int = 0) -> Iterator[Server]:
    server = Server(folder, *words, port=port)
    try:
        yield server
    finally:
        pids = [server.process.pid, *server.children()]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.process.wait(60)


@pytest.mark.slow
def test_the_openai_client_makes_a_video(tmp_path: Path) -> None:
    import warnings

    warnings.simplefilter("ignore", DeprecationWarning)
    import openai

    with serving(tmp_path / "data") as server:
        server.ready()
        base = f"http://127.0.0.1:{server.port}/v1"
        with openai.OpenAI(base_url=base, api_key="unused", max_retries=0) as client:
            few = {"num_inference_steps": 3}
            video = client.videos.create_and_poll(
                prompt=PROMPT, model="nano", seconds="1", size="64x64", extra_body=few,
                poll_interval_ms=200,
            )  # fmt: skip
            assert video.status == "completed" and video.progress == 100, video
            assert video.seconds == "1.125" and video.size == "64x64"
            data = client.videos.download_content(video.id).read()
            assert data[4:8] == b"ftyp"
            recipe = server.ask("GET", f"/v1/videos/{video.id}/recipe")[1]
            assert recipe["request"]["prompt"] == PROMPT
            assert recipe["request"]["sample_steps"] == 3
            for variant in ("thumbnail", "spritesheet"):
                picture = client.videos.download_content(video.id, variant=variant).read()
                assert picture[:4] == b"RIFF" and picture[8:12] == b"WEBP"
            second = client.videos.create(prompt=PROMPT, extra_body=few)
            assert second.status in ("queued", "in_progress")
            assert [one.id for one in client.videos.list(limit=1)] == [second.id, video.id]
            for id in (second.id, video.id):
                gone = client.videos.delete(id)
                assert gone.deleted and gone.object == "video.deleted" and gone.id == id
            with pytest.raises(openai.NotFoundError):
                client.videos.retrieve(video.id)
            with pytest.raises(openai.BadRequestError, match="4n\\+1"):
                client.videos.create(prompt=PROMPT, extra_body={"num_frames": 8})
        # Beside the client: the recipe, a waiting request, and a client that goes away.
        assert server.ask("GET", f"/v1/videos/{video.id}/recipe")[0] == 404
        body = {"prompt": PROMPT, "num_inference_steps": 100, "num_frames": 81}
        text = json.dumps(body)
        with socket.create_connection(("127.0.0.1", server.port)) as leaving:
            head = (
                f"POST /v1/videos/sync HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(text)}"
            )
            leaving.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n{text}".encode())
            id = wait_for(lambda: server.ask("GET", "/v1/videos")[1].get("data"))[0]["id"]
        assert server.ended(id)["status"] == "cancelled"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(120) == 0
        assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_what_dies_is_started_again_and_nothing_outlives_the_server(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as server:
        server.ready()
        body = {"prompt": PROMPT, "num_inference_steps": 40, "num_frames": 5, "seed": 1}
        id = server.ask("POST", "/v1/videos", body)[1]["id"]
        wait_for(lambda: server.ask("GET", f"/v1/videos/{id}")[1].get("step"))
        os.kill(of(server.children(), "wanflow.serve.child"), signal.SIGKILL)
        wait_for(lambda: server.ask("GET", "/healthz")[0] == 200)
        os.kill(of(server.children(), "wanflow worker"), signal.SIGKILL)
        video = server.ended(id)
        assert video["status"] == "completed", video
        second = subprocess.run(
            [sys.executable, "-m", "wanflow", "serve", "--ckpt_dir", "nano", "--data_dir",
             str(tmp_path / "data"), "--port", "0"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert second.returncode == 2 and "another" in second.stderr, second.stderr
        # HTTP, worker and gang, also where the job was done before its worker was killed.
        wait_for(lambda: len(server.children()) >= 3)
        pids = server.children()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(60)
        wait_for(lambda: not any(map(lives, pids)))
        with serving(tmp_path / "data", port=server.port) as again:
            again.ready()
            assert again.ask("GET", f"/v1/videos/{id}")[1]["status"] == "completed"


# Settings


def settings(**given: Any) -> argparse.Namespace:
    names = (
        "ckpt_dir", "host", "port", "token", "data_dir", "db", "gpus", "high", "low", "dit", "t5",
        "vae", "tokenizer",
    )  # fmt: skip
    return argparse.Namespace(**{**dict.fromkeys(names), "no_worker": False, **given})


def test_the_environment_fills_in_what_flags_leave_open(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PORT": "9000", "HOST": "0.0.0.0", "TOKEN": "t", "DATA_DIR": "d"}.items():
        monkeypatch.setenv(f"WANFLOW_{name}", value)
    args = settings(ckpt_dir="nano", port=7)
    environment(args)
    assert (args.port, args.host, args.token, args.data_dir) == (7, "0.0.0.0", "t", Path("d"))
    monkeypatch.setenv("WANFLOW_PORT", "x")
    with pytest.raises(RequestError, match="WANFLOW_PORT must be a whole number"):
        environment(settings(ckpt_dir="nano"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"host": "0.0.0.0"}, "set a token"),
        ({"host": "::"}, "set a token"),
        ({"token": "a b"}, "visible ASCII"),
        ({"token": "sch\xf6n"}, "visible ASCII"),
        ({"ckpt_dir": None}, "serve needs --ckpt_dir"),
    ],
)
def test_servers_that_should_not_be(given: dict[str, Any], words: str) -> None:
    args = settings(**{"ckpt_dir": "nano", "host": "127.0.0.1", "token": "", **given})
    with pytest.raises(RequestError, match=words):
        runtime_defaults(args)
        check_serve(args)


def runtime_defaults(args: argparse.Namespace) -> None:
    from wanflow.cli import command_parser

    for name, value in vars(command_parser("serve").parse_args([])).items():
        if not hasattr(args, name):
            setattr(args, name, value)


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanflow.serve.supervise.PORT_S", 0.0)
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(RequestError, match=f"--port {port}"):
            listen("127.0.0.1", port)
    with pytest.raises(RequestError, match="--host no.such.host.invalid"):
        listen("no.such.host.invalid", 0)
