"""A server on loopback that speaks as much of Hugging Face's API as its client asks: revisions,
listings, files with ranges, refusals.

Faults can be planned per file: the connection is cut, bytes are wrong, the server is busy, ignores
ranges, is slow, or holds the rest of a file back.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS = 1000  # bytes from which a file is kept by git lfs here
REPO = "Wan-AI/Wan2.2-T2V-A14B"


@dataclass
class Fault:
    """What goes wrong with a file, and how many times (-1: always)."""

    kind: str  # cut, wrong, status, no_ranges, slow, longer, hold
    value: float = 0  # bytes before the cut or the hold; the status; seconds between blocks
    times: int = 1


@dataclass(frozen=True)
class Asked:
    """A request that came."""

    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Hub:
    """`with Hub({REPO: {path: bytes}}) as hub:` serves at `hub.url` until the block ends."""

    repos: dict[str, dict[str, bytes]]
    token: str | None = None  # who does not have it gets 401
    gated: bool = False  # everybody gets 403 for a file
    page: int = 1000  # entries a listing gives at a time
    storage: str = ""  # address of another hub to send downloads of lfs files to
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    log: list[Asked] = field(default_factory=list)
    busy: int = 0  # files being sent
    most_busy: int = 0
    sent: int = 0  # bytes of files
    lock: threading.Lock = field(default_factory=threading.Lock)
    released: threading.Event = field(default_factory=threading.Event)  # ends each hold

    def __enter__(self) -> Hub:
        self.server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self})
        )
        self.server.daemon_threads = True
        # A client may end a connection at any time; the traceback would go to the test's output.
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo: str) -> str:
        """The commit of what the repository holds now."""
        return hashlib.sha1(
            b"".join(name.encode() + data for name, data in sorted(self.repos[repo].items()))
        ).hexdigest()

    def fault(self, path: str, kind: str, value: float = 0, times: int = 1) -> None:
        self.faults[path].append(Fault(kind, value, times))

    def asked(self, path: str) -> list[Asked]:
        """The downloads of a file that were asked for."""
        return [
            asked
            for asked in self.log
            if asked.method == "GET"
            and asked.path.endswith(f"/{path}")
            and "/resolve/" in asked.path
        ]

    @property
    def downloads(self) -> int:
        return sum(asked.method == "GET" and "/resolve/" in asked.path for asked in self.log)

    def next_fault(self, path: str) -> Fault | None:
        for fault in self.faults[path]:
            if fault.times:
                fault.times -= 1
                return fault
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        url, hub = urlsplit(self.path), self.hub
        path, bearer = unquote(url.path), self.headers.get("Authorization")
        token = bearer.removeprefix("Bearer ") if bearer else None
        with hub.lock:
            hub.log.append(Asked(self.command, path, self.headers.get("Range"), token))
        steps = path.strip("/").split("/")
        what = (
            steps[4]
            if steps[:2] == ["api", "models"] and len(steps) > 4
            else steps[2]
            if len(steps) > 4
            else "revision"
        )
        repo = "/".join(steps[2:4] if steps[0] == "api" else steps[:2])
        if repo not in hub.repos or (hub.token and token != hub.token):
            return self.refuse(401 if token is None or repo in hub.repos else 404, "RepoNotFound")
        commit = hub.commit(repo)
        revision = (
            (steps[5] if steps[0] == "api" else steps[3])
            if len(steps) > (5 if steps[0] == "api" else 3)
            else "main"
        )
        if revision not in ("main", commit):
            return self.refuse(404, "RevisionNotFound")
        if what == "revision":
            return self.json(
                {
                    "id": repo,
                    "sha": commit,
                    "siblings": [{"rfilename": name} for name in hub.repos[repo]],
                }
            )
        if what == "tree":
            return self.tree(repo, int(parse_qs(url.query).get("cursor", ["0"])[0]))
        name = "/".join(steps[4:])
        if hub.gated:
            return self.refuse(403, "GatedRepo")
        if name not in hub.repos[repo]:
            return self.refuse(404, "EntryNotFound")
        self.file(repo, commit, name)

    def refuse(self, status: int, code: str) -> None:
        self.json({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})

    def json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.head(
            status,
            {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                **(headers or {}),
            },
        )
        if self.command == "GET":
            self.wfile.write(body)

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def tree(self, repo: str, cursor: int) -> None:
        entries: list[dict[str, Any]] = [
            {"type": "directory", "path": "a-folder", "oid": "0" * 40, "size": 0}
        ]
        for path, data in self.hub.repos[repo].items():
            entry = {
                "type": "file",
                "path": path,
                "size": len(data),
                "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
            }
            if len(data) >= LFS:
                entry |= {
                    "oid": "1" * 40,
                    "lfs": {
                        "oid": hashlib.sha256(data).hexdigest(),
                        "size": len(data),
                        "pointerSize": 134,
                    },
                }
            entries.append(entry)
        end = cursor + self.hub.page
        more = (
            {
                "Link": (
                    f"<{self.hub.url}{urlsplit(self.path).path}?recursive=True&cursor={end}>;"
                    ' rel="next"'
                )
            }
            if end < len(entries)
            else {}
        )
        self.json(entries[cursor:end], headers=more)

    def file(self, repo: str, commit: str, name: str) -> None:
        hub, data = self.hub, self.hub.repos[repo][name]
        kept_by_lfs = len(data) >= LFS
        etag = (
            hashlib.sha256(data).hexdigest()
            if kept_by_lfs
            else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        )
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if kept_by_lfs:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
            if hub.storage:
                return self.head(
                    302, {**headers, "Location": f"{hub.storage}{self.path}", "Content-Length": "0"}
                )
        if self.command == "HEAD":
            return self.head(200, {**headers, "Content-Length": str(len(data))})
        with hub.lock:
            fault = hub.next_fault(name)
        kind, value = (fault.kind, fault.value) if fault else ("", 0.0)
        if kind == "status":
            return self.json({}, int(value))
        begin, wanted = 0, self.headers.get("Range")
        if wanted and kind != "no_ranges":
            begin = int(wanted.removeprefix("bytes=").partition("-")[0])
            if begin >= len(data):
                return self.head(
                    416, {"Content-Range": f"bytes */{len(data)}", "Content-Length": "0"}
                )
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        body = data[begin:]
        if kind == "wrong":
            body = bytes(byte ^ 255 for byte in body)
        if kind == "longer":
            body += b"more"
        self.head(
            206 if "Content-Range" in headers else 200,
            {**headers, "Content-Length": str(len(body))},
        )
        with hub.lock:
            hub.busy += 1
            hub.most_busy = max(hub.busy, hub.most_busy)
        try:
            self.send(
                body[: int(value)] if kind in ("cut", "hold") else body,
                value if kind == "slow" else 0.0,
            )
        finally:
            with hub.lock:
                hub.busy -= 1
        if kind in ("cut", "hold"):
            self.wfile.flush()
            if kind == "hold":
                hub.released.wait(120)
            self.close_connection = True

    def send(self, body: bytes, pause: float) -> None:
        for begin in range(0, len(body), 1 << 14):
            block = body[begin : begin + (1 << 14)]
            try:
                self.wfile.write(block)
            except OSError:  # the client has gone
                self.close_connection = True
                return
            self.hub.sent += len(block)
            time.sleep(pause)
