"""Define a job, the states it passes, and what a place that keeps jobs can do.

A job is a row. HTTP, page, batch and worker share nothing else:

    queued -> in_progress -> completed | failed | cancelled
       ^           |
       +-----------+  put back: its worker ended, or stood still

Each claim is a new attempt. What an attempt says of a job counts only while the job is in progress
in that very attempt: a worker that was frozen and wakes up later is refused (`Standing.LOST`).
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Protocol

State = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
STATES: tuple[State, ...] = ("queued", "in_progress", "completed", "failed", "cancelled")
FINAL: tuple[State, ...] = ("completed", "failed", "cancelled")
ATTEMPTS = 3  # after so many that ended by no fault of the job, it fails
BEAT_S = 5.0  # between two signs of life of a worker
SILENT_S = 30.0  # without one, a worker counts as dead


class Standing(Enum):
    """What a worker learns of its job when it reports: go on, stop it, or drop it."""

    OURS, CANCELLED, LOST = "ours", "cancelled", "lost"


class FullError(Exception):
    """The queue takes no more; `waiting` jobs stand in it."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} jobs wait already")
        self.waiting = waiting


class StoreError(Exception):
    """The place that keeps jobs cannot be reached, or its disk is full; trying again may help."""


@dataclass(frozen=True)
class Progress:
    """How far an attempt is.

    step, steps: denoising steps done, and in all. stage: loading, prompt, picture, denoising,
    decoding or saving. expert: at work: high, low or dit. eta_s: seconds to the end of the job, if
    known. percent: of the whole job, 0 to 99 until it is completed.
    """

    step: int = 0
    steps: int = 0
    stage: str = ""
    expert: str = ""
    eta_s: float | None = None
    percent: int = 0


@dataclass(frozen=True)
class Job:
    """A row.

    id: `video_` and 32 hex digits. request: fields of `wanflow.Request` as JSON, with the seed
    drawn; pictures are names of files in the data folder. key: equal for jobs between which a
    worker reloads nothing (LoRAs and size). attempts: begun so far; the last is the one that owns
    the job. owner: the worker of that attempt. result: of a completed job: file, bytes, width,
    height, frames, fps, seed, stages, ... error: of a failed one: code and message. story: why each
    earlier attempt ended. about: what a client gave beside the request and gets back. Times are
    seconds since 1970.
    """

    id: str
    request: Mapping[str, Any]
    key: str = ""
    state: State = "queued"
    attempts: int = 0
    owner: str = ""
    cancel: bool = False
    progress: Progress = field(default_factory=Progress)
    result: Mapping[str, Any] = field(default_factory=dict)
    error: Mapping[str, str] | None = None
    story: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    idempotency: str | None = None
    created_at: float = 0.0
    started_at: float | None = None
    completed_at: float | None = None

    @property
    def final(self) -> bool:
        return self.state in FINAL


@dataclass(frozen=True)
class Worker:
    """A worker as others see it.

    id: a new one at each start. model: a preset's name. ready: whether a job can start now.
    machine: what `plan` needs to know of it: gpu, num_gpus, ram and the like. settings: of
    `Runtime`, as it runs. limits: the largest size, frames and steps that it takes, if it says.
    """

    id: str
    model: str
    ready: bool = False
    machine: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)


class Store(Protocol):
    """A place that keeps jobs. Every method may raise StoreError, and is safe to call again."""

    def submit(self, job: Job, limit: int | None = None) -> tuple[Job, bool]:
        """Keep a new job; return it and True, or the earlier one of its idempotency key and False.

        Raises:
            FullError: where `limit` jobs are queued already.
        """

    def get(self, id: str) -> Job | None:
        """Return a job."""

    def page(
        self,
        after: str | None = None,
        limit: int = 20,
        newest_first: bool = True,
        states: tuple[State, ...] = STATES,
    ) -> list[Job]:
        """Return jobs in the order of submission, those that follow `after`."""

    def counts(self) -> dict[State, int]:
        """Return how many jobs are in each state."""

    def ahead(self, id: str) -> int:
        """Return how many queued jobs stand before a queued one."""

    def claim(self, worker: str, prefer: str | None = None) -> Job | None:
        """Begin an attempt at the job that waited longest, or the longest of those with a key."""

    def report(self, job: Job, progress: Progress) -> Standing:
        """Keep the progress of an attempt, and learn how it stands."""

    def finish(
        self,
        job: Job,
        state: State,
        result: Mapping[str, Any] | None = None,
        error: Mapping[str, str] | None = None,
    ) -> bool:
        """End an attempt and its job; return False where the job is another attempt's by now."""

    def put_back(self, job: Job, why: str, counts: bool = True) -> Job | None:
        """Queue a job again where it stood, or fail it after `ATTEMPTS`; None: not ours any more.

        Args:
            job: of the attempt that ended.
            why: goes into the story of the job.
            counts: whether this attempt counts; it does not where a worker was asked to leave.
        """

    def cancel(self, id: str) -> Job | None:
        """Cancel a queued job at once; ask the worker of one in progress to."""

    def delete(self, id: str) -> Job | None:
        """Forget a job in a final state, and return it as it was."""

    def enrol(self, worker: Worker) -> None:
        """Keep what a worker says of itself, and that it lives: before it claims, each `BEAT_S`."""

    def leave(self, worker: str) -> None:
        """Forget a worker."""

    def workers(self) -> list[Worker]:
        """Return the workers that live."""

    def recover(self) -> list[Job]:
        """Put back the jobs of workers that no longer live; return those. To be called often."""

    def wait(self, seconds: float) -> None:
        """Return when a job may be there, or after some seconds."""

    def close(self) -> None:
        """Let go of the place."""


def new_id() -> str:
    """Return an identity that cannot be guessed."""
    return f"video_{secrets.token_hex(16)}"


def worker_name(process: int) -> str:
    """Return what the id of a worker begins with, by its process on this machine."""
    return f"{socket.gethostname()}-{process}-"


def process_runs(number: str) -> bool:
    """Return whether a process runs on this machine; only Linux tells, elsewhere none does."""
    try:
        fields = Path("/proc", number, "stat").read_bytes()
        return fields.rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (OSError, IndexError):  # it is gone, or goes at this moment
        return False
