"""One suite for both places that keep jobs: SQLite, and a real Postgres."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.postgres import PASSWORD, Postgres
from helpers.postgres import postgres as postgres  # a fixture

from wanflow.config import RequestError
from wanflow.serve.contact import Contact
from wanflow.serve.jobs import (
    ATTEMPTS,
    FINAL,
    FullError,
    Job,
    Progress,
    Standing,
    StoreError,
    Worker,
    new_id,
    worker_name,
)
from wanflow.serve.limits import Limits
from wanflow.serve.local import FILE, LocalStore, own_folder
from wanflow.serve.rows import Rows
from wanflow.serve.stores import open_store
from wanflow.serve.supervise import Child, recover

BRIEF_S = 1.0  # after which a worker of these tests counts as dead


class Place:
    """Where the stores of one test keep their jobs; each `open` is another process's view."""

    def __init__(self, folder: Path, db: str | None) -> None:
        self.folder, self.db = folder, db
        self.opened: list[Any] = []

    def open(self, silent_s: float = BRIEF_S) -> Any:
        self.opened.append(opened(self.folder, self.db, silent_s))
        return self.opened[-1]


def opened(folder: Path, db: str | None, silent_s: float) -> Any:
    if db is None:
        return LocalStore(folder, silent_s)
    from wanflow.serve.fleet import FleetStore

    return FleetStore(db, silent_s)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    db = None
    if request.param == "postgres":
        db = request.getfixturevalue("postgres").schema()
    made = Place(tmp_path, db)
    yield made
    for store in made.opened:
        store.close()


@pytest.fixture
def store(place: Place) -> Any:
    return place.open()


def job(key: str = "", **fields: Any) -> Job:
    return Job(id=new_id(), request={"prompt": "a red circle", "seed": 7}, key=key, **fields)


def submitted(store: Any, count: int, key: str = "") -> list[str]:
    return [store.submit(job(key))[0].id for _ in range(count)]


def at_once(count: int, act: Callable[[int], Any]) -> list[Any]:
    """Run `act` in several threads that begin together; return what each returned or raised."""
    gate = threading.Barrier(count)

    def one(number: int) -> Any:
        gate.wait(120)
        try:
            return act(number)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def drained(store: Any, worker: str) -> list[tuple[str, int]]:
    """Claim until nothing waits, as a worker that finishes each job at once."""
    found = []
    store.enrol(Worker(worker, "nano"))
    while taken := store.claim(worker):
        found.append((taken.id, taken.attempts))
        assert store.finish(taken, "completed", {"file": "x.mp4"})
    return found


# --- a job's life ---


def test_a_job_passes_its_states(store: Any) -> None:
    given = job(about={"user": "\u0000 ü 视频"}, idempotency="k")
    kept, new = store.submit(given)
    assert new and kept.state == "queued" and kept.request == given.request
    assert kept.about == given.about and kept.created_at > 0 and kept == store.get(given.id)
    taken = store.claim("a")
    assert (taken.id, taken.state, taken.attempts, taken.owner) == (given.id, "in_progress", 1, "a")
    progress = Progress(3, 40, "denoising", "high", 12.5, 7)
    assert store.report(taken, progress) is Standing.OURS
    assert store.get(given.id).progress == progress
    assert store.finish(taken, "completed", {"file": "v.mp4", "bytes": 3})
    done = store.get(given.id)
    assert done.final and done.result == {"file": "v.mp4", "bytes": 3} and done.error is None
    assert done.created_at <= done.started_at <= done.completed_at
    assert store.claim("a") is None and store.get("video_none") is None


def test_a_failed_job_keeps_its_error(store: Any) -> None:
    submitted(store, 1)
    error = {"code": "out_of_memory", "message": "8 GB; try --size 480*832"}
    taken = store.claim("a")
    assert store.finish(taken, "failed", error=error)
    assert (store.get(taken.id).state, store.get(taken.id).error) == ("failed", error)


def test_jobs_outlive_the_process(place: Place) -> None:
    first = place.open()
    ids = submitted(first, 2)
    first.claim("a")
    first.close()
    states = {found.id: found.state for found in place.open().page()}
    assert states == {ids[0]: "in_progress", ids[1]: "queued"}


# --- one job, one attempt ---


def test_threads_never_share_a_job(place: Place) -> None:
    store = place.open()
    ids = submitted(store, 40)
    found = at_once(8, lambda n: drained(store, f"worker {n}"))
    assert sorted(pair for part in found for pair in part) == sorted((id, 1) for id in ids)
    assert store.counts()["completed"] == 40


def _drain(folder: str, db: str | None, worker: str, out: Any) -> None:
    store = opened(Path(folder), db, 30)
    out.put(drained(store, worker))
    store.close()


def test_processes_never_share_a_job(place: Place) -> None:
    store = place.open()
    ids = submitted(store, 30)
    spawn = multiprocessing.get_context("spawn")
    out = spawn.Queue()
    workers = [
        spawn.Process(target=_drain, args=(str(place.folder), place.db, f"worker {n}", out))
        for n in range(2)
    ]
    for worker in workers:
        worker.start()
    found = [pair for _ in workers for pair in out.get(timeout=120)]
    for worker in workers:
        worker.join(120)
    assert sorted(found) == sorted((id, 1) for id in ids)


