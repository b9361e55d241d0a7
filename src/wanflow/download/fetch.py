"""Getting the weights: what a hub has, what a folder has already, and the difference brought over
and verified.

A folder remembers in `.wanflow-download.json` which of its files were hashed, so that a second run
takes no time; a file whose size or time of change is another one since is hashed again.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from wanflow.config import RequestError
from wanflow.download import catalogue
from wanflow.download.catalogue import LEDGER, Part, Variant
from wanflow.download.hubs import Hub, HuggingFace, OfflineError
from wanflow.download.transfer import (
    DamagedError,
    DownloadError,
    Hasher,
    RemoteFile,
    Say,
    StoppedError,
    hash_file,
)
from wanflow.files import write_bytes

logger = logging.getLogger("wanflow")

LOCK = ".wanflow-download.lock"
T = TypeVar("T")

Report = Callable[[str, int, int], None]  # what is done, bytes done, bytes in all


@dataclass
class Survey:
    """What a folder has of what it should have."""

    folder: Path
    files: list[RemoteFile]
    good: list[str] = field(default_factory=list)  # hashed, now or earlier, and right
    unsure: list[str] = field(default_factory=list)  # of the right size, not hashed by a dry run
    damaged: list[str] = field(default_factory=list)  # there, with another content
    arrived: int = 0  # bytes of parts that a download goes on from

    @property
    def missing(self) -> list[RemoteFile]:
        """The files that have to come."""
        return [file for file in self.files if file.name not in {*self.good, *self.unsure}]

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def needed(self) -> int:
        """Bytes that still have to come: room that the disk must have."""
        return sum(file.size for file in self.missing) - self.arrived


def download(
    variant: str | Variant,
    folder: str | Path,
    store: Hub | None = None,
    *,
    only: Sequence[str] = (),
    workers: int = 4,
    verify: bool = False,
    dry_run: bool = False,
    say: Say = logger.info,
    report: Report = lambda what, done, total: None,
) -> Survey:
    """Bring what a folder lacks of a variant; everything in it is then hashed and right.

    Args:
        store: where from; Hugging Face when left out.
        only: roles (`catalogue.ROLES`) to restrict it to; all when empty.
        workers: files that come at the same time.
        verify: hash every file again, also those that were hashed and have not changed since.
            Without a network this checks against what the folder remembers and against the
            published hashes, and fetches nothing.
        dry_run: only look; with `verify`, hash and name what is damaged.
        report: shows the progress of hashing and of fetching.

    Returns:
        what was there before, and what had to come.

    Raises:
        RequestError: for what cannot be done: no such variant, no network, not allowed, not enough
            disk space.
        DownloadError: for what went wrong: the network broke off for good, a file came damaged
            twice.
    """
    variant = catalogue.find(variant) if isinstance(variant, str) else variant
    parts = variant.select(only)
    folder = Path(folder).expanduser()
    if workers < 1:
        raise RequestError(f"{workers} files at a time fetch nothing; give --workers 1 or more")
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is a file; give a folder with --local_dir")
    store, ledger = store or HuggingFace(), Ledger(folder)
    try:
        files = store.listing(variant, parts)
    except OfflineError as error:
        if not verify:
            raise
        say(f"{error}; checking what is here without it")
        return _verify_offline(parts, folder, ledger, workers, report)
    for file in files:
        _refuse_outside(folder, file)
        known = catalogue.known_sha256(file.path)
        if known and file.sha256 and known != file.sha256:
            say(
                f"{file.origin} has another {file.path} than the one wanflow was made with (sha256"
                f" {file.sha256}, not {known})"
            )
    found = _survey(
        files, folder, ledger, workers, report, rehash=verify, hashing=verify or not dry_run
    )
    for name in found.damaged:
        say(f"{name} is damaged or of another version{'' if dry_run else '; fetching it again'}")
    if not dry_run and found.missing:
        _refuse_full_disk(found)
        _bring(found, store, ledger, workers, say, report)
    return found


def _bring(
    found: Survey, store: Hub, ledger: Ledger, workers: int, say: Say, report: Report
) -> None:
    """Fetch what is missing; two at the same time into one folder would spoil each other's
    parts.
    """
    found.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(found.folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise RequestError(
            f"another download into {found.folder} is under way; wait for it, or stop it"
        ) from None
    try:
        moved = _Counter("fetching", found.total - found.needed, found.total, report)

        def bring(remote: RemoteFile, stop: Event) -> None:
            ledger.add(remote, store.bring(remote, found.folder, stop, moved, say))

        # The largest first: the last to end should not be one that has only begun.
        _in_parallel(bring, sorted(found.missing, key=lambda file: -file.size), workers)
    finally:
        lock.release()


# --- what a folder has
# --------------------------------------------------------------------------------------------------


class Ledger:
    """The hashes of a folder's files, each with the size and the time of change (ns) that the file
    had when it was hashed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file, self._lock = folder, folder / LEDGER, Lock()
        try:
            files = json.loads(self.file.read_text(encoding="utf-8"))["files"]
            entries = {
                name: entry
                for name, entry in files.items()
                if isinstance(entry["sha256"], str) and isinstance(entry["size"], int)
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            entries = {}  # what is not remembered is hashed again
        self.entries: dict[str, dict[str, Any]] = entries

    def sha256(self, name: str) -> str | None:
        """The hash of a file that has not been touched since it was hashed."""
        entry, stat = self.entries.get(name), (self.folder / name).stat()
        return (
            str(entry["sha256"])
            if entry and (entry["size"], entry.get("mtime_ns")) == (stat.st_size, stat.st_mtime_ns)
            else None
        )

    def add(self, remote: RemoteFile, sha256: str) -> None:
        stat = (self.folder / remote.name).stat()
        with self._lock:
            self.entries[remote.name] = {
                "size": stat.st_size,
                "mtime_ns": stat.st_mtime_ns,
                "sha256": sha256,
                "from": remote.origin,
            }
            text = json.dumps({"files": self.entries}, indent=1, sort_keys=True) + "\n"
            write_bytes(self.file, text.encode(), overwrite=True)


def _survey(
    files: list[RemoteFile],
    folder: Path,
    ledger: Ledger,
    workers: int,
    report: Report,
    *,
    rehash: bool,
    hashing: bool = True,
) -> Survey:
    """Look at every file; hash those that are there in the right size and not remembered."""
    found, doubtful = Survey(folder, files), []
    for remote in files:
        target = folder / remote.name
        if not target.exists():
            continue
        if not target.is_file():
            raise RequestError(
                f"{target} is where a file should go, and is not a file; move it away"
            )
        if target.stat().st_size != remote.size:
            found.damaged.append(remote.name)
        elif remote.sha256 and not rehash and ledger.sha256(remote.name) == remote.sha256:
            found.good.append(remote.name)
        elif hashing:
            doubtful.append(remote)
        else:
            found.unsure.append(remote.name)
    moved = _Counter("hashing", 0, sum(remote.size for remote in doubtful), report)

    def check(remote: RemoteFile, stop: Event) -> None:
        hasher = Hasher(remote)
        with (folder / remote.name).open("rb") as file:
            hash_file(file, hasher, stop, moved)
        if hasher.verdict:
            found.damaged.append(remote.name)
        else:
            found.good.append(remote.name)
            ledger.add(remote, hasher.sha256)

    _in_parallel(check, doubtful, workers)
    parts = [(folder / remote.part, remote.size) for remote in found.missing]
    found.arrived = sum(min(part.stat().st_size, size) for part, size in parts if part.exists())
    return found


def _verify_offline(
    parts: Sequence[Part], folder: Path, ledger: Ledger, workers: int, report: Report
) -> Survey:
    """Hash what is remembered or published; RequestError when that is nothing, DownloadError that
    names what is damaged or gone.
    """
    files = []
    here = {
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and file.suffix != ".part"
    }
    names = {
        name
        for name in here | set(ledger.entries)
        if any(part.local(part.strip + name) is not None for part in parts)
    }
    unknown = []
    for name in sorted(names):
        entry = ledger.entries.get(name)
        size = int(entry["size"]) if entry else (folder / name).stat().st_size
        sha256 = str(entry["sha256"]) if entry else catalogue.known_sha256(name)
        if sha256:
            files.append(RemoteFile(name, name, str(entry and entry.get("from")), size, sha256))
        else:
            unknown.append(name)
    if not files:
        raise RequestError(
            f"{folder} has nothing that can be verified without a network; get online, and say the"
            " same again"
        )
    found = _survey(files, folder, ledger, workers, report, rehash=True)
    gone = [file.name for file in found.missing if file.name not in found.damaged]
    wrong = [
        f"{what}: {', '.join(sorted(names))}"
        for what, names in (("damaged", found.damaged), ("gone", gone))
        if names
    ]
    if wrong:
        raise DownloadError(
            f"{folder}: {'; '.join(wrong)}; get online, and say the same again to have them fetched"
        )
    if unknown:
        logger.warning(
            "not verified, their hashes are known to the hub alone: %s", ", ".join(unknown)
        )
    return found


def _refuse_outside(folder: Path, remote: RemoteFile) -> None:
    """RequestError when a link inside the folder would carry a file out of it."""
    home = folder.resolve()
    if not (home / remote.name).parent.resolve().is_relative_to(home):
        raise RequestError(
            f"{folder / remote.name} would be written outside of {folder}: a link on the way leads"
            " out; link the whole folder"
        )


def _refuse_full_disk(found: Survey) -> None:
    """RequestError with both numbers when the disk has no room for what has to come."""
    place = found.folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if found.needed > free:
        raise RequestError(
            f"{found.folder} needs {found.needed / 1e9:.1f} GB more ({found.needed:,} bytes), and"
            f" the disk has {free / 1e9:.1f} GB free ({free:,} bytes); make room, choose another"
            " disk with --local_dir, or a smaller --variant"
        )


def cached(repo: str) -> Path | None:
    """The folder of a repository's default branch in Hugging Face's own cache, when every file of
    it is there.
    """
    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


# --- at the same time
# --------------------------------------------------------------------------------------------------


class _Counter:
    """Adds up what the threads tell."""

    def __init__(self, what: str, done: int, total: int, report: Report) -> None:
        self.what, self.done, self.total, self.report = what, done, total, report
        self._lock = Lock()

    def __call__(self, moved: int) -> None:
        with self._lock:
            self.done += moved
            self.report(self.what, self.done, self.total)


def _in_parallel(work: Callable[[T, Event], None], items: Sequence[T], workers: int) -> None:
    """Do every item. A damaged file does not keep the others from coming; any other failure ends
    all, and so does Ctrl-C, at once.

    The threads are daemons: one that waits for a silent server must not keep the process from
    ending.
    """
    queue, failures, stop = deque(items), list[Exception](), Event()

    def run() -> None:
        while queue and not stop.is_set():
            try:
                item = queue.popleft()
            except IndexError:  # another thread was quicker
                return
            try:
                work(item, stop)
            except StoppedError:
                return
            except DamagedError as error:
                failures.append(error)
            except (
                Exception
            ) as error:  # whatever it is, it is raised below, in the thread that asked
                failures.insert(0, error)
                stop.set()

    threads = [Thread(target=run, daemon=True) for _ in range(min(workers, len(items)))]
    for thread in threads:
        thread.start()
    try:
        while not stop.is_set() and (alive := [thread for thread in threads if thread.is_alive()]):
            alive[0].join(0.05)
    finally:
        stop.set()
        for thread in threads:
            thread.join(1.0)
    if len(failures) > 1 and all(isinstance(failure, DamagedError) for failure in failures):
        raise DamagedError("; ".join(map(str, failures)))
    if failures:
        raise failures[0]
