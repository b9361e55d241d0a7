"""One file over HTTP, so that no byte is fetched twice and none is believed: ranged, retried,
hashed as it comes.

What has arrived of `name` lies beside it as `name.<start of its hash>.part`. A new process hashes
those bytes again, asks for the rest, and gives the file its name only when the whole is what the
hub says it is. The hash in the part's name ties it to one content: of a file that has changed at
the hub there is no part, so two versions are never glued together.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import IO
from urllib.parse import urlsplit

from huggingface_hub import get_session
from huggingface_hub.errors import HfHubHTTPError

from wanflow.config import RequestError
from wanflow.files import publish

BLOCK = 4 << 20  # bytes hashed at a time
TIMEOUT = 30.0  # seconds without a byte
PAUSES = (
    1.0,
    2.0,
    4.0,
    8.0,
    16.0,
)  # seconds between tries; a try that brought bytes starts the count anew
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # answers that may be another one a moment later
PATIENCE = 120.0  # seconds: the longest that a server's Retry-After is obeyed
# The base of all that the hub library's HTTP client raises: httpx in its releases 1.x, httpx2 in
# 2.x.
NETWORK_ERROR: type[BaseException] = HfHubHTTPError.__mro__[1]

Say = Callable[[str], None]  # told in words what happens
Moved = Callable[
    [int], None
]  # told of bytes that came, or, negative, of bytes that have to come again


class DownloadError(OSError):
    """A download that failed although it was rightly asked for: one clear line for the user, exit
    code 1.
    """


class DamagedError(DownloadError):
    """A file whose content is not what the hub says; other files may be well."""


class StoppedError(Exception):
    """Another thread asked this one to end."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub describes it, and the name it gets here."""

    name: str  # relative to the folder, with slashes
    path: str  # in the repository
    origin: str  # OWNER/NAME@commit
    size: int  # bytes
    sha256: str | None  # of files that git lfs keeps
    blob: str | None = None  # git's own hash, all that is told of small files
    url: str = ""
    headers: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def part(self) -> str:
        """The name of what has arrived of it."""
        return f"{self.name}.{(self.sha256 or self.blob or 'unknown')[:12]}.part"


class Hasher:
    """The sha256 of a stream, and git's hash of it where the hub tells nothing else."""

    def __init__(self, remote: RemoteFile) -> None:
        self.remote, self._sha256 = remote, hashlib.sha256()
        self._blob = (
            None
            if remote.sha256
            else hashlib.sha1(b"blob %d\0" % remote.size, usedforsecurity=False)
        )

    def update(self, data: bytes) -> None:
        self._sha256.update(data)
        if self._blob:
            self._blob.update(data)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    @property
    def verdict(self) -> str:
        """Empty for the right content, else both hashes in words."""
        if self._blob is None:
            return (
                ""
                if self.sha256 == self.remote.sha256
                else f"sha256 {self.sha256}, the hub says {self.remote.sha256}"
            )
        if self.remote.blob is None:  # nothing is told but the size
            return ""
        blob = self._blob.hexdigest()
        return (
            "" if blob == self.remote.blob else f"git hash {blob}, the hub says {self.remote.blob}"
        )


def hash_file(file: IO[bytes], hasher: Hasher, stop: Event, moved: Moved = lambda _: None) -> int:
    """Feed a whole open file to a hasher; bytes read."""
    count = 0
    while block := file.read(BLOCK):
        if stop.is_set():
            raise StoppedError
        hasher.update(block)
        count += len(block)
        moved(len(block))
    return count


def refusal(status: int, origin: str, url: str) -> RequestError:
    """The line for a 4xx answer of the hub about OWNER/NAME@revision: what it means and what to
    do.
    """
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
        return RequestError(
            f"{page} does not have this (404): {url}; check the"
            f" name{f' and the revision {revision}' if revision else ''}"
        )
    return RequestError(f"{page} was refused ({status}): {url}")


