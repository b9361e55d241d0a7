"""The worker against gangs that tests play: jobs, faults of gang and store, signals."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.gangs import Played, Scene, job, wait_for

from wanflow.serve import contact, worker
from wanflow.serve.jobs import Job, StoreError, Worker
from wanflow.serve.line import Message
from wanflow.serve.local import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    found = LocalStore(tmp_path)
    yield found
    found.close()


@pytest.fixture(autouse=True)
def haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "REPORT_S", 0.01)
    monkeypatch.setattr(worker, "LOOK_S", 0.05)
    monkeypatch.setattr(contact, "AGAIN_S", 0.05)


def submitted(store: LocalStore, one: Job) -> Job:
    return store.submit(one)[0]


def test_a_job_is_made_and_its_result_kept(store: LocalStore, tmp_path: Path) -> None:
    def make(gang: Played, made: Message) -> None:
        gang.progress(2)
        gang.done(scene.folder, made)

    scene = Scene(store, tmp_path, make)
    one = submitted(store, job())
    state = scene.folder.state(one.id)
    state.parent.mkdir()
    state.write_bytes(b"of an earlier attempt")
    with scene.at_work():
        wait_for(lambda: scene.state(one) == "completed")
        (me,) = store.workers()
        assert (me.model, me.ready) == ("nano", True)
        wait_for(lambda: not state.exists(), lambda: "the state of a finished job stays")
    found = store.get(one.id)
    assert found is not None and found.result["file"] == f"{one.id}.1.mp4"
    assert scene.files() == [f"{one.id}.1.mp4"]
    assert scene.returned == [signal.SIGTERM] and not store.workers()
    assert scene.gangs[0].heard[0]["job"]["request"] == dict(one.request)


def test_a_fault_of_the_job_fails_it_with_words(store: LocalStore, tmp_path: Path) -> None:
    def make(gang: Played, made: Message) -> None:
        gang.take(
            {"say": "failed", "id": made["id"], "code": "out_of_memory", "message": "too big"}
        )
        gang.take({"say": "idle"})

    scene = Scene(store, tmp_path, make)
    first, second = submitted(store, job()), submitted(store, job())
    with scene.at_work():
        wait_for(lambda: scene.state(second) == "failed")
    found = store.get(first.id)
    assert found is not None and found.error == {"code": "out_of_memory", "message": "too big"}
    assert found.attempts == 1 and len(scene.gangs) == 1  # it serves the next job


def test_a_job_for_another_model_fails_with_words(store: LocalStore, tmp_path: Path) -> None:
    """Its video would be another one than its client saw planned."""
    scene = Scene(store, tmp_path, lambda gang, made: gang.done(scene.folder, made))
    other = submitted(store, replace(job(), about={"model": "nano-i2v"}))
    ours = submitted(store, replace(job(), about={"model": "nano"}))
    with scene.at_work():
        wait_for(lambda: scene.state(ours) == "completed")
    found = store.get(other.id)
    assert found is not None and found.state == "failed" and found.error is not None
    assert found.error["message"] == (
        "it was sent for nano-i2v, and the worker of this queue has nano; send it to a server with"
        " nano-i2v"
    )
    assert scene.files() == [f"{ours.id}.1.mp4"]


def test_no_job_is_claimed_before_the_store_knows_the_worker(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever watches would give it to another worker."""
    real, tries = store.enrol, list[str]()

    def enrol(me: Worker) -> None:
        tries.append(me.id)
        if len(tries) < 3:
            raise StoreError("it is away")
        real(me)

    def make(gang: Played, made: Message) -> None:
        known.append(len(store.workers()))
        gang.done(scene.folder, made)

    monkeypatch.setattr(store, "enrol", enrol)
    known: list[int] = []
    scene = Scene(store, tmp_path, make)
    one = submitted(store, job())
    with scene.at_work():
        wait_for(lambda: scene.state(one) == "completed")
    assert known == [1]


def test_a_gang_that_ends_puts_its_job_back(store: LocalStore, tmp_path: Path) -> None:
    def make(gang: Played, made: Message) -> None:
        if made["attempts"] == 1:
            scene.folder.video(Job(made["id"], {}, attempts=1), 5).parent.mkdir()
            scene.folder.video(Job(made["id"], {}, attempts=1), 5).write_bytes(b"half")
            gang.end(-11)
        else:
            gang.done(scene.folder, made)

    scene = Scene(store, tmp_path, make)
    one = submitted(store, job())
    with scene.at_work():
        found = wait_for(lambda: (now := store.get(one.id)) and now.final and now)
    assert found.state == "completed" and found.attempts == 2
    assert found.story == ("attempt 1: the gang was killed by SIGSEGV",)
    assert scene.files() == [f"{one.id}.2.mp4"] and len(scene.gangs) == 2