@pytest.mark.parametrize("same_worker", [False, True])
def test_a_late_attempt_changes_nothing(store: Any, same_worker: bool) -> None:
    submitted(store, 1)
    late = store.claim("a")
    assert store.put_back(late, "stood still").state == "queued"
    assert store.report(late, Progress()) is Standing.LOST
    ours = store.claim("a" if same_worker else "b")
    before = store.get(late.id)
    assert (ours.attempts, before.state) == (2, "in_progress")
    assert store.report(late, Progress(39, 40)) is Standing.LOST
    for state in FINAL:
        assert not store.finish(late, state, {"file": "late.mp4"})
    assert store.put_back(late, "late") is None
    assert store.put_back(late, "late", counts=False) is None
    assert store.get(late.id) == before
    assert store.finish(ours, "completed", {"file": "ours.mp4"})
    for state in FINAL:
        assert not store.finish(late, state, {"file": "late.mp4"})
    assert store.put_back(ours, "too late") is None
    assert store.get(late.id).result == {"file": "ours.mp4"}


def test_of_two_ends_one_counts(store: Any) -> None:
    """Two supervisors, or a supervisor and the worker, speak of one attempt at one moment."""
    for _ in range(10):
        submitted(store, 1)
        taken = store.claim("a")

        def end(number: int, taken: Job = taken) -> bool:
            if number == 0:
                return store.finish(taken, "completed", {"file": "v.mp4"})
            return store.put_back(taken, "its worker ended") is not None

        won = at_once(3, end)
        assert won.count(True) == 1, won
        now = store.get(taken.id)
        assert now.state == ("completed" if won[0] else "queued")
        assert len(now.story) == (0 if won[0] else 1)
        store.cancel(taken.id)


# --- attempts ---


def test_after_three_attempts_a_job_fails_with_its_story(store: Any) -> None:
    submitted(store, 1)
    for number in range(1, ATTEMPTS + 1):
        now = store.put_back(store.claim("a"), f"reason {number}")
        assert now.state == ("queued" if number < ATTEMPTS else "failed")
    assert now == store.get(now.id)
    story = [f"attempt {n}: reason {n}" for n in range(1, ATTEMPTS + 1)]
    assert list(now.story) == story and now.completed_at
    assert now.error == {"code": "worker_failed", "message": "; ".join(story)}
    assert store.claim("a") is None


def test_an_attempt_that_was_asked_to_leave_does_not_count(store: Any) -> None:
    submitted(store, 1)
    for _ in range(ATTEMPTS + 2):
        assert store.put_back(store.claim("a"), "drained", counts=False).state == "queued"
    for number in range(ATTEMPTS):
        now = store.put_back(store.claim("a"), "ended")
        assert now.state == ("failed" if number == ATTEMPTS - 1 else "queued")
    assert now.attempts == 2 * ATTEMPTS + 2 == len(now.story)


def test_a_job_goes_back_where_it_stood(store: Any) -> None:
    ids = submitted(store, 3)
    store.put_back(store.claim("a"), "ended")
    assert [store.ahead(id) for id in ids] == [0, 1, 2]
    assert [pair[0] for pair in drained(store, "a")] == ids


# --- cancel and delete ---


def test_cancel_in_each_state(store: Any) -> None:
    waiting, running, back, late = submitted(store, 4)
    now = store.cancel(waiting)
    assert now.state == "cancelled" and now.completed_at and store.cancel(waiting) == now
    taken = store.claim("a")
    assert taken.id == running and store.report(taken, Progress()) is Standing.OURS
    assert store.cancel(running).state == "in_progress"
    assert store.cancel(running).cancel
    assert store.report(taken, Progress(1)) is Standing.CANCELLED
    assert store.finish(taken, "cancelled") and store.get(running).state == "cancelled"
    taken = store.claim("a")
    store.cancel(back)
    now = store.put_back(taken, "ended before it saw")
    assert (taken.id, now.state, now.error) == (back, "cancelled", None)
    taken = store.claim("a")
    store.cancel(late)
    assert store.finish(taken, "completed", {"file": "v.mp4"})  # it was faster
    done = store.get(late)
    assert done.state == "completed" and store.cancel(late) == done
    assert store.cancel("video_none") is None and store.claim("a") is None


def test_cancel_and_claim_at_one_moment(store: Any) -> None:
    for _ in range(15):
        (id,) = submitted(store, 1)
        acts = [partial(store.cancel, id), partial(store.claim, "a")]
        asked, taken = at_once(2, lambda n, acts=acts: acts[n]())
        now = store.get(id)
        assert asked.id == id and now.cancel
        if taken is None:
            assert now.state == "cancelled"
        else:
            assert now.state == "in_progress"
            assert store.report(taken, Progress()) is Standing.CANCELLED
            assert store.finish(taken, "cancelled")


def test_delete_only_what_has_ended(store: Any) -> None:
    first, second = submitted(store, 2)
    assert store.delete(first) is None
    taken = store.claim("a")
    assert store.delete(first) is None and store.get(first).state == "in_progress"
    store.finish(taken, "completed", {"file": "v.mp4"})
    assert store.delete(first).result == {"file": "v.mp4"}
    assert store.get(first) is None and store.delete(first) is None
    assert not store.finish(taken, "completed") and store.put_back(taken, "late") is None
    assert [found.id for found in store.page()] == [second]


