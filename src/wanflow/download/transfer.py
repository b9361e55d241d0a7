"""Fetch one file over HTTP: in ranges, retried, hashed as it arrives, no byte fetched twice.

What has arrived of `name` is stored next to it as `name.<start of its hash>.part`. A new process
hashes those bytes again, requests the rest, and publishes the file only when its hash is the hub's.
The hash in the part's name ties it to one content, so two versions of a file are never joined.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import IO
from urllib.parse import urlsplit

from huggingface_hub import get_session
from huggingface_hub.errors import HfHubHTTPError

from wanflow.config import RequestError
from wanflow.files import publish
from wanflow.web import SlowError, within

BLOCK = 4 << 20  # bytes hashed at a time
TIMEOUT = 30.0  # seconds without a byte
HEAD_SECONDS = 60.0  # until an answer begins
SLOWEST, WINDOW = 1000, 60.0  # bytes a second, over this many seconds: below, ask again
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds between attempts; an attempt that brings bytes resets
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # statuses worth another attempt
PATIENCE = 120.0  # seconds: the longest Retry-After that is obeyed
# The base of what the hub library's HTTP client raises: httpx in its 1.x releases, httpx2 in 2.x.
NETWORK_ERROR: type[BaseException] = HfHubHTTPError.__mro__[1]

Say = Callable[[str], None]  # shows a message
OnBytes = Callable[[int], None]  # receives bytes that came; negative: that have to come again


class DownloadError(OSError):
    """A download that failed although the request was right: one line, exit code 1."""


class DamagedError(DownloadError):
    """A file whose content is not what the hub declares; other files may be sound."""


class StoppedError(Exception):
    """Another thread asked this one to end."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub describes it, and the name it gets here."""

    name: str  # relative to the folder, with slashes
    path: str  # in the repository
    origin: str  # OWNER/NAME@commit
    size: int  # bytes
    sha256: str | None  # of files in git lfs
    blob: str | None = None  # git's own hash, the only one of small files
    url: str = ""
    headers: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def part(self) -> str:
        """The name of what has arrived of it."""
        return f"{self.name}.{(self.sha256 or self.blob or 'unknown')[:12]}.part"


class Hasher:
    """The sha256 of a stream, and git's hash of it where the hub declares no sha256."""

    def __init__(self, remote: RemoteFile) -> None:
        self.remote, self._sha256 = remote, hashlib.sha256()
        git = hashlib.sha1(b"blob %d\0" % remote.size, usedforsecurity=False)
        self._blob = None if remote.sha256 else git

    def update(self, data: bytes) -> None:
        self._sha256.update(data)
        if self._blob:
            self._blob.update(data)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    @property
    def mismatch(self) -> str:
        """Both hashes in words where they differ, else an empty string."""
        if self._blob is None:
            kind, found, expected = "sha256", self.sha256, self.remote.sha256
        else:
            kind, found, expected = "git hash", self._blob.hexdigest(), self.remote.blob
        if expected in (None, found):  # None: the hub declares only the size
            return ""
        return f"{kind} {found}, the hub has {expected}"


def hash_file(file: IO[bytes], hasher: Hasher, stop: Event, on_bytes: OnBytes | None = None) -> int:
    """Feed an open file to a hasher and return the number of bytes."""
    count = 0
    while block := file.read(BLOCK):
        if stop.is_set():
            raise StoppedError
        hasher.update(block)
        count += len(block)
        if on_bytes is not None:
            on_bytes(len(block))
    return count


def refusal(status: int, origin: str, url: str) -> RequestError:
    """Return the error for a 4xx answer about OWNER/NAME@revision: its meaning and a remedy."""
    repo, _, revision = origin.partition("@")
    page = "{0.scheme}://{0.netloc}/{1}".format(urlsplit(url), repo)
    login = "log in with `hf auth login`, or give --token"
    if status == 401:
        return RequestError(
            f"{page} does not exist or is not public (401): check the name; if it is yours, {login}"
        )
    if status == 403:
        return RequestError(f"{page} is gated (403): open that page, accept its terms, and {login}")
    if status == 404:
        check = f"check the name{f' and the revision {revision}' if revision else ''}"
        return RequestError(f"{page} does not have this (404): {url}; {check}")
    return RequestError(f"{page} was refused ({status}): {url}")


def fetch_file(remote: RemoteFile, folder: Path, stop: Event, on_bytes: OnBytes, say: Say) -> str:
    """Fetch, verify and publish a file; return its sha256.

    Raises:
        RequestError: when the hub refuses it.
        DamagedError: when it arrived damaged twice; no part of it is stored.
        DownloadError: when network or disk failed for good; what arrived stays for the next time.
    """
    target, part = folder / remote.name, folder / remote.part
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_old_parts(target, part)
        sha256 = _fetch_part(remote, part, stop, on_bytes, say)
        publish(part, target, overwrite=True)
    except DownloadError:
        raise
    except OSError as error:
        raise DownloadError(
            f"{error.filename or target} cannot be written: {error.strerror or error}; what arrived"
            " stays; run the same command to resume"
        ) from None
    return sha256


def _remove_old_parts(target: Path, part: Path) -> None:
    """Delete parts of versions that the hub no longer has."""
    parts = re.compile(re.escape(target.name) + r"\.[0-9a-f]{12}\.part")
    for old in target.parent.iterdir():
        if old != part and parts.fullmatch(old.name):
            old.unlink()


