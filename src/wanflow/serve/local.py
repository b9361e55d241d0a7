"""Keep the jobs of one machine in SQLite: nothing to install, nothing to run.

The file is written with a log ahead of it and every commit waits for the disk, so a job that was
accepted survives a loss of power. One supervisor owns a folder at a time (`own_folder`).
"""

from __future__ import annotations

import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wanflow.config import RequestError
from wanflow.serve.jobs import BEAT_S, SILENT_S, Job, StoreError, Worker, process_runs
from wanflow.serve.rows import TABLES, Rows

FILE = "jobs.sqlite"
OWNER = "supervisor"  # a file that says who owns the folder; its lock stands beside it
WAIT_S = 0.2  # between two looks at the queue
BUSY_S = 10.0  # for another process that writes
SCHEMA = 0  # `user_version` of the file; a version of wanflow that needs other tables counts on

DAMAGED = "the file is damaged; move it away and start again: videos stay, their list does not"
SHUT = (  # SQLite takes 512 bytes
    "the file cannot be opened or written; choose a folder that belongs to you, of a path below 480"
    " bytes"
)
ADVICE = {
    sqlite3.SQLITE_FULL: "the disk is full; free some space",
    sqlite3.SQLITE_IOERR: "the disk is full or failing; free some space, or choose another folder",
    sqlite3.SQLITE_BUSY: "another process writes for too long; try again",
    sqlite3.SQLITE_ERROR: DAMAGED,  # a statement of ours that does not fit the file
    sqlite3.SQLITE_CORRUPT: DAMAGED,
    sqlite3.SQLITE_NOTADB: DAMAGED,
    sqlite3.SQLITE_CANTOPEN: SHUT,
    sqlite3.SQLITE_READONLY: SHUT,
    sqlite3.SQLITE_PERM: SHUT,
}


