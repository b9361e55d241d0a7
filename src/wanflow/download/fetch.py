"""Bring a folder up to date with a hub: survey what it has, fetch the difference, verify all.

The folder's ledger remembers which files were hashed, so a second run takes no time; a file whose
size or time of change differs since is hashed again.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock, Thread
from typing import TypeVar

from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from wanflow.checkpoint import published as catalogue
from wanflow.checkpoint.ledger import Ledger
from wanflow.checkpoint.published import Part, Variant
from wanflow.config import RequestError
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
from wanflow.outputs import free_bytes
from wanflow.units import file_size
from wanflow.untrusted import user_path

logger = logging.getLogger("wanflow")

LOCK = ".wanflow-download.lock"
T = TypeVar("T")

Report = Callable[[str, int, int], None]  # what is done, bytes done, bytes in total


@dataclass
class Survey:
    """What a folder has of what it should have; names of files."""

    folder: Path
    files: list[RemoteFile]
    verified: list[str] = field(default_factory=list)  # hashed, now or earlier, and right
    unverified: list[str] = field(default_factory=list)  # of the right size; a dry run only
    damaged: list[str] = field(default_factory=list)  # present with another content
    arrived: int = 0  # bytes in parts that a download resumes

    @property
    def missing(self) -> list[RemoteFile]:
        """The files to fetch."""
        present = {*self.verified, *self.unverified}
        return [file for file in self.files if file.name not in present]

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def needed(self) -> int:
        """Bytes still to fetch, for which the disk must have room."""
        return sum(file.size for file in self.missing) - self.arrived


def download(
    variant: str | Variant,
    folder: str | Path,
    hub: Hub | None = None,
    *,
    only: Sequence[str] = (),
    workers: int = 4,
    verify: bool = False,
    dry_run: bool = False,
    say: Say = logger.info,
    report: Report = lambda what, done, total: None,
) -> Survey:
    """Fetch what a folder lacks of a variant, so that every file in it is verified.

    Args:
        variant: a variant, or its name.
        folder: where the files go.
        hub: the source; Hugging Face by default.
        only: roles (`catalogue.ROLES`) to restrict it to; all by default.
        workers: files fetched at the same time.
        verify: hash every file again, also those that have not changed since they were hashed.
            Without a network this compares with the ledger and the published hashes, and fetches
            nothing.
        dry_run: fetch nothing; with `verify`, hash and name what is damaged.
        say: shows a message.
        report: shows the progress of hashing and of fetching.

    Returns:
        What was present before, and what was missing.

    Raises:
        RequestError: for what cannot be done: an unknown variant, no network, no access, no room on
            the disk.
        DownloadError: for what failed: the network for good, or a file that arrived damaged twice.
    """
    variant = catalogue.find(variant) if isinstance(variant, str) else variant
    parts = variant.select(only)
    folder = user_path(folder)
    if workers < 1:
        raise RequestError(f"--workers must be at least 1 (got {workers})")
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is a file; give a folder with --local_dir")
    hub, ledger = hub or HuggingFace(), Ledger(folder)
    try:
        files = hub.listing(variant, parts)
    except OfflineError as error:
        if not verify:
            raise
        say(f"{error}; checking the files here without it")
        return _verify_offline(parts, folder, ledger, workers, report)
    for file in files:
        _refuse_outside(folder, file)
        known = catalogue.known_sha256(f"{file.origin.partition('@')[0]}/{file.path}")
        if known and file.sha256 and known != file.sha256:
            say(
                f"{file.origin} has another {file.path} than the one wanflow was made with (sha256"
                f" {file.sha256}, not {known})"
            )
    survey = _survey(
        files, folder, ledger, workers, report, rehash=verify, hashing=verify or not dry_run
    )
    for name in survey.damaged:
        say(f"{name} is damaged or of another version{'' if dry_run else '; fetching it again'}")
    if not dry_run and survey.missing:
        _refuse_full_disk(survey)
        _fetch_missing(survey, hub, ledger, workers, say, report)
    return survey


def _fetch_missing(
    survey: Survey, hub: Hub, ledger: Ledger, workers: int, say: Say, report: Report
) -> None:
    """Fetch under a lock: two downloads into one folder would damage each other's parts."""
    survey.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(survey.folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise RequestError(
            f"another download into {survey.folder} is running; wait for it, or stop it"
        ) from None
    try:
        on_bytes = _Counter("fetching", survey.total - survey.needed, survey.total, report)

        def fetch(remote: RemoteFile, stop: Event) -> None:
            sha256 = hub.download_file(remote, survey.folder, stop, on_bytes, say)
            ledger.add(remote.name, sha256, remote.origin)

        # The largest first: the last to end should not be one that has only begun.
        _in_parallel(fetch, sorted(survey.missing, key=lambda file: -file.size), workers)
    finally:
        lock.release()


# what a folder has


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
    """Look at every file; hash those of the right size that the ledger does not vouch for."""
    survey, to_hash = Survey(folder, files), []
    for remote in files:
        target = folder / remote.name
        if not target.exists():
            continue
        if not target.is_file():
            raise RequestError(
                f"{target} is where a file should go, and is not a file; move it away"
            )
        if target.stat().st_size != remote.size:
            survey.damaged.append(remote.name)
        elif remote.sha256 and not rehash and ledger.sha256(remote.name) == remote.sha256:
            survey.verified.append(remote.name)
        elif hashing:
            to_hash.append(remote)
        else:
            survey.unverified.append(remote.name)
    on_bytes = _Counter("hashing", 0, sum(remote.size for remote in to_hash), report)

    def check(remote: RemoteFile, stop: Event) -> None:
        hasher = Hasher(remote)
        with (folder / remote.name).open("rb") as file:
            hash_file(file, hasher, stop, on_bytes)
        if hasher.mismatch:
            survey.damaged.append(remote.name)
        else:
            survey.verified.append(remote.name)
            ledger.add(remote.name, hasher.sha256, remote.origin)

    _in_parallel(check, to_hash, workers)
    parts = [(folder / remote.part, remote.size) for remote in survey.missing]
    survey.arrived = sum(min(part.stat().st_size, size) for part, size in parts if part.exists())
    return survey


def _verify_offline(
    parts: Sequence[Part], folder: Path, ledger: Ledger, workers: int, report: Report
) -> Survey:
    """Hash every file whose hash the ledger or the catalogue knows.

    Raises:
        RequestError: when there is no such file.
        DownloadError: naming what is damaged or gone.
    """
    present = {
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and file.suffix != ".part"
    }
    files, unknown = [], []
    for name in sorted(present | set(ledger.entries)):
        if all(part.local(part.strip + name) is None for part in parts):
            continue
        entry = ledger.entries.get(name)
        size = int(entry["size"]) if entry else (folder / name).stat().st_size
        sha256 = str(entry["sha256"]) if entry else catalogue.known_sha256(name)
        if sha256:
            files.append(RemoteFile(name, name, str(entry and entry.get("from")), size, sha256))
        else:
            unknown.append(name)
    if not files:
        raise RequestError(
            f"{folder} has nothing that can be verified without a network; connect and run the same"
            " command"
        )
    survey = _survey(files, folder, ledger, workers, report, rehash=True)
    gone = [file.name for file in survey.missing if file.name not in survey.damaged]
    faults = [
        f"{what}: {', '.join(sorted(names))}"
        for what, names in (("damaged", survey.damaged), ("gone", gone))
        if names
    ]
    if faults:
        raise DownloadError(
            f"{folder}: {'; '.join(faults)}; connect and run the same command to fetch them"
        )
    if unknown:
        logger.warning("not verified, only the hub has their hashes: %s", ", ".join(unknown))
    return survey


def _refuse_outside(folder: Path, remote: RemoteFile) -> None:
    """Refuse a file that a link inside the folder would carry out of it."""
    home = folder.resolve()
    if not (home / remote.name).parent.resolve().is_relative_to(home):
        raise RequestError(
            f"{folder / remote.name} would be written outside of {folder}: a link on the way leads"
            " out; link the folder itself"
        )


def _refuse_full_disk(survey: Survey) -> None:
    """Refuse what the disk has no room for, with both numbers."""
    free = free_bytes(survey.folder)
    if survey.needed > free:
        raise RequestError(
            f"{survey.folder} needs {file_size(survey.needed)} more ({survey.needed:,} bytes),"
            f" and the disk has {file_size(free)} free ({free:,} bytes); make room, choose"
            " another disk with --local_dir, or a smaller --variant"
        )


def cached(repo: str) -> Path | None:
    """Return the folder of a repository in Hugging Face's own cache, when it is complete there."""
    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


# in threads


class _Counter:
    """Adds up the bytes of all threads and reports the sum."""

    def __init__(self, what: str, done: int, total: int, report: Report) -> None:
        self.what, self.done, self.total, self.report = what, done, total, report
        self._lock = Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self.done += count
            self.report(self.what, self.done, self.total)


def _in_parallel(work: Callable[[T, Event], None], items: Sequence[T], workers: int) -> None:
    """Do every item in a few threads.

    A damaged file does not stop the others; any other failure does, and so does Ctrl-C, at once.
    The threads are daemons: one that waits for a silent server must not keep the process alive.
    """
    queue, failures, stop = deque(items), list[Exception](), Event()

    def run() -> None:
        while queue and not stop.is_set():
            try:
                item = queue.popleft()
            except IndexError:  # another thread took it
                return
            try:
                work(item, stop)
            except StoppedError:
                return
            except DamagedError as error:
                failures.append(error)
            except Exception as error:  # raised below, in the thread that called
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
