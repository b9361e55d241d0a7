"""Talk to servers of strangers: valid addresses, secrets for one host only, bounded answers."""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Callable, Iterable
from threading import Thread
from typing import TypeVar
from urllib.parse import urlsplit

from wanflow.config import RequestError
from wanflow.untrusted import printable

T = TypeVar("T")
LONGEST_URL = 2000
SCHEMES = ("http", "https")


class SlowError(OSError):
    """A server that did not end its answer in time."""


def check_url(url: str, what: str, example: str) -> str:
    """Return an http address as it is.

    Args:
        url: the address.
        what: the flag or variable it is from.
        example: a good address.

    Raises:
        RequestError: for anything that no server can have.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme in SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets without an end, a port that is no number
        good = False
    # Space, control characters and letters beyond ASCII: a server's name has them encoded.
    if not good or len(url) > LONGEST_URL or re.search(r"[^!-~]", url):
        raise RequestError(
            f"{what}: {printable(url)!r} is not the address of a server, such as {example}"
        )
    return url


def on_loopback(url: str) -> bool:
    """Return whether an address is of this machine: no proxy can reach it, or should hear it."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def same_server(url: str, other: str) -> bool:
    """Return whether two addresses have one scheme, host and port: a secret may go to both."""
    return _server(url) == _server(other)


def _server(url: str) -> tuple[str, str | None, int | None] | str:
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        return parts.scheme, parts.hostname, port
    except ValueError:
        return url  # invalid: the same as itself only


def read_bounded(chunks: Iterable[bytes], limit: int, seconds: float) -> bytes:
    """Return an answer's body.

    Raises:
        RequestError: if it is longer than `limit` bytes.
        SlowError: if it takes longer than `seconds`, however it trickles.
    """
    body, end = bytearray(), time.monotonic() + seconds
    for chunk in chunks:
        body += chunk
        if len(body) > limit:
            raise RequestError(f"the server's answer is longer than {limit:,} bytes")
        if time.monotonic() > end:
            raise SlowError(f"the server did not end its answer in {seconds:.0f} s")
    return bytes(body)


def within(seconds: float, call: Callable[[], T]) -> T:
    """Return what a call returns, waiting for it no longer than `seconds`.

    A time limit of a socket counts from byte to byte, so a header that trickles would never end.
    The thread of a call that is given up is a daemon: it does not keep the process alive.

    Raises:
        SlowError: if the call takes longer.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # raised below, in the thread that waits
            errors.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise SlowError(f"the server did not answer in {seconds:.0f} s")
    return results[0]