# --- submission ---


def test_one_key_one_job(place: Place) -> None:
    store, other = place.open(), place.open()
    found = at_once(12, lambda n: (store, other)[n % 2].submit(job(idempotency="again"), 20))
    assert [new for _, new in found].count(True) == 1
    assert len({kept.id for kept, _ in found}) == 1 and len(store.page()) == 1


def test_an_earlier_job_is_returned_by_a_full_queue(store: Any) -> None:
    kept, _ = store.submit(job(idempotency="k"), 1)
    assert store.submit(job(idempotency="k"), 1) == (kept, False)
    with pytest.raises(FullError) as full:
        store.submit(job(), 1)
    assert full.value.waiting == 1


def test_the_limit_is_exact(place: Place) -> None:
    store, other = place.open(), place.open()
    found = at_once(12, lambda n: (store, other)[n % 2].submit(job(), 5))
    assert sum(isinstance(one, tuple) for one in found) == 5
    assert sum(isinstance(one, FullError) for one in found) == 7
    assert store.counts()["queued"] == 5
    store.claim("a")
    assert store.submit(job(), 5)[1]


# --- order ---


def test_pages(store: Any) -> None:
    ids = submitted(store, 7)
    for _ in range(2):
        store.finish(store.claim("a"), "completed")

    def read(**options: Any) -> list[str]:
        return [found.id for found in store.page(**options)]

    assert read() == ids[::-1] and read(newest_first=False) == ids
    assert read(limit=3) == ids[:3:-1] and read(limit=3, after=ids[4]) == ids[3:0:-1]
    assert read(limit=3, after=ids[4], newest_first=False) == ids[5:]
    assert read(states=("completed",)) == ids[1::-1] and read(after="video_none") == []
    assert store.counts() == {
        "queued": 5,
        "in_progress": 0,
        "completed": 2,
        "failed": 0,
        "cancelled": 0,
    }
    assert [store.ahead(id) for id in ids[2:]] == [0, 1, 2, 3, 4]


def test_like_jobs_may_come_first(store: Any) -> None:
    a1, b1 = submitted(store, 1, "a"), submitted(store, 1, "b" * 300)
    a2, b2 = submitted(store, 1, "a"), submitted(store, 1, "b" * 300)

    def claim(prefer: str | None) -> list[str]:
        taken = store.claim("w", prefer)
        store.finish(taken, "completed")
        return [taken.id]

    assert claim("b" * 300) == b1 and claim(None) == a1
    assert claim("a") == a2 and claim("nothing like it") == b2


# --- workers ---


def test_workers_say_what_they_are(store: Any) -> None:
    worker = Worker("a", "nano", machine={"gpu": "H200"}, limits={"frames": 81})
    store.enrol(worker)
    assert store.workers() == [worker]
    ready = Worker("a", "nano", ready=True)
    store.enrol(ready)
    store.enrol(Worker("b", "nano"))
    assert sorted(store.workers(), key=lambda one: one.id) == [ready, Worker("b", "nano")]
    store.leave("b")
    store.leave("never came")
    assert store.workers() == [ready]


def until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("not within the time")


def test_a_frozen_worker_is_refused_when_it_wakes(place: Place) -> None:
    store, frozen = place.open(), place.open()
    first, second = submitted(store, 2)
    frozen.enrol(Worker("frozen", "nano"))
    store.enrol(Worker("lives", "nano"))
    stale, ours = frozen.claim("frozen"), store.claim("lives")

    def look() -> list[Job]:
        store.enrol(Worker("lives", "nano"))
        return store.recover()

    back = until(look)
    assert [(one.id, one.state) for one in back] == [(first, "queued")]
    assert list(back[0].story) == ["attempt 1: its worker ended"]
    assert [worker.id for worker in store.workers()] == ["lives"]
    assert store.get(second) == ours  # who lives keeps its job
    store.finish(ours, "completed")
    given = store.claim("lives")
    assert given.id == first
    # it wakes
    frozen.enrol(Worker("frozen", "nano"))
    assert frozen.report(stale, Progress(40, 40)) is Standing.LOST
    assert not frozen.finish(stale, "completed", {"file": "stale.mp4"})
    assert frozen.claim("frozen") is None
    assert store.finish(given, "completed", {"file": "given.mp4"})
    assert store.get(first).result == {"file": "given.mp4"}


def _work(folder: str, db: str | None, line: Any) -> None:
    """Be a worker: claim, wait to be asked, then report and finish."""
    store = opened(Path(folder), db, 30)
    store.enrol(Worker("frozen", "nano"))
    taken = store.claim("frozen")
    line.send(taken.id)
    line.recv()
    line.send(store.report(taken, Progress(40, 40)).value)
    line.send(store.finish(taken, "completed", {"file": "late.mp4"}))
    store.close()


