"""Keep the jobs of one machine in SQLite: nothing to install, nothing to run.

The file is written with a log ahead of it and every commit waits for the disk, so a job that was
accepted survives a loss of power. One supervisor owns a folder at a time.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wanflow.serve.jobs import Job, StoreError, Worker
from wanflow.serve.rows import TABLES, Rows

FILE = "jobs.sqlite"
SILENT_S = 30.0  # without a beat, a worker counts as dead
WAIT_S = 0.2  # between two looks at the queue
BUSY_S = 10.0  # for another process that writes


class LocalStore(Rows):
    """Jobs in `folder / FILE`, which every process of a machine may open.

    Each thread has a connection of its own.
    Liveness is watched by this process's own clock: a worker is dead when its count of beats has
    stood still for `SILENT_S`, so a change of the machine's clock means nothing.
    """

    def __init__(self, folder: Path, silent_s: float = SILENT_S) -> None:
        super().__init__(self._run)
        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._silent_s = folder / FILE, silent_s
        self._threads = threading.local()
        self._open, self._guard = list[sqlite3.Connection](), threading.Lock()
        self._seen: dict[str, tuple[int, float]] = {}  # worker: beats, and when they changed
        for statement in TABLES:
            self.run(statement.format(serial="INTEGER PRIMARY KEY AUTOINCREMENT"), [])

    def _connection(self) -> sqlite3.Connection:
        found: sqlite3.Connection | None = getattr(self._threads, "connection", None)
        if found is None:
            found = sqlite3.connect(
                self._file, timeout=BUSY_S, isolation_level=None, check_same_thread=False
            )
            found.execute("PRAGMA journal_mode = WAL")
            found.execute("PRAGMA synchronous = FULL")
            self._threads.connection = found
            with self._guard:
                self._open.append(found)
        return found

    def _run(self, statement: str, values: Sequence[Any]) -> list[Sequence[Any]]:
        try:
            return self._connection().execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise StoreError(f"{self._file}: {error}") from error

    def claim(self, worker: str, prefer: str | None = None) -> Job | None:
        """See `Store`."""
        if held := self.held(worker):
            return held
        if prefer is not None and (job := self.claim_where(worker, "affinity = ?", [prefer])):
            return job
        return self.claim_where(worker, "1 = 1", [])

    def workers(self) -> list[Worker]:
        """See `Store`."""
        return [worker for _, worker in self._living().values()]

    def _living(self) -> dict[str, tuple[int, Worker]]:
        now, found = time.monotonic(), self.beats()
        for id, (beats, _) in found.items():
            if self._seen.get(id, (-1, 0.0))[0] != beats:
                self._seen[id] = beats, now
        return {
            id: entry for id, entry in found.items() if now - self._seen[id][1] <= self._silent_s
        }

    def recover(self, everything: bool = False) -> list[Job]:
        """Put back the jobs of workers that no longer live.

        Args:
            everything: no worker can live: this process has just taken the folder.
        """
        if everything:
            self.run("DELETE FROM wanflow_workers", [])
        living = self._living()
        back = []
        for job in self.page(limit=2**31, newest_first=False, states=("in_progress",)):
            if job.owner not in living and (now := self.put_back(job, "its worker ended")):
                back.append(now)
        return back

    def wait(self, seconds: float) -> None:
        """See `Store`."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.counts()["queued"]:
            time.sleep(min(WAIT_S, seconds))

    def close(self) -> None:
        """See `Store`."""
        with self._guard:
            for connection in self._open:
                connection.close()
            self._open.clear()
        self._threads = threading.local()
