"""Keep jobs as rows by SQL that SQLite and Postgres both speak.

Every change is one statement that names the attempt which makes it, so two processes never need a
lock of ours: the second finds no row.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from wanflow.serve.jobs import (
    ATTEMPTS,
    FINAL,
    STATES,
    FullError,
    Job,
    Progress,
    Standing,
    State,
    StoreError,
    Worker,
)

# `{serial}` is the only word that the two databases spell differently.
TABLES = (
    """CREATE TABLE IF NOT EXISTS wanflow_jobs (
        sequence {serial},
        id TEXT UNIQUE NOT NULL,
        state TEXT NOT NULL,
        affinity TEXT NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0,
        owner TEXT NOT NULL DEFAULT '',
        cancel INTEGER NOT NULL DEFAULT 0,
        idempotency TEXT UNIQUE,
        request TEXT NOT NULL,
        about TEXT NOT NULL,
        progress TEXT NOT NULL DEFAULT '{{}}',
        result TEXT NOT NULL DEFAULT '{{}}',
        error TEXT,
        story TEXT NOT NULL DEFAULT '[]',
        created_at DOUBLE PRECISION NOT NULL,
        started_at DOUBLE PRECISION,
        completed_at DOUBLE PRECISION,
        left_out INTEGER NOT NULL DEFAULT 0
    )""",
    "CREATE INDEX IF NOT EXISTS wanflow_jobs_state ON wanflow_jobs (state, sequence)",
    """CREATE TABLE IF NOT EXISTS wanflow_workers (
        id TEXT PRIMARY KEY,
        document TEXT NOT NULL,
        beats BIGINT NOT NULL DEFAULT 0,
        seen_at DOUBLE PRECISION NOT NULL
    )""",
)
COLUMNS = (
    "id, state, affinity, attempts, owner, cancel, idempotency, request, about, progress, result,"
    " error, story, created_at, started_at, completed_at"
)
STORY = 20  # attempts that are remembered: those that find the disk full may be many
MINE = "id = ? AND state = 'in_progress' AND owner = ? AND attempts = ?"

Run = Callable[[str, Sequence[Any]], list[Sequence[Any]]]


class Rows:
    """The statements; `run` carries one out, in a transaction of its own, and returns its rows.

    Statements are written with `?` in the place of values.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def submit(self, job: Job, limit: int | None = None) -> tuple[Job, bool]:
        """See `Store`."""
        if job.idempotency is not None:
            earlier = self.run(
                f"SELECT {COLUMNS} FROM wanflow_jobs WHERE idempotency = ?", [job.idempotency]
            )
            if earlier:
                return _job(earlier[0]), False
        full = "(SELECT count(*) FROM wanflow_jobs WHERE state = 'queued')"
        made = self.run(
            "INSERT INTO wanflow_jobs (id, state, affinity, idempotency, request, about,"
            f" created_at) SELECT ?, 'queued', ?, ?, ?, ?, ? WHERE {full} < ?"
            f" ON CONFLICT DO NOTHING RETURNING {COLUMNS}",
            [
                job.id,
                job.key,
                job.idempotency,
                json.dumps(dict(job.request)),
                json.dumps(dict(job.about)),
                job.created_at or time.time(),
                2**31 if limit is None else limit,
            ],
        )
        if made:
            return _job(made[0]), True
        same = self.run(
            f"SELECT {COLUMNS} FROM wanflow_jobs WHERE id = ? OR idempotency = ?",
            [job.id, job.idempotency],
        )
        if same:
            return _job(same[0]), False
        raise FullError(self.counts()["queued"])

    def get(self, id: str) -> Job | None:
        """See `Store`."""
        return _one(self.run(f"SELECT {COLUMNS} FROM wanflow_jobs WHERE id = ?", [id]))

    def page(
        self,
        after: str | None = None,
        limit: int = 20,
        newest_first: bool = True,
        states: tuple[State, ...] = STATES,
    ) -> list[Job]:
        """See `Store`."""
        sign, order = ("<", "DESC") if newest_first else (">", "ASC")
        marks = ", ".join("?" for _ in states)
        where, values = f"state IN ({marks})", list[Any](states)
        if after is not None:
            where += f" AND sequence {sign} (SELECT sequence FROM wanflow_jobs WHERE id = ?)"
            values.append(after)
        return self._jobs(
            f"SELECT {COLUMNS} FROM wanflow_jobs WHERE {where} ORDER BY sequence {order} LIMIT ?",
            [*values, limit],
        )

    def counts(self) -> dict[State, int]:
        """See `Store`."""
        rows = self.run("SELECT state, count(*) FROM wanflow_jobs GROUP BY state", [])
        found = {state: int(count) for state, count in rows}
        return {state: found.get(state, 0) for state in STATES}

    def waiting(self) -> bool:
        """Return whether a job is queued."""
        return bool(self.run("SELECT 1 FROM wanflow_jobs WHERE state = 'queued' LIMIT 1", []))

    def ahead(self, id: str) -> int:
        """See `Store`."""
        found = self.run(
            "SELECT count(*) FROM wanflow_jobs WHERE state = 'queued' AND sequence <"
            " (SELECT sequence FROM wanflow_jobs WHERE id = ?)",
            [id],
        )
        return int(found[0][0])

    def held(self, worker: str) -> Job | None:
        """Return the job that a worker has claimed already: the answer to its claim was lost."""
        where = "state = 'in_progress' AND owner = ?"
        return _one(self.run(f"SELECT {COLUMNS} FROM wanflow_jobs WHERE {where}", [worker]))

    def claim_where(self, worker: str, where: str, values: Iterable[Any]) -> Job | None:
        """Begin an attempt at the first queued job that a condition holds for."""
        first = (
            "SELECT sequence FROM wanflow_jobs WHERE state = 'queued' AND"
            f" {where} ORDER BY sequence LIMIT 1"
        )
        return _one(
            self.run(
                "UPDATE wanflow_jobs SET state = 'in_progress', attempts = attempts + 1, owner = ?,"
                " started_at = COALESCE(started_at, ?)"
                f" WHERE state = 'queued' AND sequence = ({first}) RETURNING {COLUMNS}",
                [worker, time.time(), *values],
            )
        )

    def report(self, job: Job, progress: Progress) -> Standing:
        """See `Store`."""
        found = self.run(
            f"UPDATE wanflow_jobs SET progress = ? WHERE {MINE} RETURNING cancel",
            [json.dumps(asdict(progress)), *_mine(job)],
        )
        if not found:
            return Standing.LOST
        return Standing.CANCELLED if found[0][0] else Standing.OURS

    def finish(
        self,
        job: Job,
        state: State,
        result: Mapping[str, Any] | None = None,
        error: Mapping[str, str] | None = None,
    ) -> bool:
        """See `Store`."""
        found = self.run(
            "UPDATE wanflow_jobs SET state = ?, result = ?, error = ?, completed_at = ?"
            f" WHERE {MINE} RETURNING id",
            [
                state,
                json.dumps(dict(result or {})),
                None if error is None else json.dumps(dict(error)),
                time.time(),
                *_mine(job),
            ],
        )
        if found:
            return True
        now = self.get(job.id)  # the answer to an earlier call may have been lost
        return now is not None and (now.state, *_mine(now)) == (state, *_mine(job))

    def put_back(self, job: Job, why: str, counts: bool = True) -> Job | None:
        """See `Store`."""
        now = self.get(job.id)
        if now is None or _mine(now) != _mine(job):
            return None
        story = [*now.story, f"attempt {now.attempts}: {why}"][-STORY:]
        again = "cancel = 0" + (f" AND attempts - left_out < {ATTEMPTS}" if counts else "")
        back = _one(
            self.run(
                "UPDATE wanflow_jobs SET state = 'queued', owner = '', progress = '{}', story = ?,"
                f" left_out = left_out + ? WHERE {MINE} AND {again} RETURNING {COLUMNS}",
                [json.dumps(story), 0 if counts else 1, *_mine(job)],
            )
        )
        error = {"code": "worker_failed", "message": "; ".join(story)}
        return back or _one(
            self.run(
                "UPDATE wanflow_jobs SET state = CASE cancel WHEN 1 THEN 'cancelled' ELSE 'failed'"
                " END, error = CASE cancel WHEN 1 THEN NULL ELSE ? END, story = ?,"
                f" completed_at = ? WHERE {MINE} RETURNING {COLUMNS}",
                [json.dumps(error), json.dumps(story), time.time(), *_mine(job)],
            )
        )

    def cancel(self, id: str) -> Job | None:
        """See `Store`."""
        return _one(
            self.run(
                "UPDATE wanflow_jobs SET cancel = 1, completed_at = CASE state WHEN 'queued' THEN"
                " ? ELSE completed_at END, state = CASE state WHEN 'queued' THEN 'cancelled'"
                " ELSE state END WHERE id = ? AND state IN ('queued', 'in_progress')"
                f" RETURNING {COLUMNS}",
                [time.time(), id],
            )
        ) or self.get(id)

    def delete(self, id: str) -> Job | None:
        """See `Store`."""
        marks = ", ".join("?" for _ in FINAL)
        return _one(
            self.run(
                f"DELETE FROM wanflow_jobs WHERE id = ? AND state IN ({marks}) RETURNING {COLUMNS}",
                [id, *FINAL],
            )
        )

    def enrol(self, worker: Worker) -> None:
        """See `Store`."""
        self.run(
            "INSERT INTO wanflow_workers (id, document, beats, seen_at) VALUES (?, ?, 1, ?)"
            " ON CONFLICT (id) DO UPDATE SET document = excluded.document,"
            " beats = wanflow_workers.beats + 1, seen_at = excluded.seen_at",
            [worker.id, json.dumps(asdict(worker)), time.time()],
        )

    def leave(self, worker: str) -> None:
        """See `Store`."""
        self.run("DELETE FROM wanflow_workers WHERE id = ?", [worker])

    def beats(self) -> dict[str, tuple[int, Worker]]:
        """Return how often each worker has shown that it lives, and what it says of itself."""
        found = self.run("SELECT id, beats, document FROM wanflow_workers", [])
        return {id: (int(beats), Worker(**json.loads(text))) for id, beats, text in found}

    def _jobs(self, statement: str, values: Sequence[Any]) -> list[Job]:
        return [_job(row) for row in self.run(statement, values)]


def _mine(job: Job) -> tuple[str, str, int]:
    return job.id, job.owner, job.attempts


def _one(rows: list[Sequence[Any]]) -> Job | None:
    return _job(rows[0]) if rows else None


def _job(row: Sequence[Any]) -> Job:
    try:
        return _read(*row)
    except (ValueError, TypeError) as error:
        raise StoreError(f"the row of {row[0]} is damaged: {error}; delete the row") from error


def _read(
    id: str,
    state: State,
    key: str,
    attempts: int,
    owner: str,
    cancel: int,
    idempotency: str | None,
    request: str,
    about: str,
    progress: str,
    result: str,
    error: str | None,
    story: str,
    created_at: float,
    started_at: float | None,
    completed_at: float | None,
) -> Job:
    """Read the values of `COLUMNS`."""
    return Job(
        id=id,
        request=json.loads(request),
        key=key,
        state=state,
        attempts=attempts,
        owner=owner,
        cancel=bool(cancel),
        progress=Progress(**json.loads(progress)),
        result=json.loads(result),
        error=None if error is None else json.loads(error),
        story=tuple(json.loads(story)),
        about=json.loads(about),
        idempotency=idempotency,
        created_at=created_at,
        started_at=started_at,
        completed_at=completed_at,
    )