def fetch(remote: RemoteFile, folder: Path, stop: Event, moved: Moved, say: Say) -> str:
    """Bring a file under its name, whole and verified; its sha256.

    Raises:
        RequestError: when the hub refuses it.
        DamagedError: when it came damaged twice; nothing is kept of it.
        DownloadError: when the network or the disk gave up; what came is kept for the next time.
    """
    target, part = folder / remote.name, folder / remote.part
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in target.parent.iterdir():  # parts of versions that the hub no longer has
            if old != part and re.fullmatch(
                re.escape(target.name) + r"\.[0-9a-f]{12}\.part", old.name
            ):
                old.unlink()
        for again in (True, False):
            with part.open("ab+") as out:
                hasher = _fill(remote, out, stop, moved, say)
            if not hasher.verdict:
                break
            part.unlink()
            moved(-remote.size)
            if not again:
                raise DamagedError(
                    f"{remote.name} came damaged twice ({hasher.verdict}); nothing is kept of it,"
                    " try another --endpoint"
                )
            say(f"{remote.name} came damaged ({hasher.verdict}); fetching it again")
        publish(part, target, overwrite=True)
    except DownloadError:
        raise
    except OSError as error:
        raise DownloadError(
            f"{error.filename or target} cannot be written: {error.strerror or error}; what came is"
            " kept"
        ) from None
    return hasher.sha256


def _fill(remote: RemoteFile, out: IO[bytes], stop: Event, moved: Moved, say: Say) -> Hasher:
    """Append to a part until it has the file's size, in as many requests as it takes."""
    stream = _Stream(remote, out, moved)
    out.seek(0)
    if hash_file(out, stream.hasher, stop) > remote.size:
        stream.restart()
    failures = 0
    while out.tell() < remote.size:
        before = out.tell()
        try:
            wait, why = stream.ask(stop)
        except NETWORK_ERROR as error:
            wait, why = 0.0, f"{type(error).__name__}: {error}".rstrip(": ")
        out.flush()
        have = out.tell()
        if have >= remote.size:
            break
        failures = 0 if have > before else failures + 1
        if failures > len(PAUSES):
            raise DownloadError(
                f"{remote.name} stopped at {have:,} of {remote.size:,} bytes, {failures} tries in a"
                f" row brought nothing ({why}); the same command goes on from there"
            )
        say(f"{remote.name}: {why}; going on at {have:,} of {remote.size:,} bytes")
        if stop.wait(max(wait, PAUSES[max(failures - 1, 0)])):
            raise StoppedError
    return stream.hasher


class _Stream:
    """The part being filled, and the hash of what is in it."""

    def __init__(self, remote: RemoteFile, out: IO[bytes], moved: Moved) -> None:
        self.remote, self.out, self.moved, self.hasher = remote, out, moved, Hasher(remote)

    def restart(self) -> None:
        self.moved(-min(self.out.tell(), self.remote.size))
        self.out.truncate(0)
        self.out.seek(0)
        self.hasher = Hasher(self.remote)

    def ask(self, stop: Event) -> tuple[float, str]:
        """One request for what is missing; (seconds to wait before the next, why there has to be
        one).
        """
        have = self.out.tell()
        # Compressed on the way, a range would be one of the compressed bytes.
        headers = {**self.remote.headers, "Accept-Encoding": "identity"} | (
            {"Range": f"bytes={have}-"} if have else {}
        )
        with get_session().stream(
            "GET", self.remote.url, headers=headers, timeout=TIMEOUT, follow_redirects=True
        ) as response:
            status = response.status_code
            # A storage host refuses with 403 when the signed address it was reached by has run out;
            # the hub gives a new one.
            elsewhere = urlsplit(str(response.url)).netloc != urlsplit(self.remote.url).netloc
            if status in TRANSIENT or (elsewhere and 400 <= status < 500 and status != 416):
                after = response.headers.get("Retry-After", "")
                return (
                    min(float(after), PATIENCE) if after.isdigit() else 0.0
                ), f"the server answered {status}"
            if status == 416 or (
                status == 206
                and not self._continues(response.headers.get("Content-Range", ""), have)
            ):
                self.restart()
                return 0.0, f"the server has no byte {have:,} of it"
            if status not in (200, 206):
                status = (
                    403 if response.headers.get("X-Error-Code") == "GatedRepo" else status
                )  # 401 to who is not logged in
                raise refusal(status, self.remote.origin, self.remote.url)
            if status == 200 and have:  # no ranges here: from the beginning
                self.restart()
            for chunk in response.iter_bytes():
                if stop.is_set():
                    raise StoppedError
                room = self.remote.size - self.out.tell()
                self.out.write(chunk[:room])
                self.hasher.update(chunk[:room])
                self.moved(min(len(chunk), room))
                if (
                    len(chunk) > room
                ):  # longer than the hub says; the hash decides whether the beginning is the file
                    break
        return 0.0, "the answer was shorter than the file"

    def _continues(self, content_range: str, have: int) -> bool:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range)
        return (
            found is not None and int(found[1]) == have and found[2] in ("*", str(self.remote.size))
        )
