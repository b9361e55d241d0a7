"""Stand before every route: who may ask, from where, and what every answer carries."""

from __future__ import annotations

import hmac
import logging
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wanflow.serve.errors import Refusal
from wanflow.untrusted import printable

logger = logging.getLogger("wanflow")
OPEN = ("/health", "/healthz", "/readyz", "/openapi.json", "/")  # need no token; /page/ neither
OWN_HEAD = ("/content", "/events")  # the route answers HEAD itself; a stream never ends
SAFE = ("GET", "HEAD", "OPTIONS")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# `blob:` and `data:` are for what the page has fetched itself, with its token.
CSP = (
    "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; object-src 'none';"
    " base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)


class Guard:
    """Checks the token, the Host and the Origin of a request, before anything reads it.

    Without a token the server is on loopback only. There a page of another site could reach it by a
    name that it points at 127.0.0.1 (DNS rebinding), so the Host must be loopback's own.
    """

    def __init__(self, app: ASGIApp, token: str, log: bool = False) -> None:
        self.app, self._token, self._log = app, token.encode(), log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Content-Security-Policy"] = CSP
                headers["Referrer-Policy"] = "no-referrer"
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refusal = self._refusal(scope)
        if scope["method"] == "HEAD" and not scope["path"].endswith(OWN_HEAD):
            scope = {**scope, "method": "GET"}  # the server of HTTP leaves out the body
        app = self.app if refusal is None else refusal.response()
        try:
            await app(scope, receive, sending)
        finally:
            if self._log:  # without the query, and without what a body says
                took = (time.monotonic() - began) * 1000
                path = printable(scope["path"], 200)
                logger.info("%s %s %d %.0f ms", scope["method"], path, status, took)

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        if not self._token and _name(host) not in LOOPBACK:
            return Refusal(
                403,
                f"host {printable(host, 60)}: without a token this server answers 127.0.0.1 and"
                " localhost only; with a token, which its operator can set, it answers any name",
                "wrong_host",
            )
        if scope["method"] not in SAFE and _other_site(headers, host):
            return Refusal(403, "a page of another site may not change anything here", "cross_site")
        if self._token and path not in OPEN and not path.startswith("/page/"):
            kind, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("latin-1"), self._token)
            if kind.lower() != "bearer" or not right:
                return Refusal(
                    401,
                    "the token is missing or wrong; send the header Authorization: Bearer TOKEN",
                    "invalid_token",
                )
        return None


def _name(host: str) -> str:
    """Return the name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _other_site(headers: Headers, host: str) -> bool:
    """Return whether a browser says that a page of another site sends this."""
    site = headers.get("sec-fetch-site")
    if site in ("cross-site", "same-site"):
        return True
    if site == "same-origin":  # a proxy may have replaced the Host, which Origin would differ from
        return False
    origin = headers.get("origin")
    if origin is None:
        return False
    try:
        return urlsplit(origin).netloc.lower() != host.lower()
    except ValueError:
        return True
