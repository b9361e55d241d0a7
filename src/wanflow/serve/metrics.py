"""Count for Prometheus: the queue by state, workers, and what finished jobs took."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from threading import Lock
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from wanflow.serve.jobs import FINAL, Job, StoreError
from wanflow.serve.service import Service

EVERY_S = 2.0  # between two looks at finished jobs
LOOK = 200  # finished jobs at a look
SECONDS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1200, 3600)
STEP_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
# A label's values are bounded: whatever else a worker says, counts as other.
STAGES = ("loading", "prompt", "picture", "denoising", "decoding", "saving")


class Metrics(Collector):
    """The metrics of this process, in a registry of its own.

    What is now, is asked at each scrape. What jobs took, is watched: a job counts when this process
    sees that it ended, so the counters begin at 0 with each process, as Prometheus expects.
    """

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, service: Service) -> None:
        self._service, self._began = service, time.time()
        self._seen: dict[str, None] = {}
        self._counting = Lock()
        service.on_deleted = self._see  # before the next look, maybe
        self._registry = registry = CollectorRegistry()
        registry.register(self)
        self._ended = Counter("wanflow_jobs_ended", "jobs that ended", ["state"], registry=registry)
        for state in FINAL:
            self._ended.labels(state)
        self._job = _histogram("wanflow_job_seconds", "from the first claim to the end", registry)
        self._waited = _histogram("wanflow_queue_seconds", "from submission to claim", registry)
        self._stage = Histogram(
            "wanflow_stage_seconds", "of a job, by stage", ["stage"], buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self._step = Histogram(
            "wanflow_step_seconds", "of a denoising step", buckets=STEP_SECONDS, registry=registry
        )
        self._peak = Gauge(
            "wanflow_peak_memory_bytes", "of the last job", ["kind"], registry=registry
        )

    def text(self) -> bytes:
        """Return the metrics as Prometheus reads them."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield what the store says now."""
        store = self._service.store
        jobs = GaugeMetricFamily("wanflow_jobs", "jobs in the store, by state", labels=["state"])
        for state, count in store.counts().items():
            jobs.add_metric([state], count)
        yield jobs
        workers = store.workers()
        found = GaugeMetricFamily("wanflow_workers", "workers that live", labels=["ready"])
        ready = sum(worker.ready for worker in workers)
        found.add_metric(["true"], ready)
        found.add_metric(["false"], len(workers) - ready)
        yield found

    def describe(self) -> Iterator[Metric]:
        """Yield nothing: the registry need not ask the store at its start."""
        return iter(())

    async def watch(self, run: Callable[..., Awaitable[Any]]) -> None:
        """Look for jobs that ended, for ever."""
        while True:
            with suppress(StoreError):
                await run(self.look)
            await asyncio.sleep(EVERY_S)

    def look(self) -> None:
        """Count the jobs that ended since this process began and are not counted yet."""
        for job in self._service.store.page(limit=LOOK, states=FINAL):
            self._see(job)

    def _see(self, job: Job) -> None:
        """Count a job that ended, once."""
        with self._counting:
            if job.id not in self._seen and (job.completed_at or 0) >= self._began:
                self._count(job)
                self._seen[job.id] = None
            for id in list(self._seen)[: -10 * LOOK]:
                del self._seen[id]

    def _count(self, job: Job) -> None:
        self._ended.labels(job.state).inc()
        if job.started_at is not None:
            self._waited.observe(max(0.0, job.started_at - job.created_at))
            self._job.observe(max(0.0, (job.completed_at or 0) - job.started_at))
        if job.state != "completed":
            return
        stages = dict(job.result.get("stages") or {})
        for stage, seconds in stages.items():
            self._stage.labels(stage if stage in STAGES else "other").observe(seconds)
        if job.result.get("seconds_per_step") is not None:
            self._step.observe(job.result["seconds_per_step"])
        for kind, size in dict(job.result.get("peak_memory") or {}).items():
            if kind in ("gpu", "ram"):
                self._peak.labels(kind).set(size)


def _histogram(name: str, words: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(name, words, buckets=SECONDS, registry=registry)
