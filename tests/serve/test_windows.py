"""Kill a worker between any two of its writes, one after the other: nothing is lost or twice.

The gang is played; store, folder and worker are real. A child process dies at its n-th write, for
n = 1, 2, ... until it lives; each time others find what it left.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.gangs import Played

from wanflow import files
from wanflow.files import write_bytes
from wanflow.serve.folder import DataFolder
from wanflow.serve.jobs import Job, State, new_id
from wanflow.serve.line import Message
from wanflow.serve.local import LocalStore
from wanflow.serve.sweep import FOLDERS, sweep
from wanflow.serve.worker import Foreman

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes by fork"),
]
DIED = 9


class Clock:
    """Ends the process at its n-th write; a write that is asked for twice counts twice."""

    def __init__(self, at: int) -> None:
        self.left = at

    def tick(self) -> None:
        self.left -= 1
        if self.left == 0:
            os._exit(DIED)


class Mortal(LocalStore):
    """A store whose process may end before or after each of its statements."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self.clock = Clock(0)
        super().__init__(folder)
        self.clock = clock

    def _connect(self) -> sqlite3.Connection:
        connection = super()._connect()
        connection.execute("PRAGMA synchronous = OFF")  # the machine lives on
        return connection

    def _run(self, statement: str, values: Sequence[Any]) -> list[Sequence[Any]]:
        if statement.lstrip().startswith("SELECT"):
            return super()._run(statement, values)
        self.clock.tick()
        found = super()._run(statement, values)
        self.clock.tick()
        return found


def make(data: DataFolder, end: str, gang: Played, made: Message) -> None:
    """Save a state, write the files of a video, and say how it went, as a gang does."""
    job = Job(**made)
    gang.progress(1)
    write_bytes(data.state(job.id), b"state", overwrite=True)
    write_bytes(data.preview(job.id), b"preview", overwrite=True)
    if end == "failed":
        gang.take({"say": "failed", "id": job.id, "code": "bad", "message": "it is bad"})
    else:
        video = data.video(job, 5)
        write_bytes(data.beside(video, "thumbnail"), b"thumbnail", overwrite=True)
        write_bytes(video, b"video", overwrite=True)
        gang.take({"say": "done", "id": job.id, "result": {"file": video.name}})
    gang.take({"say": "idle"})


def work(folder: Path, end: str, clock: Clock) -> None:
    """Be a worker until no job is left."""
    store, data = Mortal(folder, clock), DataFolder(folder)
    for name in ("_replace", "remove"):
        real = getattr(files, name)

        def ticked(*args: Any, real: Any = real) -> None:
            clock.tick()
            real(*args)
            clock.tick()

        setattr(files, name, ticked)
        for module in list(sys.modules.values()):
            if getattr(module, name, None) is real and module.__name__.startswith("wanflow"):
                setattr(module, name, ticked)
    foreman = Foreman(store, data, lambda take: Played(take, partial(make, data, end)))
    look = store.wait

    def wait(seconds: float) -> None:
        foreman.leave()
        look(0)

    store.wait = wait  # type: ignore[method-assign]
    foreman.run()


def child(folder: Path, end: str, at: int) -> int:
    """Run a worker in a process of its own; return its exit code."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        work(folder, end, Clock(at))
        os._exit(0)
    finally:
        os._exit(1)


def windows(folder: Path, run: Callable[[Path, int], int]) -> Iterator[tuple[Path, int]]:
    """Yield a folder for each write at which a process died, and the number of the write."""
    for at in range(1, 200):
        place = folder / str(at)
        code = run(place, at)
        assert code in (0, DIED)
        yield place, at
        if code == 0:
            assert at > 8, "a worker writes more often"
            return
    raise AssertionError("it never lived")


@pytest.mark.parametrize(
    ("end", "final", "cancel"),
    [("done", "completed", False), ("failed", "failed", False), ("done", "cancelled", True)],
)
def test_death_at_each_write(tmp_path: Path, end: str, final: State, cancel: bool) -> None:
    def first(place: Path, at: int) -> int:
        store = Mortal(place, Clock(0))
        store.submit(Job(new_id(), {"prompt": "a red circle"}))
        store.close()
        return child(place, end, at)

    for place, at in windows(tmp_path, first):
        store, data = Mortal(place, Clock(0)), DataFolder(place)
        store.recover(everything=True)
        jobs = store.page(newest_first=False)
        if cancel:
            for job in jobs:
                store.cancel(job.id)
        store.close()
        assert child(place, end, 0) == 0, at
        store = Mortal(place, Clock(0))
        sweep(store, data, time.time())
        after = store.page(newest_first=False)
        assert [job.id for job in after] == [job.id for job in jobs], at
        expected = set()
        for job in after:
            assert job.state == final or (cancel and job.state == "completed"), (at, job)
            assert 1 <= job.attempts <= 2 or (cancel and job.attempts == 0), (at, job)
            if job.state == "completed":
                name = str(job.result["file"])
                assert name.split(".")[1] == str(job.attempts), at
                expected |= {name, data.beside(Path(name), "thumbnail").name}
        assert {file.name for kind in FOLDERS for file in (place / kind).glob("*")} == expected, at
        store.close()
