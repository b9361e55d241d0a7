"""Answers of servers that nobody should trust: hubs with weights, and a server of chat answers."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

from helpers.answers import Answer, Asked, server
from helpers.fuzz import Misbehaviour
from helpers.mutations import NAMES, VALUES, dump, nested, of_bytes, of_value
from helpers.strangers import Attempt, command
from wanflow import extend
from wanflow.download import hubs, transfer

RUNNING = ExitStack()  # the servers, which end with the process
SECRET = "secret-of-a-user"
FILES = {"Wan2.1_VAE.pth": b"v" * 3000, "google/umt5-xxl/tokenizer.json": b"{}" * 50}
COMMIT = "c" * 40
LISTING = [
    {"type": "directory", "path": "google", "oid": "0" * 40, "size": 0},
    *(
        {
            "type": "file",
            "path": name,
            "size": len(data),
            "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
        }
        for name, data in FILES.items()
    ),
]
LISTING[1]["lfs"] = {
    "oid": hashlib.sha256(FILES["Wan2.1_VAE.pth"]).hexdigest(),
    "size": 3000,
    "pointerSize": 130,
}
STATUSES = (
    200,
    200,
    200,
    204,
    206,
    301,
    302,
    307,
    308,
    400,
    401,
    403,
    404,
    416,
    429,
    500,
    503,
    999,
)
PATHS = (
    "../x",
    "/etc/passwd",
    "a/../../x",
    "x" * 300,
    "a\\b",
    "a\x1b[2Jb",
    ".",
    "",
    "a\ud800",
    "C:x",
)


def odd_headers(rng: Random, urls: list[str]) -> dict[str, str]:
    """Headers that a client acts on, with a value that it should not act on blindly."""
    target = rng.choice((*urls, "http://[::1", "//", "/x", "ftp://x/", "http://x:99999/", "\xb2"))
    link = rng.choice((f'<{target}>; rel="next"', f"<{target}", '; rel="next"', "<>;;,,=", target))
    known = {
        "Location": target,
        "Link": link,
        "Retry-After": rng.choice(
            ("0", "\xb2", "-1", "1e9", "nan", "Wed, 21 Oct 2026 07:28:00 GMT")
        ),
        "Content-Range": rng.choice(("bytes 0-9/10", "bytes 99-1/0", "x", f"bytes {10**30}-/*")),
        "Content-Length": rng.choice(("0", "-1", "5", "1e3", str(10**30), "\xb2")),
        "Content-Encoding": rng.choice(("gzip", "br", "deflate", "x")),
        "Transfer-Encoding": rng.choice(("chunked", "gzip")),
        "X-Error-Code": rng.choice(("GatedRepo", "RepoNotFound", "x\x1b")),
        "X-" + "y" * rng.choice((5, 70_000)): "z",
    }
    return dict(rng.sample(sorted(known.items()), rng.choice((1, 1, 2, 3))))


def odd_write(rng: Random) -> Callable[[Any], None]:
    """Bytes that are no answer, or one without an end."""
    head = rng.choice(
        (b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: ", b"garbage", b"\r\n" * 99)
    )
    block = rng.choice((b"", b"[", b" " * 100_000, rng.randbytes(50)))
    count, pause = rng.choice(((1, 0.0), (100, 0.0), (400, 0.005)))

    def write(handler: Any) -> None:
        handler.wfile.write(head)
        for _ in range(count):
            handler.wfile.write(block)
            time.sleep(pause)

    return write


def odd_json(rng: Random, value: Any) -> bytes:
    """The JSON of a server, of another form or type."""
    value = copy.deepcopy(value)
    if isinstance(value, list) and rng.random() < 0.6:
        entry = value[rng.randrange(len(value))]
        key = rng.choice(sorted(entry))
        entry[key] = rng.choice((*VALUES, *NAMES, *PATHS)) if key == "path" else rng.choice(VALUES)
    elif isinstance(value, list) and rng.random() < 0.1:
        value = value * 2000
    elif rng.random() < 0.1:
        value = nested(rng.choice((60, 70, 900)))
    else:
        value = of_value(rng, value)
    return dump(rng, value) if rng.random() < 0.2 else json.dumps(value).encode()


def odd_answer(rng: Random, good: bytes, urls: list[str]) -> Answer:
    """An answer of which something is otherwise."""
    kind = rng.choice(("json", "json", "json", "headers", "status", "bytes", "write"))
    if kind == "write":
        return Answer(write=odd_write(rng))
    if kind == "json":
        return Answer(odd_json(rng, json.loads(good)))
    body = bytes(of_bytes(rng, good)) if kind == "bytes" else good
    headers = odd_headers(rng, urls) if kind != "bytes" else {}
    return Answer(body, rng.choice(STATUSES) if kind == "status" else 200, headers)


def refuse_leak(stolen: list[Asked]) -> None:
    if any(SECRET in (asked.authorization or "") for asked in stolen):
        raise Misbehaviour("the secret went to another server")
    stolen.clear()


def hub(folder: Path) -> Attempt:
    """What `wanflow download` is answered."""
    for module in (hubs, transfer):
        module.PAUSES = (0.0, 0.0)  # type: ignore[attr-defined]
        module.TIMEOUT = 1.0  # type: ignore[attr-defined]
    hubs.ANSWER_SECONDS = transfer.HEAD_SECONDS = transfer.WINDOW = 1.0
    transfer.PATIENCE = 0.0
    answers: dict[str, Answer] = {}

    def give(path: str) -> Answer:
        if "/tree/" in path:
            return answers["tree"]
        if "/resolve/" in path:
            name = path.partition(f"/resolve/{COMMIT}/")[2]
            return answers.get("file") or Answer(FILES.get(name, b""))
        return answers["info"]

    url, _ = RUNNING.enter_context(server(give))
    other, stolen = RUNNING.enter_context(server(lambda path: Answer(json.dumps(LISTING).encode())))

    def attempt(rng: Random) -> object:
        info = json.dumps({"id": "o/r", "sha": COMMIT}).encode()
        answers.clear()
        answers.update(info=Answer(info), tree=Answer(json.dumps(LISTING).encode()))
        which, urls = rng.choice(("tree", "tree", "tree", "info", "file")), [url, other + "/x"]
        if which == "file":
            kind = rng.choice(("status", "headers", "write", "bytes"))
            data = FILES["Wan2.1_VAE.pth"]
            answers["file"] = {
                "status": lambda: Answer(data, rng.choice(STATUSES), odd_headers(rng, urls)),
                "headers": lambda: Answer(data, 200, odd_headers(rng, urls)),
                "write": lambda: Answer(write=odd_write(rng)),
                "bytes": lambda: Answer(data[: rng.randrange(3000)] + b"x" * rng.randrange(3000)),
            }[kind]()
        else:
            answers[which] = odd_answer(
                rng, info if which == "info" else answers["tree"].body, urls
            )
        target = folder / "weights"
        argv = ["download", "--repo", "o/r", "--endpoint", url, "--local_dir", str(target)]
        argv += rng.choice(([], ["--dry_run"], ["--verify"], ["--workers", "1"]))
        done = command([*argv, "--token", SECRET])
        refuse_leak(stolen)
        if SECRET in done[1] + done[2]:
            raise Misbehaviour("the secret was printed")
        outside = [path.name for path in folder.iterdir() if path != target]
        if outside:
            raise Misbehaviour(f"written outside of the folder: {outside}")
        shutil.rmtree(target, ignore_errors=True)
        return done

    return attempt


def chat(folder: Path) -> Attempt:
    """What the extension of a prompt is answered: the prompt stays, or becomes a text."""
    good = json.dumps({"choices": [{"message": {"content": "a large red circle"}}]}).encode()
    answers = [Answer(good)]
    url, _ = RUNNING.enter_context(server(lambda path: answers[0]))
    other, stolen = RUNNING.enter_context(server(lambda path: Answer(good)))

    def attempt(rng: Random) -> tuple[int, str]:
        answers[0] = odd_answer(rng, good, [url, other])
        text = extend.extend("a red circle", "en", None, url, SECRET, 1.0)
        refuse_leak(stolen)
        if not isinstance(text, str) or not text.strip() or len(text) > extend.LONGEST_PROMPT:
            raise Misbehaviour(f"the prompt became {text!r:.300}")
        text.encode()
        return (2 if text == "a red circle" else 0), text  # 2: the answer was not taken

    return attempt
