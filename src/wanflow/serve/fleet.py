"""Keep the jobs of a fleet in Postgres, delivered by procrastinate.

Two records make a job: our row, which is the truth, and an entry of the engine while the job is
queued or in progress. Both lie in one database and change in one transaction, so a crash leaves
both as they were. The engine hands out entries (one each, in order), keeps the heartbeats of
workers and finds those that stall; the claim of our row decides, so a second entry is harmless.

Rows and entries are locked in one order: an entry that waits, then its row; a row in progress, then
its entry. The order of entries is that of rows: an entry's priority is its row's number.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, TypeVar

import psycopg
from procrastinate.exceptions import AlreadyEnqueued, ConnectorException
from procrastinate.jobs import Job as Entry
from procrastinate.jobs import Status
from procrastinate.manager import JobManager, get_channel_for_queues
from procrastinate.schema import SchemaManager
from procrastinate.sync_psycopg_connector import SyncPsycopgConnector
from psycopg import sql
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import ConnectionPool

from wanflow.config import RequestError
from wanflow.serve.jobs import SILENT_S, Job, State, StoreError, Worker
from wanflow.serve.rows import TABLES, Rows

TASK = "wanflow.make"
(CHANNEL,) = get_channel_for_queues(None)
LOCK = 0x77616E66  # of the database: one that submits, or makes the tables
ANSWER_S = 5.0  # for a connection, and again for a statement; then the database counts as away
FORGET_S = 86400.0  # a worker that was silent for this time
EPOCH = datetime.fromtimestamp(0, UTC)  # "now" by any clock: the engine compares with its own

# What the network swallows is noticed in about ten seconds too.
CONNECTION: dict[str, Any] = {
    "autocommit": True,
    "fallback_application_name": "wanflow",
    "connect_timeout": 4,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
# A process that stands still in the middle of a transaction must not stop the others.
LIMITS = (
    "SET idle_in_transaction_session_timeout = '10s'; SET statement_timeout = '4s';"
    " SET lock_timeout = '3s'"
)

T = TypeVar("T")


class FleetStore(Rows):
    """Jobs in a Postgres database, which every process of every machine may open.

    Liveness is watched by the database's clock alone. Nor does a jump of that clock do anything,
    or a database that was away: who looks stalled after half of `silent_s` must look so for the
    other half too, and one sign of life between is enough.

    Args:
        url: `postgresql://...`, of a database of our own. Its password is never printed.
        silent_s: after which a worker counts as dead.

    Raises:
        RequestError: for a URL that is none, or a database with another application's queue.
        StoreError: where the database cannot be reached.
    """

    def __init__(self, url: str, silent_s: float = SILENT_S) -> None:
        super().__init__(self._run)
        self._place, self._silent_s = place(url), silent_s
        self._suspects: dict[tuple[str, int], float] = {}  # attempt: when it first looked stalled
        self._inside = threading.local()
        with self._asked(), psycopg.connect(url, **CONNECTION) as connection:
            try:
                _make_tables(connection, self._place)
            except psycopg.errors.InsufficientPrivilege as error:
                raise RequestError(
                    f"{self._place}: {_first_line(error)}; wanflow makes its tables itself: let the"
                    " user own the database, createdb --owner=USER wanflow"
                ) from None
        logging.getLogger("psycopg.pool").setLevel(
            logging.ERROR
        )  # each call says so once, in words
        self._pool = ConnectionPool(
            url,
            connection_class=_Bounded,
            kwargs=CONNECTION,
            min_size=1,
            max_size=8,
            timeout=ANSWER_S,
            reconnect_timeout=ANSWER_S,
            configure=_limit,
            check=ConnectionPool.check_connection,
            open=True,
        )

    @contextmanager
    def _asked(self) -> Iterator[None]:
        try:
            yield
        except (psycopg.Error, ConnectorException) as error:
            cause = error.__cause__ if isinstance(error, ConnectorException) else error
            words = _first_line(cause)
            answered = "FATAL" in words or not isinstance(cause, psycopg.OperationalError)
            advice = "" if answered else "; is the database running, and the address right?"
            raise StoreError(f"{self._place}: {words}{advice}") from error

    @contextmanager
    def _transaction(self) -> Iterator[JobManager]:
        """Yield the engine; what it does and what `run` does happens as one, or not at all."""
        with self._asked(), self._pool.connection() as connection, connection.transaction():
            self._inside.connection = connection
            try:
                yield JobManager(_Inside(connection))
            finally:
                del self._inside.connection

    def _run(self, statement: str, values: Sequence[Any]) -> list[Sequence[Any]]:
        connection: psycopg.Connection | None = getattr(self._inside, "connection", None)
        if connection is None:
            with self._transaction():
                return self._run(statement, values)
        cursor = connection.execute(statement.replace("?", "%s").encode(), values)
        return list[Sequence[Any]](cursor.fetchall()) if cursor.description else []

    def submit(self, job: Job, limit: int | None = None) -> tuple[Job, bool]:
        """See `Store`. One at a time over the whole fleet, so `limit` is exact."""
        with self._transaction() as engine:
            self.run("SELECT pg_advisory_xact_lock(?)", [LOCK])
            kept, new = super().submit(job, limit)
            if new:
                self._defer(engine, job.id)
        return kept, new

    def _defer(self, engine: JobManager, id: str) -> None:
        """Give the engine an entry for a queued row."""
        [(number, key)] = self.run("SELECT sequence, affinity FROM wanflow_jobs WHERE id = ?", [id])
        entry = Entry(
            id=None,
            queue=_queue(key),
            lock=None,
            queueing_lock=id,
            task_name=TASK,
            priority=-number,
        )
        _now(engine.defer_job_async(entry))

    def claim(self, worker: str, prefer: str | None = None) -> Job | None:
        """See `Store`."""
        with self._transaction() as engine:
            if held := self.held(worker):
                return held
            number = self._number(worker)
            for queues in ([_queue(prefer)], None) if prefer is not None else (None,):
                while entry := _now(engine.fetch_job(queues, number)):
                    if job := self.claim_where(worker, "id = ?", [entry.queueing_lock]):
                        return job
                    _drop(engine, entry)  # the job was cancelled, or had two entries
        return None

    def finish(
        self,
        job: Job,
        state: State,
        result: Mapping[str, Any] | None = None,
        error: Mapping[str, str] | None = None,
    ) -> bool:
        """See `Store`."""
        with self._transaction() as engine:
            ours = super().finish(job, state, result, error)
            if ours:
                _drop(engine, *_entries(engine, job.id))
        return ours

    def put_back(self, job: Job, why: str, counts: bool = True) -> Job | None:
        """See `Store`."""
        with self._transaction() as engine:
            now = super().put_back(job, why, counts)
            entries = _entries(engine, job.id) if now else []
            if now and now.final:
                _drop(engine, *entries)
            elif now:
                for entry in entries:
                    _now(engine.retry_job_by_id_async(_id(entry), EPOCH))
                self.run("SELECT pg_notify(?, '{}')", [CHANNEL])  # the engine tells only new ones
        return now

    def cancel(self, id: str) -> Job | None:
        """See `Store`. Row and entry change one after the other; `claim` drops what is left."""
        job = super().cancel(id)
        with self._transaction() as engine:
            for entry in _entries(engine, id):
                _now(engine.cancel_job_by_id_async(_id(entry), abort=True, delete_job=True))
        return job

    def enrol(self, worker: Worker) -> None:
        """See `Store`."""
        with self._transaction() as engine:
            super().enrol(worker)
            number = self._number(worker.id)
            if number is not None:
                _now(engine.update_heartbeat(number))
            else:
                self.run(
                    "UPDATE wanflow_workers SET engine = ? WHERE id = ?",
                    [_now(engine.register_worker()), worker.id],
                )

    def _number(self, worker: str) -> Any:
        """Return the engine's number of a worker; without one its jobs count as stalled."""
        found = self.run("SELECT engine FROM wanflow_workers WHERE id = ?", [worker])
        return found[0][0] if found else None

    def leave(self, worker: str) -> None:
        """See `Store`."""
        with self._transaction() as engine:
            number = self._number(worker)
            super().leave(worker)
            if number is not None:
                _now(engine.unregister_worker(number))

    def workers(self) -> list[Worker]:
        """See `Store`."""
        found = self.run(
            "SELECT ours.id FROM wanflow_workers ours JOIN procrastinate_workers theirs"
            " ON theirs.id = ours.engine"
            " WHERE theirs.last_heartbeat > now() - ? * interval '1 second'",
            [self._silent_s],
        )
        living = {id for (id,) in found}
        return [worker for _, worker in self.beats().values() if worker.id in living]

    def recover(self) -> list[Job]:
        """See `Store`. Each queued row without an entry, whatever took it, gets one."""
        before, self._suspects = self._suspects, {}  # forgotten where the database is away
        # Rows first: an attempt that begins after this look is refused by `put_back`.
        claimed = self.page(limit=2**31, newest_first=False, states=("in_progress",))
        with self._transaction() as engine:
            owners = {
                entry.queueing_lock: entry.worker_id
                for entry in _now(engine.list_jobs_async(task=TASK, status="doing"))
            }
            stalled = _now(
                engine.get_stalled_jobs(task_name=TASK, seconds_since_heartbeat=self._silent_s / 2)
            )
            _now(engine.prune_stalled_workers(FORGET_S))
            self._heal(engine)
        silent = {entry.queueing_lock for entry in stalled}
        now, back = time.monotonic(), []
        for job in claimed:
            gone = owners.get(job.id) is None  # its worker left, or its entry was deleted
            if gone or job.id in silent:
                attempt = job.id, job.attempts
                self._suspects[attempt] = before.get(attempt, now)
                if gone or now - self._suspects[attempt] >= self._silent_s / 2:
                    back.append(self.put_back(job, "its worker ended"))
        return [job for job in back if job is not None]

    def _heal(self, engine: JobManager) -> None:
        """Give an entry to each queued row that has none."""
        bare = self.run(
            "SELECT id FROM wanflow_jobs WHERE state = 'queued' AND NOT EXISTS (SELECT 1 FROM"
            " procrastinate_jobs WHERE queueing_lock = wanflow_jobs.id AND status = 'todo')",
            [],
        )
        for (id,) in bare:
            with suppress(AlreadyEnqueued), self._inside.connection.transaction():
                self._defer(engine, id)

    def wait(self, seconds: float) -> None:
        """See `Store`."""
        with self._asked(), self._pool.connection() as connection:
            connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(CHANNEL)))
            todo = "SELECT 1 FROM procrastinate_jobs WHERE status = 'todo' LIMIT 1"
            if not connection.execute(todo).fetchall():
                for _ in connection.notifies(timeout=seconds, stop_after=1):
                    pass
            connection.execute("UNLISTEN *")

    def close(self) -> None:
        """See `Store`."""
        self._pool.close()


