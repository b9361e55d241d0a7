"""Gangs that tests play, and what a test of a worker needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

from helpers.common import PROMPT
from wanflow.serve.folder import DataFolder
from wanflow.serve.jobs import Job, Store, new_id
from wanflow.serve.line import Message
from wanflow.serve.worker import Foreman

READY = {"say": "ready", "model": "nano", "machine": {}, "settings": {}, "limits": {}}
LIMIT_S = 120.0


def wait_for(
    true: Callable[[], Any], story: Callable[[], str] = str, limit_s: float = LIMIT_S
) -> Any:
    """Return what becomes true; where it does not, `story` says what happened instead."""
    until = time.monotonic() + limit_s
    while not (found := true()):
        assert time.monotonic() < until, story() or "it never came true"
        time.sleep(0.01)
    return found


def job(key: str = "", **request: Any) -> Job:
    asked = {"prompt": PROMPT, "sample_steps": 4, "frame_num": 5, "seed": 7, **request}
    return Job(new_id(), asked, key)


class Played:
    """A gang that a test plays: `on_make` is called with itself and the job."""

    def __init__(self, take: Callable[[Message], object], on_make: Callable[..., object]) -> None:
        self.take, self.on_make = take, on_make
        self.heard: list[Message] = []
        self.begun, self.ended = True, False
        take(READY)
        take({"say": "idle"})

    def say(self, **message: Any) -> None:
        self.heard.append(message)
        if message["do"] == "make":
            self.on_make(self, message["job"])
        elif message["do"] == "drain":
            self.on_drain(message)
        elif message["do"] == "cancel":
            self.on_cancel(message)

    def on_drain(self, message: Message) -> None:
        if self.begun:
            self.take({"say": "stopped", "id": self.made, "step": 2})
        self.end(0)

    def on_cancel(self, message: Message) -> None:
        self.take({"say": "stopped", "id": message["id"], "step": 2})
        self.take({"say": "idle"})

    @property
    def made(self) -> str:
        """The job that it got last."""
        found: str = [one["job"]["id"] for one in self.heard if one["do"] == "make"][-1]
        return found

    def progress(self, step: int) -> None:
        facts = {"step": step, "steps": 4, "stage": "denoising"}
        self.take({"say": "progress", "id": self.made, "progress": facts})

    def done(self, folder: DataFolder, made: Message) -> None:
        file = folder.video(Job(made["id"], {}, attempts=made["attempts"]), 5)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"video")
        self.take({"say": "done", "id": made["id"], "result": {"file": file.name, "seconds": 1}})
        self.take({"say": "idle"})

    def kill(self) -> None:
        self.end(-9)

    def end(self, code: int) -> None:
        if not self.ended:
            self.ended = True
            self.take({"say": "ended", "code": code})


class Scene:
    """A worker with gangs that a test plays."""

    def __init__(
        self, store: Store, folder: Path, on_make: Callable[..., object], **known: Any
    ) -> None:
        self.store, self.folder = store, DataFolder(folder)
        self.gangs: list[Played] = []
        self.returned: list[Any] = []

        def hire(take: Callable[[Message], object]) -> Played:
            self.gangs.append(Played(take, on_make))
            return self.gangs[-1]

        self.foreman = Foreman(store, self.folder, hire, **known)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        def run() -> None:
            self.returned.append(self.foreman.run())

        thread = Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            self.foreman.leave()
            thread.join(LIMIT_S)
            assert not thread.is_alive()

    def state(self, job: Job) -> str:
        found = self.store.get(job.id)
        return "gone" if found is None else found.state

    def files(self) -> list[str]:
        found = (self.folder.path / "videos").glob("*")
        return sorted(file.name for file in found)
