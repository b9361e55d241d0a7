"""Claim jobs and have a gang make them: `wanflow worker`, which holds no model itself.

The worker outlives its gang: whatever ends a gang in the midst of a job puts the job back, and a
fresh gang starts. It also outlives its store: while that is away, the run goes on.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

from wanflow.serve.contact import Contact
from wanflow.serve.folder import DataFolder
from wanflow.serve.jobs import Job, Progress, Standing, Store, StoreError, Worker, worker_name
from wanflow.serve.line import Message, gang_ending
from wanflow.units import measured

LOOK_S = 1.0  # between two looks at a job's standing, where the gang says nothing
REPORT_S = 0.05  # between two reports, at the least
IN_A_ROW = 4  # jobs that are taken before older ones, since they need no reload
STALL_S, STALL_STEPS = (
    1800.0,
    10.0,
)  # no progress for this time, or for as many of the longest steps
LONGEST_PAUSE_S = 60.0
PATIENCE_S = 10.0  # for a store that is away, once this worker was asked to leave

logger = logging.getLogger("wanflow")
T = TypeVar("T")


class Hired(Protocol):
    """A gang that has been started."""

    def say(self, **message: Any) -> None:
        """Send it a message."""

    def kill(self) -> None:
        """End it at once."""


Hire = Callable[[Callable[[Message], object]], Hired]


@dataclass
class Held:
    """The job that the gang works on.

    progress: the newest. reported: what the store has. told_at: when it got that.
    lost: another attempt owns the job. cancelled: it is to end so.
    """

    job: Job
    progress: Progress = field(default_factory=Progress)
    reported: Progress | None = None
    told_at: float = 0.0
    lost: bool = False
    cancelled: bool = False


class Refused(Exception):
    """The first gang refused to start; its words are printed already."""


class Foreman:
    """Claims jobs and hands them to a gang.

    Args:
        store: of jobs.
        folder: of data.
        hire: starts a gang.
        stall_s: without progress, a gang is ended; None: `STALL_S` or longer, as its steps take.
    """

    def __init__(
        self, store: Store, folder: DataFolder, hire: Hire, stall_s: float | None = None
    ) -> None:
        self._folder, self._hire = folder, hire
        self._stall_s, self._longest = stall_s, 0.0
        name = f"{worker_name(os.getpid())}{secrets.token_hex(4)}"
        self._store, self._contact = store, Contact(store, Worker(name, ""))
        self._messages: SimpleQueue[Message] = SimpleQueue()
        self._gang: Hired | None = None
        self._held: Held | None = None
        self._idle = False  # the gang waits for a job
        self._signal, self._asked_at = 0, 0.0  # that asked to leave, and when
        self._at_once = self._told_to_drain = False
        self._moved = 0.0  # when the gang showed progress
        self._had_job = False  # this gang
        self._last_key: str | None = None
        self._in_a_row = 0
        self._troubles = 0  # in a row: gangs that ended without a job, full disks

    # Asked from outside: by signals, and where the parent is gone

    def leave(self, number: int = signal.SIGTERM) -> None:
        """Leave after the present step; asked again, at once."""
        if self._signal:
            self.leave_at_once()
        self._signal, self._asked_at = self._signal or number, time.monotonic()
        self._messages.put({"say": "asked"})

    def leave_at_once(self) -> None:
        """End the gang and leave."""
        self._signal = self._signal or signal.SIGTERM
        self._at_once = True
        if self._gang is not None:
            self._gang.kill()
        self._messages.put({"say": "asked"})

    # The worker's life

    def run(self) -> int:
        """Work until asked to leave; return the signal that asked.

        Raises:
            Refused: where the first gang cannot start.
        """
        with self._contact:
            first = True
            while not self._signal:
                code = self._life()
                ready = self._contact.me.ready
                if first and code == 2 and not ready and not self._signal:
                    raise Refused
                first = first and not ready
                self._contact.enrol(False)
                if not self._had_job and not self._signal:
                    self._pause(f"{gang_ending(code)} without a job")
        return self._signal

    def _life(self) -> int:
        """Start a gang and keep it busy until it has ended; return its exit code."""
        self._idle = self._had_job = self._told_to_drain = False
        self._moved = time.monotonic()
        self._gang = self._hire(self._messages.put)
        if self._at_once:
            self._gang.kill()
        while True:
            for message in self._heard():
                if message["say"] == "ended":
                    self._gang_ended(int(message["code"]))
                    return int(message["code"])
                self._take(message)
            self._look()
            if self._signal:
                self._drain()
            elif self._idle:
                self._claim()

    def _heard(self) -> list[Message]:
        """Return new messages; wait for one a moment, unless there may be a job to claim."""
        found: list[Message] = []
        with suppress(Empty):
            if self._idle and not self._signal:
                found.append(self._messages.get_nowait())
            else:
                found.append(self._messages.get(timeout=LOOK_S if not self._held else REPORT_S))
            while True:
                found.append(self._messages.get_nowait())
        return found

    def _take(self, message: Message) -> None:
        """Take what the gang says."""
        what = message["say"]
        if what == "asked":
            return
        now = time.monotonic()
        if what == "ready":
            facts = {name: message[name] for name in ("model", "machine", "settings", "limits")}
            self._contact.me = replace(self._contact.me, **facts)
            self._contact.enrol(True)
            logger.info("ready: %s", self._contact.me.model)
        elif what == "idle":
            self._idle = True
        held = self._held
        if held is None or message.get("id") != held.job.id:
            self._moved = now
            return
        if what == "progress":
            progress = Progress(**message["progress"])
            if progress.step > held.progress.step:
                self._longest = max(self._longest, now - self._moved)
            held.progress = progress
        self._moved = now
        if what == "done":
            self._done(held, message["result"])
        elif what == "failed":
            self._failed(held, message["code"], message["message"])
        elif what == "stopped":
            self._stopped(held, message)
        elif what == "crashed":
            self._put_back(held, message["why"])

    # A job

    def _claim(self) -> None:
        prefer = self._last_key if self._in_a_row < IN_A_ROW else None
        me = self._contact.me
        if not self._contact.enrolled:
            self._contact.enrol(True)
        if not self._contact.enrolled:
            return time.sleep(LOOK_S)
        found = self._contact.once(lambda: (self._store.claim(me.id, prefer),))
        if found is None:
            return time.sleep(LOOK_S)
        (job,) = found
        if job is None:
            self._contact.once(lambda: self._store.wait(LOOK_S))
            return None
        if (wanted := job.about.get("model", me.model)) != me.model:
            words = (
                f"it was sent for {wanted}, and the worker of this queue has {me.model}; send it to"
                f" a server with {wanted}"
            )
            self._failed(Held(job), "invalid_request", words)
            return None
        self._in_a_row = self._in_a_row + 1 if prefer is not None and job.key == prefer else 0
        self._last_key = job.key
        self._held, self._idle, self._had_job = Held(job), False, True
        self._moved = time.monotonic()
        logger.info("job %s: attempt %d", job.id, job.attempts)
        if self._gang is not None:
            made = {"id": job.id, "attempts": job.attempts, "request": dict(job.request)}
            self._gang.say(do="make", job=made)
        return None

    def _look(self) -> None:
        """Report how far the job is, learn its standing, and end a gang that stands still."""
        now, held = time.monotonic(), self._held
        if held is not None:
            nothing_new = held.progress == held.reported or self._contact.away
            due = LOOK_S if nothing_new else REPORT_S
            if now - held.told_at >= due:
                self._report(held)
        limit = self._stall_s or max(STALL_S, STALL_STEPS * self._longest)
        if not self._idle and now - self._moved > limit and self._gang is not None:
            why = f"no progress for {measured(limit)}"
            logger.warning("%s: the gang is ended", why)
            self._moved = now
            self._gang.kill()
            if held is not None:
                self._put_back(held, why)

    def _report(self, held: Held) -> None:
        held.told_at = time.monotonic()
        standing = self._contact.once(lambda: self._store.report(held.job, held.progress))
        if standing is None:
            return
        held.reported = held.progress
        if standing is Standing.LOST and not held.lost:
            held.lost = True
            logger.warning("job %s: it was given to another worker; stopping", held.job.id)
        elif standing is Standing.CANCELLED and not held.cancelled:
            held.cancelled = True
        else:
            return
        if self._gang is not None:
            self._gang.say(do="cancel", id=held.job.id)

    def _done(self, held: Held, result: Message) -> None:
        self._end()
        if held.cancelled or held.lost:
            self._finish(held, "cancelled")
        elif self._finish(held, "completed", result=result):
            self._troubles = 0
            seconds = measured(float(result.get("seconds", 0.0)))
            logger.info("job %s: completed in %s", held.job.id, seconds)

    def _failed(self, held: Held, code: str, words: str) -> None:
        self._end()
        if held.cancelled or held.lost:
            self._finish(held, "cancelled")
        elif self._finish(held, "failed", error={"code": code, "message": words}):
            logger.info("job %s: failed: %s", held.job.id, words)

    def _stopped(self, held: Held, message: Message) -> None:
        """Take that the gang has stopped: the job was cancelled, or cannot go on here for now."""
        if held.cancelled or held.lost:
            self._end()
            self._finish(held, "cancelled")
        elif why := message.get("why"):
            self._put_back(held, why, counts=False)  # a disk is full: no fault of the job
            self._pause(why)
        else:
            step, steps = message["step"], held.progress.steps
            self._put_back(held, f"its worker was asked to leave, at step {step} of {steps}", False)

    def _end(self) -> None:
        """Let go of a job; the gang says when it waits for another."""
        self._held = None

    def _finish(self, held: Held, state: Any, **facts: Any) -> bool:
        """End a job, and delete the files that it does not keep; return whether it was ours."""
        job = held.job
        ours = not held.lost and self._surely(lambda: self._store.finish(job, state, **facts))
        if ours:
            self._folder.forget(job.id, facts["result"]["file"] if "result" in facts else "")
        elif ours is not None:
            logger.warning("job %s: not ours any more; its files are deleted", job.id)
            self._drop(job)
        return bool(ours)

    def _put_back(self, held: Held, why: str, counts: bool = True) -> None:
        """Put a job back, with what ended its attempt."""
        self._end()
        if held.lost:
            return self._drop(held.job)
        back = self._surely(lambda: (self._store.put_back(held.job, why, counts),))
        if back is None:  # the store will notice that this worker is gone
            return None
        (job,) = back
        if job is None:
            return self._drop(held.job)
        self._folder.drop(held.job)
        if job.final:
            self._folder.forget(job.id)
        logger.info("job %s: %s: %s", job.id, job.state, why)
        return None

    def _drop(self, job: Job) -> None:
        """Delete what an attempt wrote that owns its job no longer."""
        self._folder.drop(job)
        with suppress(StoreError):
            now = self._store.get(job.id)
            if now is None:
                self._folder.forget(job.id)
            elif now.final:
                self._folder.forget(job.id, str(now.result.get("file", "")))

    def _surely(self, call: Callable[[], T]) -> T | None:
        def in_haste() -> bool:
            waited = time.monotonic() - self._asked_at
            return self._at_once or (self._signal > 0 and waited > PATIENCE_S)

        return self._contact.surely(call, in_haste)

    # The gang

    def _gang_ended(self, code: int) -> None:
        self._gang, self._idle = None, False
        if self._held is not None:
            why = "its worker was asked to leave" if self._signal else gang_ending(code)
            self._put_back(self._held, why, counts=not self._signal)

    def _drain(self) -> None:
        """Let the gang stop after its step; one without a job ends at once."""
        if self._gang is None or self._told_to_drain:
            return
        if self._held is None:
            self._told_to_drain = True
            self._gang.kill()
        elif not self._told_to_drain:
            self._told_to_drain = True
            logger.info("leaving after the present step")
            self._gang.say(do="drain")

    def _pause(self, why: str) -> None:
        """Wait before the next try, longer each time."""
        seconds = min(2.0**self._troubles, LONGEST_PAUSE_S)
        self._troubles += 1
        logger.warning("%s; trying again in %s", why, measured(seconds))
        until = time.monotonic() + seconds
        while not self._signal and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))