@pytest.mark.slow
def test_a_process_that_is_frozen_and_wakes(place: Place) -> None:
    store = place.open()
    (id,) = submitted(store, 1)
    spawn = multiprocessing.get_context("spawn")
    line, far = spawn.Pipe()
    process = spawn.Process(target=_work, args=(str(place.folder), place.db, far))
    process.start()
    try:
        assert line.poll(120) and line.recv() == id
        os.kill(process.pid or 0, signal.SIGSTOP)
        assert [one.id for one in until(store.recover)] == [id]
        ours = store.claim("lives")
        os.kill(process.pid or 0, signal.SIGCONT)
        line.send("go on")
        assert line.poll(120) and (line.recv(), line.recv()) == ("lost", False)
        assert store.finish(ours, "completed", {"file": "ours.mp4"})
        assert store.get(id).result == {"file": "ours.mp4"}
    finally:
        process.kill()
        process.join(120)


def test_who_beats_keeps_its_job(place: Place) -> None:
    store, watch = place.open(), place.open()
    submitted(store, 1)
    store.enrol(Worker("a", "nano"))
    taken = store.claim("a")
    end = time.monotonic() + 2 * BRIEF_S
    while time.monotonic() < end:
        store.enrol(Worker("a", "nano"))
        assert watch.recover() == []
        time.sleep(BRIEF_S / 10)
    assert store.report(taken, Progress()) is Standing.OURS


