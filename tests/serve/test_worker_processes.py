"""The worker and its gang as processes: signals, kill -9 of any of them, and a frozen worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers.gangs import job, wait_for

from wanflow.pipeline import Run
from wanflow.serve.folder import DataFolder
from wanflow.serve.jobs import Job
from wanflow.serve.local import LocalStore

LONG_S = 180.0  # a busy machine takes a while to import torch
STEPS = 150  # of a run that does not end before what its first steps set off


class Here:
    """A data folder, its store, and the workers that a test started."""

    def __init__(self, path: Path) -> None:
        self.folder, self.store = DataFolder(path), LocalStore(path, silent_s=1.0)
        self.workers: list[subprocess.Popen[bytes]] = []

    def start(self, *flags: str, ready: bool = True) -> subprocess.Popen[bytes]:
        words = ["worker", "--ckpt_dir", "nano", "--data_dir", str(self.folder.path)]
        command = [sys.executable, "-m", "wanflow", *words, "--save_s", "0", *flags]
        log = (self.folder.path / f"worker{len(self.workers)}.log").open("wb")
        self.workers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log))
        pid = self.workers[-1].pid
        if ready:
            self.wait(lambda: any(f"-{pid}-" in w.id and w.ready for w in self.store.workers()))
        return self.workers[-1]

    def wait(self, true: Any) -> Any:
        return wait_for(true, self.logs, LONG_S)

    def logs(self) -> str:
        return "\n".join(file.read_text() for file in sorted(self.folder.path.glob("*.log")))

    def submit(self, **asked: Any) -> Job:
        return self.store.submit(job(**asked))[0]

    def now(self, one: Job) -> Job:
        found = self.store.get(one.id)
        assert found is not None
        return found

    def at_step(self, one: Job, step: int) -> Job:
        return self.wait(lambda: (now := self.now(one)).progress.step >= step and now)  # type: ignore[no-any-return]

    def saved(self, one: Job, step: int) -> None:
        """Wait for a state on the disk; a thread writes it, late where the disk is slow."""
        file = self.folder.state(one.id)
        self.wait(lambda: file.exists() and Run.load(file).state.index >= step)

    def ended(self, one: Job) -> Job:
        return self.wait(lambda: (now := self.now(one)).final and now)  # type: ignore[no-any-return]

    def recovered(self, one: Job) -> None:
        """Put the jobs of silent workers back, as a supervisor does."""
        self.wait(lambda: (self.store.recover(), self.now(one).state != "in_progress")[1])

    def video(self, one: Job) -> bytes:
        return (self.folder.path / "videos" / str(self.now(one).result["file"])).read_bytes()


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Here]:
    made = Here(tmp_path)
    yield made
    for one in made.workers:
        with suppress(OSError):
            one.send_signal(signal.SIGCONT)
        one.kill()
        one.wait()
        assert one.stdin is not None
        one.stdin.close()
    made.store.close()


def below(pid: int) -> list[int]:
    """Return the processes that a process has started, and theirs."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(entry.read_text().rpartition(")")[2].split()[1]) == pid:
                found += [int(entry.parent.name), *below(int(entry.parent.name))]
    return found


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@linux
@pytest.mark.slow
def test_a_killed_gang_costs_a_step_and_changes_no_bit(here: Here) -> None:
    worker = here.start()
    whole, one = here.submit(sample_steps=STEPS), here.submit(sample_steps=STEPS)
    here.ended(whole)
    here.at_step(one, 5)
    here.saved(one, 4)
    (gang,) = below(worker.pid)
    os.kill(gang, signal.SIGKILL)
    again = here.wait(lambda: (now := here.now(one)).attempts == 2 and now.progress.steps and now)
    assert again.progress.step >= 4
    found = here.ended(one)
    assert found.state == "completed", here.logs()
    assert found.story == ("attempt 1: the gang was killed by SIGKILL",)
    assert here.video(one) == here.video(whole)
    assert len(list((here.folder.path / "videos").glob(f"{one.id}*"))) == 3
    here.wait(lambda: not list((here.folder.path / "states").iterdir()))
    worker.send_signal(signal.SIGINT)
    assert worker.wait(LONG_S) == 130  # asked by Ctrl-C


@linux
@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_end_together_and_with_their_worker(here: Here) -> None:
    worker = here.start("--gpus", "cpu,cpu")
    one = here.submit(sample_steps=STEPS)
    here.at_step(one, 5)
    _, *ranks = below(worker.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    found = here.ended(one)
    assert found.state == "completed" and found.attempts == 2, here.logs()
    assert "rank 1 of 2: killed by SIGKILL" in found.story[0] or "exit code 1" in found.story[0]
    two = here.submit(sample_steps=1000)
    here.at_step(two, 5)
    family = below(worker.pid)
    assert len(family) == 3
    os.kill(family[2], signal.SIGSTOP)  # a rank that notices nothing
    os.kill(worker.pid, signal.SIGKILL)
    wait_for(lambda: not any(map(lives, family)), here.logs)
    here.recovered(two)
    assert here.now(two).state == "queued"


@linux
@pytest.mark.slow
def test_sigterm_leaves_after_the_step_and_the_next_worker_goes_on(here: Here) -> None:
    first = here.start("--with_parent")
    one = here.submit(sample_steps=1000)
    here.at_step(one, 5)
    first.send_signal(signal.SIGTERM)
    assert first.wait(LONG_S) == 0
    found = here.now(one)
    assert found.state == "queued" and "asked to leave, at step" in found.story[0], here.logs()
    assert not here.store.workers()
    second = here.start("--with_parent")
    again = here.at_step(one, 1)
    assert again.progress.step >= 5 and again.attempts == 2
    family = below(second.pid)
    assert second.stdin is not None
    second.stdin.close()  # its parent is gone
    second.wait(LONG_S)
    wait_for(lambda: not any(map(lives, family)))
    assert here.now(one).state == "queued" or here.now(one).final


@linux
@pytest.mark.slow
def test_a_frozen_worker_that_wakes_changes_nothing(here: Here) -> None:
    frozen = here.start()
    one = here.submit(sample_steps=STEPS)
    here.at_step(one, 5)
    os.kill(frozen.pid, signal.SIGSTOP)
    here.recovered(one)
    here.start()
    found = here.ended(one)
    assert (found.state, found.attempts) == ("completed", 2), here.logs()
    os.kill(frozen.pid, signal.SIGCONT)
    here.wait(lambda: "not ours any more" in here.logs())
    here.wait(lambda: sorted(p.name for p in (here.folder.path / "videos").glob("*.mp4")) == [
        f"{one.id}.2.mp4"
    ])  # fmt: skip
    assert here.now(one) == found
    two = here.submit(sample_steps=2)
    assert here.ended(two).state == "completed"


@pytest.mark.slow
def test_a_worker_that_cannot_start_says_so(here: Here, tmp_path: Path) -> None:
    empty = tmp_path / "weights"
    empty.mkdir()
    worker = here.start("--ckpt_dir", str(empty), ready=False)
    assert worker.wait(LONG_S) == 2
    said = here.logs()
    assert said.count("wanflow: ") == 1 and str(empty) in said, said