def test_after_three_gangs_a_job_fails_with_the_story(store: LocalStore, tmp_path: Path) -> None:
    def make(gang: Played, made: Message) -> None:
        gang.take({"say": "crashed", "id": made["id"], "why": f"fault {made['attempts']}"})
        gang.end(1)

    scene = Scene(store, tmp_path, make)
    one = submitted(store, job())
    with scene.at_work():
        found = wait_for(lambda: (now := store.get(one.id)) and now.final and now)
        wait_for(lambda: len(scene.gangs) == 4)
    assert found.state == "failed" and found.error["code"] == "worker_failed"
    for attempt in (1, 2, 3):
        assert f"attempt {attempt}: fault {attempt}" in found.error["message"]


def test_a_cancelled_job_stops_and_leaves_no_files(store: LocalStore, tmp_path: Path) -> None:
    def make(gang: Played, made: Message) -> None:
        gang.progress(1)

    scene = Scene(store, tmp_path, make)
    one = submitted(store, job())
    state = scene.folder.state(one.id)
    state.parent.mkdir()
    state.write_bytes(b"state")
    with scene.at_work():
        wait_for(lambda: (now := store.get(one.id)) and now.progress.step == 1)
        store.cancel(one.id)
        wait_for(lambda: scene.state(one) == "cancelled")
        wait_for(lambda: not state.exists())
    assert [one["do"] for one in scene.gangs[0].heard] == ["make", "cancel"]


def test_leaving_puts_the_job_back_without_an_attempt(store: LocalStore, tmp_path: Path) -> None:
    one = submitted(store, job())

    def begun() -> bool:
        now = store.get(one.id)
        return now is not None and now.state == "in_progress"

    for _ in range(4):  # more than the attempts that a job has
        with Scene(store, tmp_path, lambda gang, made: gang.progress(1)).at_work():
            wait_for(begun)
        found = store.get(one.id)
        assert found is not None and found.state == "queued"
    assert "its worker was asked to leave, at step 2" in found.story[0]


def test_a_job_that_a_leaving_gang_has_not_begun_goes_back(
    store: LocalStore, tmp_path: Path
) -> None:
    def make(gang: Played, made: Message) -> None:
        gang.begun = False

    scene = Scene(store, tmp_path, make)
    one = submitted(store, job())
    with scene.at_work():
        wait_for(lambda: scene.state(one) == "in_progress")
    found = store.get(one.id)
    assert found is not None and found.story == ("attempt 1: its worker was asked to leave",)
    left_out = store.run("SELECT left_out FROM wanflow_jobs", [])
    assert found.state == "queued" and list(left_out[0]) == [1]


def test_asked_twice_it_leaves_at_once(store: LocalStore, tmp_path: Path) -> None:
    scene = Scene(store, tmp_path, lambda gang, made: None)
    Played.on_drain, before = lambda self, message: None, Played.on_drain  # type: ignore
    one = submitted(store, job())
    try:
        with scene.at_work():
            wait_for(lambda: scene.state(one) == "in_progress")
            scene.foreman.leave(signal.SIGINT)
            wait_for(lambda: [one["do"] for one in scene.gangs[0].heard] == ["make", "drain"])
            assert not scene.gangs[0].ended
            scene.foreman.leave(signal.SIGINT)
            wait_for(lambda: scene.returned)
    finally:
        Played.on_drain = before  # type: ignore[method-assign]
    assert scene.gangs[0].ended and scene.returned == [signal.SIGINT]
    assert scene.state(one) == "queued"


def test_a_worker_without_a_job_leaves_soon(store: LocalStore, tmp_path: Path) -> None:
    scene = Scene(store, tmp_path, lambda gang, made: None)
    with scene.at_work():
        wait_for(store.workers)
    assert scene.gangs[0].ended and scene.returned == [signal.SIGTERM]


def test_a_job_that_was_given_away_is_dropped(store: LocalStore, tmp_path: Path) -> None:
    """What a frozen worker made is refused, and deleted; the other's video stays."""

    def make(gang: Played, made: Message) -> None:
        frozen = store.get(made["id"])
        assert frozen is not None
        assert store.put_back(frozen, "its worker ended")
        other = store.claim("another")
        assert other is not None and other.attempts == 2
        others.append(other)
        theirs = scene.folder.video(other, 5)
        theirs.parent.mkdir()
        theirs.write_bytes(b"theirs")
        gang.done(scene.folder, made)

    others: list[Job] = []
    scene = Scene(store, tmp_path, make)
    one = submitted(store, job())
    with scene.at_work():
        wait_for(lambda: others)
        wait_for(lambda: scene.files() == [f"{one.id}.2.mp4"])
    found = store.get(one.id)
    assert found is not None and (found.state, found.owner) == ("in_progress", "another")
    assert store.finish(others[0], "completed", {"file": f"{one.id}.2.mp4"})


def test_a_run_stops_once_its_job_is_given_away(store: LocalStore, tmp_path: Path) -> None:
    def make(gang: Played, made: Message) -> None:
        frozen = store.get(made["id"])
        assert frozen is not None
        assert store.put_back(frozen, "its worker ended")
        assert store.claim("another")
        gang.progress(1)

    scene = Scene(store, tmp_path, make)
    one = submitted(store, job())
    with scene.at_work():
        wait_for(lambda: scene.gangs and len(scene.gangs[0].heard) > 1)
        assert scene.gangs[0].heard[1] == {"do": "cancel", "id": one.id}
        assert scene.state(one) == "in_progress"
    assert scene.state(one) == "in_progress"


