"""Force against a whole site, short: `benchmarks/serve_kills.py` does it 200 times.

What one store, one worker or one gang does is tested beside it: test_stores, test_worker_processes,
test_windows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.gangs import Played, Scene, wait_for
from helpers.postgres import Postgres
from helpers.postgres import postgres as postgres  # a fixture
from helpers.site import Site, kill

from wanflow.files import remove
from wanflow.serve import contact, worker
from wanflow.serve.jobs import Job, Store, StoreError, new_id
from wanflow.serve.line import Message
from wanflow.serve.local import LocalStore
from wanflow.serve.stores import open_store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc"),
]
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve_kills.py"


@pytest.mark.parametrize(
    ("db", "faults"),
    [
        ("sqlite", ["gang", "supervisor", "everything"]),
        ("postgres", ["worker of the server", "HTTP process", "database killed"]),
    ],
)
def test_no_job_is_lost_or_twice(db: str, faults: list[str]) -> None:
    words = ["--kills", "3", "--seed", "4", "--kinds", "1", "--db", db, "--faults", *faults]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["broken"] == [] and found["kills"] == 3
    assert found["completed"] > 0 and found["accepted"] == found["distinct"]
    assert found["never_resumed"] == 0 and found["tracebacks"] == 0
    assert found["orphans"] == [] and found["left_files"] == []


def begun(site: Site) -> list[int]:
    """Return the agent and its two ranks; nothing while others are seen, which fork and exec."""
    found = site.processes()
    agents = [pid for pid, kind in found.items() if kind == "agent"]
    ranks = [pid for pid, kind in found.items() if kind == "rank"]
    return [*agents, *ranks] if (len(agents), len(ranks)) == (1, 2) else []


def test_ranks_that_just_began_end_with_their_agent(tmp_path: Path) -> None:
    """They wait for each other then, and would for minutes."""
    site = Site(tmp_path, tmp_path / "data")
    try:
        site.start("worker", "--gpus", "cpu,cpu")
        agent, *ranks = wait_for(lambda: begun(site), site.log.read_text)
        kill(agent)
        wait_for(lambda: not set(ranks) & set(site.processes()), site.log.read_text)
    finally:
        site.end()


@pytest.fixture(params=["sqlite", "postgres"])
def two(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Store, Store]]:
    """The views of two processes."""
    db = None
    if request.param == "postgres":
        db = request.getfixturevalue("postgres").schema()
    stores = open_store(db, tmp_path), open_store(db, tmp_path)
    yield stores
    for store in stores:
        store.close()


@pytest.fixture(autouse=True)
def haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "REPORT_S", 0.01)
    monkeypatch.setattr(worker, "LOOK_S", 0.05)
    monkeypatch.setattr(contact, "AGAIN_S", 0.05)


def test_two_workers_and_one_job(two: tuple[Store, Store], tmp_path: Path) -> None:
    made: list[str] = []

    def make(gang: Played, message: Message) -> None:
        made.append(message["id"])
        gang.done(scenes[0].folder, message)

    scenes = [Scene(store, tmp_path, make) for store in two]
    with scenes[0].at_work(), scenes[1].at_work():
        for _ in range(20):
            one, _ = two[0].submit(Job(new_id(), {}))
            wait_for(lambda one=one: scenes[0].state(one) == "completed")
    assert len(made) == len(set(made)) == 20
    assert len(scenes[0].files()) == 20


def test_a_late_result_is_refused_and_its_files_go(
    two: tuple[Store, Store], tmp_path: Path
) -> None:
    """A worker that was frozen finds that its job was made by another, and is done with it."""
    late: list[Any] = []

    def make(gang: Played, message: Message) -> None:
        gang.on_cancel = lambda message: None  # type: ignore[method-assign]  # it hears too late
        late.append((gang, message))

    frozen = Scene(two[0], tmp_path, make)
    other = Scene(two[1], tmp_path, lambda gang, message: gang.done(other.folder, message))
    one, _ = two[0].submit(Job(new_id(), {}))
    with frozen.at_work():
        [(gang, message)] = wait_for(lambda: late)
        taken = two[1].get(one.id)
        assert taken is not None and two[1].put_back(taken, "its worker was silent")
        with other.at_work():
            wait_for(lambda: other.state(one) == "completed")
        gang.done(frozen.folder, message)
        wait_for(lambda: frozen.files() == [f"{one.id}.2.mp4"])
    ended = two[0].get(one.id)
    assert ended is not None and ended.attempts == 2 and ended.result["file"] == f"{one.id}.2.mp4"


def test_a_result_waits_for_the_database(postgres: Postgres, tmp_path: Path) -> None:
    """The database is killed before a worker says that its job is done; the result is kept."""
    store = open_store(postgres.schema(), tmp_path)

    def make(gang: Played, message: Message) -> None:
        postgres.stop(how=9)
        gang.done(scene.folder, message)

    scene = Scene(store, tmp_path, make)
    one, _ = store.submit(Job(new_id(), {}))
    try:
        with scene.at_work():
            wait_for(lambda: postgres.process is None)
            with pytest.raises(StoreError):
                store.get(one.id)
            postgres.start()
            wait_for(lambda: scene.state(one) == "completed")
    finally:
        postgres.start()
        store.close()
    assert scene.files() == [f"{one.id}.1.mp4"]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    if os.geteuid() != 0:
        pytest.skip("only root may make a file system; test_stores fills a database without")
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(tmp_path)]
    subprocess.run(command, check=True)
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_result_waits_for_the_disk(small: Path) -> None:
    """The disk is full when a worker says that its job is done: nothing is lost, all goes on."""
    store = LocalStore(small)
    filler = small / "filler"

    def make(gang: Played, message: Message) -> None:
        gang.done(scene.folder, message)
        fill(filler)

    scene = Scene(store, small, make)
    one, _ = store.submit(Job(new_id(), {}))
    with scene.at_work():
        wait_for(filler.exists)
        with pytest.raises(StoreError, match="disk is full"):
            for _ in range(100):  # some pages of the log are free still
                store.submit(Job(new_id(), {"prompt": "x" * 10_000}))
        kept = store.counts()
        assert sum(kept.values()) >= 1
        time.sleep(0.2)
        remove(filler)
        wait_for(lambda: scene.state(one) == "completed")
        wait_for(lambda: store.counts()["queued"] == 0)
    assert len(scene.files()) == sum(kept.values())
    store.close()


def fill(file: Path) -> None:
    with pytest.raises(OSError, match="No space"), file.open("wb", 0) as opened:
        while True:
            opened.write(bytes(4096))