class LocalStore(Rows):
    """Jobs in `folder / FILE`, which every process of a machine may open.

    A statement takes a free connection, or opens one; so there are as many as threads that ask at
    the same time, however many threads come and go.
    A worker is dead when its count of beats has stood still for `silent_s` while this process
    watched: the machine's clock means nothing, nor does time in which nobody ran, or could write.

    Raises:
        RequestError: for a folder that cannot be written, or a file that is no database.
    """

    def __init__(self, folder: Path, silent_s: float = SILENT_S) -> None:
        super().__init__(self._run)
        self._file, self._silent_s = folder / FILE, silent_s
        self._free: list[sqlite3.Connection] = []
        self._watch = threading.Lock()
        self._watched_s, self._looked = 0.0, time.monotonic()
        self._seen: dict[str, tuple[int, float]] = {}  # worker: beats, and when they changed
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file.touch(0o600)  # prompts are private; the log beside it takes the same mode
            self._opened = self._identity()
            [(version,)] = self.run("PRAGMA user_version", [])
            if version > SCHEMA:
                raise RequestError(
                    f"{self._file}: a newer wanflow wrote it (tables of version {version}, here"
                    f" {SCHEMA}); try: pip install -U wanflow"
                )
            for statement in TABLES:
                self.run(statement.format(serial="INTEGER PRIMARY KEY AUTOINCREMENT"), [])
        except OSError as error:
            raise RequestError(f"{self._file}: {error.strerror}; choose another folder") from None
        except StoreError as error:
            if _advice(error.__cause__) in (DAMAGED, SHUT):  # trying again helps nobody
                raise RequestError(str(error)) from None
            raise

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._file, timeout=BUSY_S, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    def _identity(self) -> tuple[int, int] | None:
        """Return which file lies at our place."""
        try:
            found = self._file.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _run(self, statement: str, values: Sequence[Any]) -> list[Sequence[Any]]:
        if self._identity() != self._opened:  # open connections would keep jobs in what is deleted
            raise StoreError(
                f"{self._file}: it was removed or replaced; put it back, or start wanflow again"
            )
        try:
            try:
                connection = self._free.pop()
            except IndexError:
                connection = self._connect()
            found = connection.execute(statement, values).fetchall()
        except (sqlite3.Error, UnicodeDecodeError) as error:  # nobody holds the connection now
            # An error without a code is a text that cannot be read, and shows it: a prompt, maybe.
            words = error if hasattr(error, "sqlite_errorcode") else "a text is no UTF-8"
            raise StoreError(f"{self._file}: {words}: {_advice(error)}") from error
        self._free.append(connection)
        return found

    def claim(self, worker: str, prefer: str | None = None) -> Job | None:
        """See `Store`."""
        if held := self.held(worker):
            return held
        if prefer is not None and (job := self.claim_where(worker, "affinity = ?", [prefer])):
            return job
        return self.claim_where(worker, "1 = 1", [])

    def workers(self) -> list[Worker]:
        """See `Store`."""
        return [worker for _, worker, lives in self._watched() if lives]

    def _watched(self) -> list[tuple[int, Worker, bool]]:
        """Return beats and document of each worker, and whether it lives."""
        found = self.beats()
        with self._watch:
            now = time.monotonic()
            self._watched_s += min(now - self._looked, 2 * BEAT_S)  # longer, and we were frozen too
            self._looked = now
            for id, (beats, _) in found.items():
                if self._seen.get(id, (-1, 0.0))[0] != beats:
                    self._seen[id] = beats, self._watched_s
            return [
                (beats, worker, self._watched_s - self._seen[id][1] <= self._silent_s)
                for id, (beats, worker) in found.items()
            ]

    def recover(self, everything: bool = False) -> list[Job]:
        """Put back the jobs of workers that no longer live.

        Args:
            everything: this process has just taken the folder: a worker whose process is gone from
                this machine is so at once.
        """
        try:
            for id in self.beats() if everything else ():
                if not _runs(id):
                    self.leave(id)
            # Where nobody can write, no worker can show that it lives.
            self.run("UPDATE wanflow_workers SET seen_at = seen_at", [])
            # Jobs first: a worker that comes and claims after this look is none of our business.
            claimed = self.page(limit=2**31, newest_first=False, states=("in_progress",))
            living = self._bury()
            back = [
                self.put_back(job, "its worker ended") for job in claimed if job.owner not in living
            ]
        except StoreError:  # then no worker could show that it lives either
            self._seen.clear()
            raise
        return [job for job in back if job is not None]

    def _bury(self) -> set[str]:
        """Forget the workers that are dead; return the others."""
        living = set()
        for beats, worker, lives in self._watched():
            if lives:
                living.add(worker.id)
            else:  # unless it beats at this moment
                self.run(
                    "DELETE FROM wanflow_workers WHERE id = ? AND beats = ?", [worker.id, beats]
                )
                self._seen.pop(worker.id, None)
        return living

    def wait(self, seconds: float) -> None:
        """See `Store`."""
        until = time.monotonic() + seconds
        while not self.waiting() and (left := until - time.monotonic()) > 0:
            time.sleep(min(WAIT_S, left))

    def close(self) -> None:
        """See `Store`."""
        while self._free:
            self._free.pop().close()


def _runs(worker: str) -> bool:
    """Return whether the process in a worker's id runs on this machine.

    Where the number is another process's by now, the worker is found to be silent later.
    """
    machine, _, number = worker.rpartition("-")[0].rpartition("-")
    return machine == socket.gethostname() and process_runs(number)


def _advice(error: BaseException | None) -> str:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    return ADVICE.get(code & 0xFF, "try again")


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Be the only supervisor of a data folder for a while; the system frees it if this one dies.

    Raises:
        RequestError: where another one has it, with its process and machine.
    """
    from filelock import FileLock, Timeout

    who = folder / OWNER
    lock = FileLock(folder / f"{OWNER}.lock", thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0.2)
        who.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    except Timeout:
        holder = who.read_text(encoding="utf-8").strip() if who.exists() else "another process"
        raise RequestError(
            f"{folder} is served by {holder} already; stop it, or give another --data_dir"
        ) from None
    except OSError as error:
        lock.release()
        raise RequestError(f"{folder}: {error.strerror}; choose another --data_dir") from None
    try:
        yield
    finally:
        lock.release()