class Away(LocalStore):
    """A store that does not answer while `away`."""

    away = False
    refused = 0

    def _run(self, statement: str, values: Any) -> Any:
        if self.away and not statement.startswith("CREATE"):
            self.refused += 1
            raise StoreError("gone")
        return super()._run(statement, values)


def test_a_run_goes_on_while_the_store_is_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def make(gang: Played, made: Message) -> None:
        store.away = True
        gang.progress(1)
        gang.progress(2)
        gang.done(scene.folder, made)

    store, seen = Away(tmp_path), LocalStore(tmp_path)
    scene = Scene(store, tmp_path, make)
    one = submitted(seen, job())
    with scene.at_work():
        wait_for(lambda: store.refused > 3)
        assert scene.gangs[0].heard and seen.get(one.id).state == "in_progress"  # type: ignore
        store.away = False
        wait_for(lambda: seen.get(one.id).state == "completed")  # type: ignore[union-attr]
    assert caplog.text.count("does not answer") == 1
    assert scene.files() == [f"{one.id}.1.mp4"]
    seen.close()
    store.close()


def test_a_gang_that_stands_still_is_ended(store: LocalStore, tmp_path: Path) -> None:
    def make(gang: Played, made: Message) -> None:
        if made["attempts"] == 2:
            gang.done(scene.folder, made)

    scene = Scene(store, tmp_path, make, stall_s=0.2)
    one = submitted(store, job())
    with scene.at_work():
        found = wait_for(lambda: (now := store.get(one.id)) and now.final and now)
    assert found.story == ("attempt 1: no progress for 0.2 s",)
    assert scene.gangs[0].ended and found.state == "completed"


def test_long_steps_are_no_standstill() -> None:
    """By default the limit grows with the longest step."""
    assert worker.STALL_S >= 600 and worker.STALL_STEPS >= 3


def test_jobs_that_share_a_key_go_together_without_starving_others(
    store: LocalStore, tmp_path: Path
) -> None:
    order: list[str] = []

    def make(gang: Played, made: Message) -> None:
        order.append(keys[made["id"]])
        gang.done(scene.folder, made)

    keys: dict[str, str] = {}
    for key in ("a", "b", "a", "a", "a", "a", "a", "a"):
        one = submitted(store, job(key))
        keys[one.id] = key
    scene = Scene(store, tmp_path, make)
    with scene.at_work():
        wait_for(lambda: store.counts()["completed"] == 8)
    assert order == ["a", "a", "a", "a", "a", "b", "a", "a"]


def test_a_gang_that_refuses_at_the_first_start_ends_the_worker(
    store: LocalStore, tmp_path: Path
) -> None:
    class Refusing:
        def __init__(self, take: Any) -> None:
            take({"say": "ended", "code": 2})

        def say(self, **message: Any) -> None:
            raise AssertionError

        def kill(self) -> None:
            raise AssertionError

    foreman = worker.Foreman(store, Scene(store, tmp_path, print).folder, Refusing)
    with pytest.raises(worker.Refused):
        foreman.run()
    assert not store.workers()


def test_gangs_that_end_without_a_job_start_ever_later(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    slept: list[float] = []

    class Crashing(Played):
        def __init__(self, take: Any) -> None:
            super().__init__(take, print)
            self.end(1)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds
        if clock[0] > 200:
            foreman.leave()

    clock = [0.0]
    foreman = worker.Foreman(store, Scene(store, tmp_path, print).folder, Crashing)
    monkeypatch.setattr(worker.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(worker.time, "sleep", sleep)
    assert foreman.run() == signal.SIGTERM
    lines = [line for line in caplog.text.splitlines() if "trying again in" in line]
    waits = ["1 s", "2 s", "4 s", "8 s", "16 s", "32 s", "60 s", "60 s", "60 s"]
    assert [line.rpartition(" in ")[2] for line in lines] == waits


def test_a_full_disk_puts_the_job_back_and_waits(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(gang: Played, made: Message) -> None:
        if made["attempts"] < 25:  # more often than a job may fail, or be remembered
            gang.take({"say": "stopped", "id": made["id"], "why": "the disk is full"})
            gang.take({"say": "idle"})
        else:
            gang.done(scene.folder, made)

    monkeypatch.setattr(worker, "LONGEST_PAUSE_S", 0.02)
    scene = Scene(store, tmp_path, make)
    one, began = submitted(store, job()), time.monotonic()
    with scene.at_work():
        found = wait_for(lambda: (now := store.get(one.id)) and now.final and now)
    assert found.state == "completed" and found.attempts == 25
    assert len(found.story) == 20 and found.story[-1] == "attempt 24: the disk is full"
    assert time.monotonic() - began > 24 * 0.02 and len(scene.gangs) == 1