class _Bounded(psycopg.Connection[Any]):
    """A connection on which nobody waits long for a database that stands still."""

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        begun = time.monotonic()
        try:
            return super().wait(gen, interval, ANSWER_S if timeout is None else timeout)
        except psycopg.OperationalError:
            if timeout is not None or time.monotonic() - begun < ANSWER_S:
                raise
            self.pgconn.finish()  # what it says later answers nothing
            raise psycopg.OperationalError(f"no answer within {ANSWER_S:g} s") from None


class _Inside(SyncPsycopgConnector):
    """Carry out what the engine asks on one connection, inside its transaction."""

    def __init__(self, connection: psycopg.Connection) -> None:
        super().__init__()
        self._connection = connection

    async def execute_query_async(self, query: Any, **arguments: Any) -> None:
        self.execute_query_all_with_connection(self._connection, query, **arguments)

    async def execute_query_one_async(self, query: Any, **arguments: Any) -> dict[str, Any]:
        return self.execute_query_one_with_connection(self._connection, query, **arguments)

    async def execute_query_all_async(self, query: Any, **arguments: Any) -> list[dict[str, Any]]:
        return self.execute_query_all_with_connection(self._connection, query, **arguments)


def _now(asked: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine that never waits, as all those over `_Inside`."""
    try:
        asked.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError(f"{asked} waits")


def _entries(engine: JobManager, id: str) -> list[Entry]:
    """Return the entries of a job that wait or are in progress."""
    found = _now(engine.list_jobs_async(task=TASK, queueing_lock=id))
    return [entry for entry in found if entry.status in ("todo", "doing")]


def _drop(engine: JobManager, *entries: Entry) -> None:
    for entry in entries:
        _now(engine.finish_job_by_id_async(_id(entry), Status.SUCCEEDED, delete_job=True))


def _id(entry: Entry) -> int:
    assert entry.id is not None  # it is None only before it is deferred
    return entry.id


def _queue(key: str) -> str:
    """Name the engine's queue for an affinity; Postgres takes 40 bytes there beside its prefix."""
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def _first_line(error: BaseException | None) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _limit(connection: psycopg.Connection) -> None:
    connection.execute(LIMITS)


def place(url: str) -> str:
    """Return a URL without its password, to be printed.

    Raises:
        RequestError: for a URL that Postgres cannot read.
    """
    try:
        parts = conninfo_to_dict(url)
    except psycopg.Error:  # its words have the password
        raise RequestError(
            "--db: no URL of a Postgres database; give postgresql://USER:PASSWORD@HOST:5432/NAME,"
            " with %40 for @ and %2F for / in a password"
        ) from None
    user = f"{parts['user']}@" if "user" in parts else ""
    port = f":{parts['port']}" if "port" in parts else ""
    return f"postgresql://{user}{parts.get('host', '')}{port}/{parts.get('dbname', '')}"


def _make_tables(connection: psycopg.Connection, name: str) -> None:
    """Make our tables and the engine's, all or none, where they are not there."""
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])
        tables = ("wanflow_jobs", "procrastinate_jobs")
        [found] = connection.execute("SELECT to_regclass(%s), to_regclass(%s)", tables).fetchall()
        ours, engine = (table is not None for table in found)
        if ours and engine:
            return
        if engine:
            raise RequestError(
                f"{name}: another application keeps its queue here; give wanflow a database of its"
                " own: createdb wanflow"
            )
        # Without the engine's tables (an upgrade of it may need new ones) workers enrol again, and
        # `recover` makes the entries from our rows.
        connection.execute("DROP TABLE IF EXISTS wanflow_workers")
        connection.execute(SchemaManager.get_schema())
        for statement in TABLES:
            connection.execute(statement.format(serial="BIGSERIAL PRIMARY KEY").encode())
        connection.execute(
            "ALTER TABLE wanflow_workers ADD COLUMN engine BIGINT"
            " REFERENCES procrastinate_workers (id) ON DELETE CASCADE"
        )
