"""Broken requests by the thousand: each is answered, none by a fault of the server.

WANFLOW_FUZZ=20000 asks for more of them.
"""

from __future__ import annotations

import json
import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import schemathesis
import uvicorn
from helpers.serving import FakeWorker, Serving, wait_for
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient

from wanflow.serve.fields import FIELDS, NOTHING, WRAPPERS
from wanflow.serve.http import DOCUMENT

COUNT = int(os.environ.get("WANFLOW_FUZZ", "5000"))
LONGEST_S = 60.0  # for any answer
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**200, 1e308, -0.0, 0.5, "", " ", "0", "-1",
    "1e999",
    "nan", "NaN", "\0", "\ud800", "\u202e", "💥" * 40, "x" * 6000, "../../etc/passwd", "64*64",
    "64x64", "0x0", "99999999999x1", "-64x64", "٣", [], {}, [[]], {"a": {}}, [None], {"name": "x"},
    {"image_url": "http://127.0.0.1/"}, {"image_url": "data:image/png;base64,iVBORw0KGgo="},
    {"file_id": "0" * 64}, "data:image/gif;base64,R0lGODlhAQABAAAAACw=", "data:,", "{", '{"a":1}',
    "[" * 70,
]  # fmt: skip


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    serving = Serving(tmp_path, max_queue=1_000_000)
    with serving.client(raise_server_exceptions=False) as client:
        yield client


def answered(client: TestClient, method: str, path: str, **options: Any) -> int:
    began = time.monotonic()
    answer = client.request(method, path, **options)
    assert time.monotonic() - began < LONGEST_S, (method, path)
    assert answer.status_code < 500, (method, path, options, answer.text[:300])
    assert "Traceback" not in answer.text
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    return int(answer.status_code)


def mutated(random: random.Random, body: bytes) -> bytes:
    """Return a body with a few bytes cut, doubled, turned or put in."""
    data = bytearray(body)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(data) + 1)
        match random.randrange(5):
            case 0:
                del data[at : at + random.randint(1, 12)]
            case 1:
                data[at:at] = data[at : at + random.randint(1, 40)]
            case 2:
                data[at:at] = random.choice(
                    [b"\0", b"\xff", b'"', b"{", b"]", b"\r\n", b"--x", b"--x--", b":", b"\\ud800"]
                )
            case 3 if at < len(data):
                data[at] = random.randrange(256)
            case _:
                del data[at:]
    return bytes(data)


def fields(random: random.Random) -> dict[str, Any]:
    names = [*FIELDS, *NOTHING, *WRAPPERS, "unknown", "constructor", "__proto__", ""]
    chosen = {name: random.choice(ODD) for name in random.sample(names, random.randint(1, 4))}
    return chosen if random.random() < 0.3 else {"prompt": "a red circle"} | chosen


def form(values: dict[str, Any]) -> bytes:
    parts = []
    for name, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value)
        extra = '; filename="a.png"' if isinstance(value, list) else ""
        parts.append(f'--x\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n{text}')
    return "\r\n".join([*parts, "--x--\r\n"]).encode(errors="surrogatepass")


@pytest.mark.slow
def test_broken_bodies(client: TestClient) -> None:
    rng = random.Random(20261129)
    statuses: dict[int, int] = {}
    for _ in range(COUNT):
        values = fields(rng)
        as_form = rng.random() < 0.5
        body = form(values) if as_form else json.dumps(values).encode()
        body = body if rng.random() < 0.4 else mutated(rng, body)
        kind = "multipart/form-data; boundary=x" if as_form else "application/json"
        if rng.random() < 0.03:
            kind = rng.choice(["", "text/plain", "multipart/form-data", kind.replace("x", "\xe9")])
        headers = {"content-type": kind.encode("latin-1")}
        if rng.random() < 0.1:
            headers["idempotency-key"] = rng.choice([b"a", b"", b"\xff", b"k" * 300])
        status = answered(client, "POST", "/v1/videos", content=body, headers=headers)
        statuses[status] = statuses.get(status, 0) + 1
    # The net has both kinds of fish in it.
    assert statuses[400] > COUNT // 4 and statuses[200] > COUNT // 100, statuses


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """Serve an application on loopback, from a thread."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", access_log=False))
        thread = Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
        thread.start()
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{place.getsockname()[1]}"
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.slow
def test_the_document_by_schemathesis(tmp_path: Path) -> None:
    serving = Serving(tmp_path, max_queue=1_000_000)
    document = json.loads(DOCUMENT.read_text("utf-8"))
    del document["paths"]["/v1/events"]  # which has no end
    schema = schemathesis.openapi.from_dict(document)
    answers: dict[str, set[int]] = {}

    def check(case: schemathesis.Case) -> None:
        response = case.call(base_url=base, timeout=LONGEST_S)
        case.validate_response(response, checks=CHECKS)
        assert b"Traceback" not in response.content
        answers.setdefault(f"{case.method} {case.path}", set()).add(response.status_code)

    with FakeWorker(serving), listening(serving.app) as base:
        for found in schema.get_all_operations():

            @BUDGET
            @given(found.ok().as_strategy())
            def ask(case: schemathesis.Case) -> None:
                check(case)

            ask()
    assert len(answers) >= 15
    assert {200, 400} <= answers["POST /v1/videos"], answers


CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]
BUDGET = settings(
    max_examples=max(10, COUNT // 250),
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