def _fetch_part(remote: RemoteFile, part: Path, stop: Event, on_bytes: OnBytes, say: Say) -> str:
    """Fill and verify a part, once more from the beginning where it is damaged."""
    for last in (False, True):
        with _open_part(part) as out:
            hasher = _fill(remote, out, stop, on_bytes, say)
        if not hasher.mismatch:
            break
        part.unlink()
        on_bytes(-remote.size)
        if last:
            raise DamagedError(
                f"{remote.name} arrived damaged twice ({hasher.mismatch}); no part of it is stored;"
                " try another --endpoint"
            )
        say(f"{remote.name} arrived damaged ({hasher.mismatch}); fetching it again")
    return hasher.sha256


def _open_part(part: Path) -> IO[bytes]:
    """Open what has arrived, to append; a link planted under its name is not followed."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
    handle = os.open(part, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise DownloadError(f"{part} is not a regular file; move it away")
    return os.fdopen(handle, "ab+")


def _fill(remote: RemoteFile, out: IO[bytes], stop: Event, on_bytes: OnBytes, say: Say) -> Hasher:
    """Append to a part until it has the file's size, in as many requests as it takes."""
    stream = _Stream(remote, out, on_bytes)
    out.seek(0)
    if hash_file(out, stream.hasher, stop) > remote.size:
        stream.restart()
    failures = 0
    while out.tell() < remote.size:
        before, begin = out.tell(), time.monotonic()
        try:
            wait, why = stream.request(stop)
        except (NETWORK_ERROR, SlowError) as error:
            wait, why = 0.0, f"{type(error).__name__}: {error}".rstrip(": ")
        out.flush()
        have = out.tell()
        if have >= remote.size:
            break
        moved = have - before > SLOWEST * (time.monotonic() - begin)
        failures = 0 if moved else failures + 1
        if failures > len(PAUSES):
            raise DownloadError(
                f"{remote.name} stopped at {have:,} of {remote.size:,} bytes after {failures}"
                f" attempts without progress ({why}); run the same command to resume"
            )
        say(f"{remote.name}: {why}; resuming at {have:,} of {remote.size:,} bytes")
        if stop.wait(max(wait, PAUSES[max(failures - 1, 0)])):
            raise StoppedError
    return stream.hasher


class _Stream:
    """The part being filled, and the hash of what is in it."""

    def __init__(self, remote: RemoteFile, out: IO[bytes], on_bytes: OnBytes) -> None:
        self.remote, self.out, self.on_bytes = remote, out, on_bytes
        self.hasher = Hasher(remote)

    def restart(self) -> None:
        self.on_bytes(-min(self.out.tell(), self.remote.size))
        self.out.truncate(0)
        self.out.seek(0)
        self.hasher = Hasher(self.remote)

    def request(self, stop: Event) -> tuple[float, str]:
        """Request the missing bytes once; return the seconds to wait and why more are missing."""
        have = self.out.tell()
        # A range of a compressed answer would count compressed bytes.
        headers = {**self.remote.headers, "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        session = get_session()
        url = self.remote.url
        asked = session.build_request("GET", url, headers=headers, timeout=TIMEOUT)
        response = within(  # the limit of a socket counts from byte to byte
            HEAD_SECONDS, lambda: session.send(asked, stream=True, follow_redirects=True)
        )
        with closing(response):
            status = response.status_code
            # A storage host answers 403 when its signed address has expired; the hub signs another.
            redirected = urlsplit(str(response.url)).netloc != urlsplit(self.remote.url).netloc
            if status in TRANSIENT or (redirected and 400 <= status < 500 and status != 416):
                after = response.headers.get("Retry-After", "")
                wait = min(float(after), PATIENCE) if re.fullmatch("[0-9]{1,9}", after) else 0.0
                return wait, f"the server answered {status}"
            content_range = response.headers.get("Content-Range", "")
            if status == 416 or (status == 206 and not self._continues(content_range, have)):
                self.restart()
                return 0.0, f"the server has no byte {have:,} of it"
            if status not in (200, 206):
                gated = response.headers.get("X-Error-Code") == "GatedRepo"  # a 401 without login
                raise refusal(403 if gated else status, self.remote.origin, self.remote.url)
            if status == 200 and have:  # this server does not do ranges
                self.restart()
            begin, got = time.monotonic(), 0
            for chunk in response.iter_bytes():
                if stop.is_set():
                    raise StoppedError
                got += len(chunk)
                if time.monotonic() - begin > WINDOW:
                    if got < SLOWEST * WINDOW:
                        return 0.0, f"fewer than {SLOWEST:,} bytes a second came"
                    begin, got = time.monotonic(), 0
                room = self.remote.size - self.out.tell()
                self.out.write(chunk[:room])
                self.hasher.update(chunk[:room])
                self.on_bytes(min(len(chunk), room))
                if len(chunk) > room:  # longer than declared; the hash decides on the beginning
                    break
        return 0.0, "the answer was shorter than the file"

    def _continues(self, content_range: str, have: int) -> bool:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range)
        if found is None or int(found[1]) != have:
            return False
        return found[2] in ("*", str(self.remote.size))
