"""A server on loopback that gives any answer, for clients that should survive it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """What a server sends: a status, headers and a body, or what a function writes."""

    body: bytes = b"{}"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    write: Callable[[Any], None] | None = None


@dataclass(frozen=True)
class Asked:
    """A request that came."""

    path: str
    authorization: str | None
    body: bytes = b""


@contextmanager
def server(answers: Callable[[str], Answer]) -> Iterator[tuple[str, list[Asked]]]:
    """Serve what `answers(path)` gives; yields the address and what was asked."""
    log: list[Asked] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            log.append(Asked(self.path, self.headers.get("Authorization"), body))
            answer = answers(self.path)
            with suppress(OSError):
                if answer.write is not None:
                    return answer.write(self)
                self.send_response(answer.status)
                for name, value in {
                    "Content-Length": str(len(answer.body)),
                    **answer.headers,
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.body)

        do_GET = do_POST = answer

        def log_message(self, *_: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}", log
    finally:
        httpd.shutdown()
        httpd.server_close()
