"""The HTTP interface in this process, with a store on the disk and a worker that makes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

from starlette.testclient import TestClient

from wanflow.files import write_bytes
from wanflow.presets import NANO, ModelSpec
from wanflow.serve.fitting import Fitting
from wanflow.serve.folder import DataFolder
from wanflow.serve.http import create_app
from wanflow.serve.jobs import BEAT_S, Job, Progress, Standing, Worker
from wanflow.serve.limits import Limits
from wanflow.serve.local import LocalStore
from wanflow.serve.planner import Planner
from wanflow.serve.service import Service

VIDEO = bytes(range(256)) * 40


def wait_for(found: Callable[[], Any], seconds: float = 120.0) -> Any:
    """Return the first value that is true."""
    until = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.02)
    return value


class Serving:
    """An application with its store and data folder."""

    def __init__(
        self,
        path: Path,
        spec: ModelSpec | None = NANO,
        token: str = "",
        loras: dict[str, Path] | None = None,
        **limits: Any,
    ) -> None:
        self.store, self.data = LocalStore(path), DataFolder(path)
        self.limits = Limits(**limits)
        self.planner = Planner("nano" if spec is NANO else None, {})
        fitting = Fitting(self.planner)
        self.service = Service(self.store, self.data, self.limits, spec, loras or {}, fitting)
        self.app = create_app(self.service, token)

    @contextmanager
    def client(self, **options: Any) -> Iterator[TestClient]:
        with TestClient(self.app, base_url="http://127.0.0.1", **options) as client:
            yield client


class FakeWorker:
    """Claims jobs and writes a few bytes for each, in steps that the test may hold.

    steps: of each job. go: set while it may go on.
    """

    def __init__(self, serving: Serving, steps: int = 2, **about: Any) -> None:
        self._serving, self._steps = serving, steps
        self.me = Worker("fake", "nano", True, **about)
        self.go, self._over = Event(), Event()
        self.go.set()
        self.fail: dict[str, str] | None = None
        self._thread = Thread(target=self._work, daemon=True)

    def __enter__(self) -> FakeWorker:
        self._serving.store.enrol(self.me)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.go.set()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _work(self) -> None:
        beat = time.monotonic()
        while not self._over.is_set():
            if time.monotonic() - beat > BEAT_S:
                self._serving.store.enrol(self.me)
                beat = time.monotonic()
            job = self._serving.store.claim(self.me.id)
            if job is None:
                time.sleep(0.02)
            else:
                self._make(job)

    def _make(self, job: Job) -> None:
        store, data = self._serving.store, self._serving.data
        progress = Progress(0, self._steps, "denoising", "high", 3.0)
        for step in range(1, self._steps + 1):
            progress = replace(progress, step=step, percent=90 * step // self._steps)
            write_bytes(data.preview(job.id), b"preview %d" % step, overwrite=True)
            while True:
                if store.report(job, progress) is Standing.CANCELLED:
                    store.finish(job, "cancelled")
                    return
                if self.go.wait(0.05):
                    break
        if self.fail is not None:
            store.finish(job, "failed", error=self.fail)
            return
        about = job.about
        video = data.video(job, about["frames"])
        write_bytes(video, VIDEO, overwrite=True)
        write_bytes(data.beside(video, "thumbnail"), b"thumbnail", overwrite=True)
        result = {name: about[name] for name in ("width", "height", "frames", "fps")}
        result |= {
            "file": video.name,
            "bytes": len(VIDEO),
            "seed": job.request["seed"],
            "seconds": 1.5,
            "stages": {"denoising": 1.0, "decoding": 0.5},
            "seconds_per_step": 0.5,
            "peak_memory": {"ram": 2_000_000},
        }
        store.finish(job, "completed", result=result)