def test_time_in_which_nobody_watched_does_not_count(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A laptop that sleeps, or a group of processes that was stopped, wakes as it was."""
    store, real = place.open(silent_s=30), time.monotonic
    submitted(store, 1)
    store.enrol(Worker("a", "nano"))
    taken = store.claim("a")
    assert store.recover() == []
    monkeypatch.setattr(time, "monotonic", lambda: real() + 3600)
    assert store.recover() == [] and len(store.workers()) == 1
    assert store.report(taken, Progress()) is Standing.OURS


def test_after_an_outage_workers_have_their_time_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = place.open(silent_s=2)
    submitted(store, 1)
    store.enrol(Worker("a", "nano"))
    taken, page = store.claim("a"), store.page

    def away(**options: Any) -> list[Job]:
        raise StoreError("away")

    assert store.recover() == []
    time.sleep(1.2)  # silent for half of the time, which the engine says by its own clock
    assert store.recover() == []
    store.page = away
    with pytest.raises(StoreError):
        store.recover()
    store.page = page
    time.sleep(1.2)  # for the whole time, but heard again for less than that
    assert store.recover() == []
    assert store.report(taken, Progress()) is Standing.OURS
    assert [one.id for one in until(store.recover)] == [taken.id]


def test_the_job_of_a_worker_that_left_is_free_at_once(place: Place) -> None:
    store = place.open(silent_s=1000)
    submitted(store, 1)
    store.enrol(Worker("a", "nano"))
    taken = store.claim("a")
    assert store.recover() == []
    store.leave("a")
    assert [one.id for one in store.recover()] == [taken.id]


def test_a_process_that_ended_loses_its_job_at_once(place: Place) -> None:
    store = place.open(silent_s=1000)
    ended: list[int] = []
    child = Child("worker", [sys.executable, "-c", "pass"], ended=ended.append)
    child.start()
    assert child.process is not None
    child.process.wait(120)
    child.look()
    (number,) = ended
    ids = [f"{worker_name(number)}ab", f"{worker_name(number + 1)}ab", "elsewhere"]
    submitted(store, 3)
    for id in ids:
        store.enrol(Worker(id, "nano"))
    taken = [store.claim(id) for id in ids]
    recover(store, number)
    assert [store.report(one, Progress()) for one in taken] == [
        Standing.LOST,
        Standing.OURS,
        Standing.OURS,
    ]
    assert sorted(one.id for one in store.workers()) == sorted(ids[1:])


def test_a_worker_watches_where_no_server_does(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanflow.serve.contact.BEAT_S", BRIEF_S / 10)
    store = place.open()
    (id,) = submitted(store, 1)
    store.enrol(Worker("gone", "nano"))
    assert store.claim("gone")
    with Contact(place.open(), Worker("lives", "nano")):
        until(lambda: store.get(id).state == "queued")
    assert store.get(id).story == ("attempt 1: its worker ended",)


def test_two_watchers_put_a_job_back_once(place: Place) -> None:
    stores = [place.open(silent_s=1000) for _ in range(3)]
    for _ in range(5):
        submitted(stores[0], 1)
        taken = stores[0].claim("never enrolled")
        found = at_once(3, lambda n: stores[n].recover())
        assert sum(map(len, found)) == 1, found
        assert len(stores[0].get(taken.id).story) == 1
        stores[0].cancel(taken.id)


def test_a_jump_of_the_clock_does_nothing(
    store: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    store.enrol(Worker("a", "nano"))
    ids = submitted(store, 1)
    taken, real = store.claim("a"), time.time
    for jump in (-86400, 86400):
        monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
        store.enrol(Worker("a", "nano"))
        ids += submitted(store, 1)
        assert store.recover() == [] and [one.id for one in store.workers()] == ["a"]
        assert store.report(taken, Progress()) is Standing.OURS
        assert store.put_back(taken, "drained", counts=False)
        taken = store.claim("a")
        assert taken.id == ids[0]
    store.finish(taken, "completed")
    assert [pair[0] for pair in drained(store, "a")] == ids[1:]


# --- answers that are lost ---


class Losing:
    """A way to carry statements out that loses the answer to the first of a kind."""

    def __init__(self, store: Rows, word: str) -> None:
        self.run, self.word, self.lost = store.run, word, False
        store.run = self

    def __call__(self, statement: str, values: Sequence[Any]) -> list[Sequence[Any]]:
        found = self.run(statement, values)
        if self.word in statement and not self.lost:
            self.lost = True
            raise StoreError("the answer was lost")
        return found


def lost(store: Any, word: str, act: Callable[[], Any]) -> Any:
    """Do something whose answer is lost after it was done; return what the second call says."""
    if isinstance(store, LocalStore):
        real, losing = store.run, Losing(store, word)
        with pytest.raises(StoreError):
            act()
        assert losing.lost
        store.run = real
    else:
        act()  # the transaction was committed, and its answer fell on the floor
    return act()


def test_finish_whose_answer_was_lost(store: Any) -> None:
    submitted(store, 1)
    taken = store.claim("a")
    assert lost(store, "SET state", lambda: store.finish(taken, "completed", {"file": "v.mp4"}))
    assert not store.finish(taken, "failed") and not store.finish(taken, "cancelled")
    assert store.get(taken.id).result == {"file": "v.mp4"}


def test_claim_whose_answer_was_lost(store: Any) -> None:
    first, second = submitted(store, 2)
    taken = lost(store, "SET state", lambda: store.claim("a"))
    assert (taken.id, taken.attempts) == (first, 1)
    assert store.claim("b").id == second


def test_submit_whose_answer_was_lost(store: Any) -> None:
    given = job()
    kept, new = lost(store, "INSERT", lambda: store.submit(given, 1))
    assert (kept.id, new) == (given.id, False) and store.counts()["queued"] == 1


# --- waiting ---


def test_wait_ends_when_a_job_comes(place: Place) -> None:
    store, other = place.open(), place.open()
    begun = time.monotonic()
    store.wait(0.3)
    assert 0.25 < time.monotonic() - begun < 25
    taken = None
    for number in range(2):
        back = partial(other.put_back, taken, "drained", False)
        timer = threading.Timer(0.3, back if number else lambda: submitted(other, 1))
        timer.start()
        begun = time.monotonic()
        store.wait(30)
        assert time.monotonic() - begun < 25
        timer.join()
        taken = store.claim("a")
        assert taken is not None
    store.finish(taken, "completed")
    submitted(other, 1)
    begun = time.monotonic()
    store.wait(30)
    assert time.monotonic() - begun < 25


# --- a walk at random ---


def test_a_walk_at_random_keeps_every_job(place: Place) -> None:
    """Three workers, two watchers and impatient clients: each job ends once, by its owner."""
    chance = random.Random(14)
    stores = [place.open(1000) for _ in range(2)]
    ids: list[str] = []
    held: list[Job] = []  # also attempts that are long over
    wins: dict[str, int] = {}
    for _ in range(250):
        store = chance.choice(stores)
        act = chance.randrange(8)
        if act <= 1:
            ids += submitted(store, 1, chance.choice("ab"))
        elif act <= 3:
            taken = store.claim(f"worker {chance.randrange(3)}", chance.choice(["a", None]))
            held += [taken] if taken and taken not in held else []
        elif act == 4 and ids:
            store.cancel(chance.choice(ids))
        elif held and act == 5:
            one, before = chance.choice(held), None
            before = store.get(one.id)
            if store.finish(one, "completed", {"by": one.attempts}) and not before.final:
                wins[one.id] = wins.get(one.id, 0) + 1
        elif held and act == 6:
            store.put_back(chance.choice(held), "ended", chance.random() < 0.5)
        elif held:
            store.report(chance.choice(held), Progress(1))
    for number in range(3):  # each ends what it holds, then takes the rest
        while taken := stores[0].claim(f"worker {number}"):
            assert stores[0].finish(taken, "completed", {"by": taken.attempts})
    assert [one.id for one in stores[1].page(limit=1000, newest_first=False)] == ids
    for one in stores[1].page(limit=1000):
        assert one.final and wins.get(one.id, 0) <= 1
        assert one.state != "completed" or one.result["by"] == one.attempts
    if place.db:
        import psycopg

        with psycopg.connect(place.db) as connection:
            left = "SELECT count(*) FROM procrastinate_jobs WHERE status IN ('todo', 'doing')"
            assert connection.execute(left).fetchone() == (0,)


# --- SQLite ---


def test_the_file_is_private(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "new" / "folder")
    submitted(store, 1)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "new/folder").iterdir()}
    assert modes.pop(FILE) == 0o600 and set(modes.values()) <= {0o600}
    store.close()


def test_a_damaged_file_is_said_in_words(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no database" * 1000)
    with pytest.raises(RequestError, match="damaged; move it away"):
        LocalStore(tmp_path)
    (tmp_path / FILE).unlink()
    store = LocalStore(tmp_path)
    submitted(store, 200)
    store.close()
    data = bytearray((tmp_path / FILE).read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    (tmp_path / FILE).write_bytes(data)
    with pytest.raises((RequestError, StoreError), match="damaged; move it away"):
        LocalStore(tmp_path).page()


@pytest.mark.parametrize("value", ["'{'", "CAST(x'7bff7d' AS TEXT)", "'[3]'"])
def test_a_damaged_row_is_said_in_words(tmp_path: Path, value: str) -> None:
    store = LocalStore(tmp_path)
    (id,) = submitted(store, 1)
    with sqlite3.connect(tmp_path / FILE) as other:
        other.execute(f"UPDATE wanflow_jobs SET progress = {value}")
    words = f"{id} is damaged.*delete the row|a text is no UTF-8: the file is damaged"
    with pytest.raises(StoreError, match=words):
        store.page()
    store.close()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="choose another folder"):
        LocalStore(tmp_path / "file")
    (tmp_path / FILE).mkdir()
    with pytest.raises(RequestError, match="cannot be opened or written"):
        LocalStore(tmp_path)
    deep = tmp_path.joinpath(*(3 * ["d" * 200]))
    deep.mkdir(parents=True)
    with pytest.raises(RequestError, match="a path below 480 bytes"):
        LocalStore(deep)


def test_a_full_disk(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    (first,) = submitted(store, 1)
    (connection,) = store._free
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match="the disk is full; free some space"):
        store.submit(job(about={"text": "x" * 100_000}))
    assert [one.id for one in store.page()] == [first]
    assert store.submit(job(about={"text": "x" * 100_000}))[1]  # there is space again
    store.close()


def test_a_file_that_another_process_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanflow.serve.local.BUSY_S", 0.1)
    store = LocalStore(tmp_path)
    with sqlite3.connect(tmp_path / FILE, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="another process writes"):
            store.submit(job())
        assert store.page() == []  # reading goes on
        other.execute("ROLLBACK")
    assert store.submit(job())[1]
    store.close()


def test_connections_are_as_many_as_threads_at_a_time(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for _ in range(30):
        thread = threading.Thread(target=store.counts)
        thread.start()
        thread.join()
    assert len(store._free) == 1
    store.close()


def test_many_open_a_new_folder_at_once(tmp_path: Path) -> None:
    found = at_once(8, lambda n: LocalStore(tmp_path).submit(job())[1])
    assert found == [True] * 8


def test_a_worker_killed_long_ago_is_forgotten(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, silent_s=0)
    for number in range(5):
        store.enrol(Worker(f"worker {number}", "nano"))
    until(lambda: store.recover() == [] and not store.beats())
    store.enrol(Worker("worker 1", "nano"))  # it was only frozen
    assert [worker.id for worker in store.workers()] == ["worker 1"]
    store.close()


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    said = pytest.raises(RequestError, match=f"is served by process {os.getpid()} on .* already")
    with own_folder(tmp_path), said, own_folder(tmp_path):
        pass
    with own_folder(tmp_path):
        pass


def test_after_taking_a_folder_only_processes_that_run_are_workers(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    killed = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    killed.kill()
    os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)  # nobody has asked how it ended yet
    lives = f"{worker_name(os.getpid())}1a2b"
    ids = ["a", f"elsewhere-{os.getpid()}-1a2b", f"{worker_name(killed.pid)}1a2b", lives]
    jobs = submitted(store, len(ids))
    for id in ids:
        store.enrol(Worker(id, "nano"))
        store.claim(id)
    new, linux = LocalStore(tmp_path), sys.platform == "linux"
    back = jobs[:-1] if linux else jobs  # elsewhere nothing tells which processes run
    assert [one.id for one in new.recover(everything=True)] == back
    assert [one.id for one in store.workers()] == ids[3:] if linux else []
    assert killed.wait(30) != 0 and killed.stdin is not None
    killed.stdin.close()
    new.close()
    store.close()


def test_a_file_that_was_removed_or_replaced_takes_no_job(tmp_path: Path) -> None:
    folder, away = tmp_path / "data", tmp_path / "away"
    store = LocalStore(folder)
    (first,) = submitted(store, 1)
    folder.rename(away)
    for _ in range(2):
        with pytest.raises(StoreError, match="removed or replaced; put it back, or start wanflow"):
            store.submit(job())
        other = LocalStore(folder)  # an empty one, in its place
        other.close()
    shutil.rmtree(folder)
    away.rename(folder)
    submitted(store, 1)
    assert store.get(first) and store.counts()["queued"] == 2
    store.close()


def test_a_file_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE) as newer:
        newer.execute("PRAGMA user_version = 7")
    with pytest.raises(RequestError, match=r"a newer wanflow wrote it \(tables of version 7"):
        LocalStore(tmp_path)
    with sqlite3.connect(tmp_path / FILE) as newer:
        assert newer.execute("SELECT * FROM sqlite_master").fetchall() == []


def test_time_in_which_nobody_could_write_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program holds the file: no worker can show that it lives, and each of them does."""
    monkeypatch.setattr("wanflow.serve.local.BUSY_S", 0.01)
    now = [time.monotonic()]
    watch = LocalStore(tmp_path)
    monkeypatch.setattr("wanflow.serve.local.time.monotonic", lambda: now[0])
    submitted(watch, 1)
    watch.enrol(Worker("lives", "nano"))
    watch.claim("lives")
    assert watch.recover() == []
    with sqlite3.connect(tmp_path / FILE, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        for _ in range(20):
            now[0] += 5
            with pytest.raises(StoreError, match="another process writes"):
                watch.recover()
        other.execute("ROLLBACK")
    now[0] += 5
    assert watch.recover() == [] and [one.id for one in watch.workers()] == ["lives"]
    back = []
    for _ in range(10):
        now[0] += 5
        back += watch.recover()
    assert len(back) == 1  # now it was silent
    watch.close()


# --- which store ---


def test_which_store(tmp_path: Path) -> None:
    store = open_store(None, tmp_path)
    assert isinstance(store, LocalStore) and (tmp_path / FILE).exists()
    store.close()
    for db in ("mysql://root:secret@host/x", "jobs.sqlite", "", "secret"):
        with pytest.raises(RequestError, match="expected postgresql://") as refused:
            open_store(db, tmp_path)
        assert "secret" not in str(refused.value)


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "procrastinate.manager", None)
    monkeypatch.delitem(__import__("sys").modules, "wanflow.serve.fleet", raising=False)
    with pytest.raises(RequestError, match=r"pip install wanflow\[serve\]"):
        open_store("postgresql://host/x", tmp_path)


@pytest.mark.parametrize(
    "url", ["postgresql://wan:pass%@h/x", "postgresql://u:secret@host:1/x?wrong=1"]
)
def test_a_url_that_is_none(url: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no URL of a Postgres database") as refused:
        open_store(url, tmp_path)
    assert "secret" not in str(refused.value)


def test_a_database_that_is_not_there(tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(StoreError, match="postgresql://u@127.0.0.1:1/x: .*refused") as away:
        open_store("postgresql://u:secret@127.0.0.1:1/x", tmp_path)
    assert time.monotonic() - begun < 25 and "secret" not in str(away.value)


@pytest.mark.slow
def test_the_http_process_of_a_database_that_is_not_there(tmp_path: Path) -> None:
    """Its supervisor tries again; a refusal, exit code 2, would end the server."""
    setup = {"ckpt_dir": "nano", "parts": {}, "data_dir": str(tmp_path), "lora_dir": []}
    setup |= {"db": "postgresql://u:secret@127.0.0.1:1/x", "limits": asdict(Limits())}
    child = subprocess.Popen(
        [sys.executable, "-m", "wanflow.serve.child"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None and child.stderr is not None
    child.stdin.write(f"{json.dumps(setup)}\n")
    child.stdin.flush()  # and left open: its end is the end of the supervisor
    words = child.stderr.read()
    assert child.wait(120) == 1 and words.startswith("wanflow: postgresql://u@127.0.0.1:1/x: ")
    assert "secret" not in words and "Traceback" not in words


# --- Postgres ---


@pytest.mark.slow
def test_the_database_is_away_for_ten_seconds(postgres: Postgres, tmp_path: Path) -> None:
    """Stopped in order, killed, and standing still: each call says so soon, and later works."""
    store: Any = open_store(postgres.schema(), tmp_path)
    store.enrol(Worker("a", "nano"))
    _, second = submitted(store, 2)
    taken = store.claim("a")
    acts = (
        lambda: store.submit(job()),
        lambda: store.claim("b"),
        lambda: store.report(taken, Progress()),
        lambda: store.finish(taken, "completed"),
        lambda: store.wait(1),
        lambda: store.recover(),
    )

    def works() -> bool:
        try:
            return store.report(taken, Progress(5)) is Standing.OURS
        except StoreError:
            return False

    gone = {signal.SIGINT: postgres.stop, signal.SIGKILL: postgres.stop}
    for how in (signal.SIGINT, signal.SIGKILL, signal.SIGSTOP):
        gone.get(how, postgres.freeze)(how)
        since = time.monotonic()
        try:
            found = at_once(len(acts), lambda n: acts[n]())
            took = time.monotonic() - since
            if how is signal.SIGINT:
                time.sleep(max(0.0, 10 - took))
        finally:
            postgres.freeze(signal.SIGCONT) if how is signal.SIGSTOP else postgres.start()
        for answer in found:
            assert isinstance(answer, StoreError) and PASSWORD not in str(answer), answer
        assert took < 25
        until(works)
    store.enrol(Worker("a", "nano"))
    assert store.recover() == []
    assert store.finish(taken, "completed")
    assert store.claim("a").id == second
    store.close()


@pytest.mark.slow
def test_a_jump_of_the_database_clock_does_nothing(postgres: Postgres, tmp_path: Path) -> None:
    import psycopg

    url = postgres.schema()
    store: Any = open_store(url, tmp_path)
    submitted(store, 1)
    store.enrol(Worker("a", "nano"))
    taken = store.claim("a")
    with psycopg.connect(url) as connection:
        connection.execute(
            "UPDATE procrastinate_workers SET last_heartbeat = now() - '1h'::interval"
        )
    assert store.recover() == [] and store.workers() == []
    store.enrol(Worker("a", "nano"))
    assert store.recover() == [] and len(store.workers()) == 1
    assert store.report(taken, Progress()) is Standing.OURS
    store.close()


@pytest.mark.slow
def test_entries_that_somebody_deleted_come_back(postgres: Postgres, tmp_path: Path) -> None:
    import psycopg

    url = postgres.schema()
    store: Any = open_store(url, tmp_path)
    first, second, third = submitted(store, 3)
    store.enrol(Worker("a", "nano"))
    store.claim("a")
    with psycopg.connect(url) as connection:
        connection.execute("DELETE FROM procrastinate_jobs WHERE queueing_lock <> %s", [third])
        connection.execute("UPDATE procrastinate_jobs SET status = 'failed'")
    assert [one.id for one in store.recover()] == [first]
    store.recover()  # `first` stands in the queue since
    assert [pair[0] for pair in drained(store, "a")] == [first, second, third]
    store.close()


@pytest.mark.slow
def test_a_copy_of_our_table_is_enough(postgres: Postgres, tmp_path: Path) -> None:
    """Moving to another database, or to an engine with other tables, is `pg_dump` of one table."""
    old: Any = open_store(postgres.create(new_id()), tmp_path)
    ids = submitted(old, 3)
    old.enrol(Worker("a", "nano"))
    old.claim("a")
    url = postgres.create(new_id())
    postgres.copy("wanflow_jobs", old._pool.conninfo, url)
    old.close()
    store: Any = open_store(url, tmp_path)
    assert [one.id for one in store.recover()] == ids[:1]
    store.recover()  # the first stands in the queue since
    ids += submitted(store, 1)
    assert [pair[0] for pair in drained(store, "b")] == ids
    store.close()


@pytest.mark.slow
def test_a_second_entry_is_harmless(postgres: Postgres, tmp_path: Path) -> None:
    import psycopg

    url = postgres.schema()
    store: Any = open_store(url, tmp_path)
    first, second = submitted(store, 2)
    with psycopg.connect(url) as connection:
        connection.execute(
            "INSERT INTO procrastinate_jobs (queue_name, task_name, queueing_lock, priority)"
            " SELECT queue_name, task_name, queueing_lock || ' again', 5 FROM procrastinate_jobs"
        )
        connection.execute("UPDATE wanflow_jobs SET state = 'cancelled' WHERE id = %s", [first])
    assert [pair[0] for pair in drained(store, "a")] == [second]
    store.close()


@pytest.mark.slow
def test_a_database_with_another_queue_is_refused(postgres: Postgres, tmp_path: Path) -> None:
    import psycopg
    from procrastinate.schema import SchemaManager

    url = postgres.schema()
    with psycopg.connect(url) as connection:
        connection.execute(SchemaManager.get_schema())
    with pytest.raises(RequestError, match="createdb wanflow") as refused:
        open_store(url, tmp_path)
    assert PASSWORD not in str(refused.value) and "%40" not in str(refused.value)


@pytest.mark.slow
def test_many_open_a_new_database_at_once(postgres: Postgres, tmp_path: Path) -> None:
    url = postgres.schema()
    stores = at_once(4, lambda n: open_store(url, tmp_path))
    assert [store.submit(job())[1] for store in stores] == [True] * 4
    for store in stores:
        store.close()


@pytest.mark.slow
def test_a_wrong_password_is_named_and_not_shown(postgres: Postgres, tmp_path: Path) -> None:
    url = postgres.url("postgres").replace("%25", "wrong")
    with pytest.raises(StoreError, match="password authentication failed") as refused:
        open_store(url, tmp_path)
    assert "wrong" not in str(refused.value)


@pytest.mark.slow
def test_a_user_who_may_make_no_tables_is_told(postgres: Postgres, tmp_path: Path) -> None:
    import psycopg

    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE ROLE reader LOGIN PASSWORD 'secret'")
    url = f"postgresql://reader:secret@127.0.0.1:{postgres.port}/postgres"
    with pytest.raises(RequestError, match="permission denied .*; .* own the database") as refused:
        open_store(url, tmp_path)
    assert "secret" not in str(refused.value)


@pytest.mark.slow
def test_one_that_stands_still_stops_nobody(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process frozen in the middle of a submission holds a lock that others need."""
    import psycopg

    from wanflow.serve import fleet

    monkeypatch.setattr(fleet, "LIMITS", fleet.LIMITS.replace("'10s'", "'1s'"))
    url = postgres.schema()
    store: Any = open_store(url, tmp_path)
    with psycopg.connect(url) as frozen:
        frozen.execute(fleet.LIMITS.encode())
        frozen.execute("SELECT pg_advisory_xact_lock(%s)", [fleet.LOCK])
        found = until(lambda: at_once(1, lambda _: store.submit(job()))[0])
        if isinstance(found, StoreError):
            assert until(lambda: isinstance(at_once(1, lambda _: store.submit(job()))[0], tuple))
        frozen.close()
    store.close()


def test_rows_are_json(tmp_path: Path) -> None:
    """Other tools read the table: queue depth for KEDA, prompts for a report."""
    store = LocalStore(tmp_path)
    store.submit(job("k"))
    with sqlite3.connect(tmp_path / FILE) as other:
        (text,) = other.execute("SELECT request FROM wanflow_jobs").fetchone()
    assert json.loads(text)["prompt"] == "a red circle"
    store.close()
