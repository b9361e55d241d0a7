"""Plan a request for the workers as they enrolled, and refuse what fits none of them.

torch is imported where a request is larger than what surely fits, and nowhere before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from math import prod
from threading import Lock
from typing import TYPE_CHECKING, Any

from wanflow.config import RequestError
from wanflow.presets import EMBEDDED, ModelSpec
from wanflow.request import CompleteRequest
from wanflow.serve.jobs import Worker

if TYPE_CHECKING:
    from wanflow.checkpoint.checkpoint import Checkpoint
    from wanflow.plan.gpus import Machine

REMEMBERED = 1000  # plans
SURELY = 64  # times the default video, of a miniature: a run takes megabytes
FORCE = "(--force starts it anyway)"  # which no client can ask for


def machine_document(machine: Machine, processes: int = 1) -> dict[str, Any]:
    """Return what a worker says of its machine, for its enrolment."""
    kept = {name: getattr(machine, name) for name in _plain_fields()}
    return {**kept, "processes": processes}


def machine_of(document: Mapping[str, Any]) -> Machine:
    """Return a machine from a worker's enrolment; the plan asks this machine nothing."""
    from wanflow.plan.gpus import Machine

    kept = {name: document[name] for name in _plain_fields() if name in document}
    gpu = int(document.get("gpu", 0))
    base: dict[str, Any] = {"gpu": gpu, "gpu_name": "", "ram": 0, "ram_free": 0, "disk_free": 0}
    # The loaded model holds memory, which a job may use again.
    found = {**base, **kept, "described": True}
    return Machine(**{**found, "gpu_free": gpu, "ram_free": found["ram"]})


def _plain_fields() -> list[str]:
    from wanflow.plan.gpus import Machine

    return [one.name for one in fields(Machine) if one.name not in ("rates", "overheads")]


class Fitting:
    """Remembers which requests fit which workers.

    Args:
        ckpt_dir: the model's folder. parts: single files of it. Without both, its published ones
            are planned, of which the shapes are known.
    """

    def __init__(self, ckpt_dir: str | None, parts: Mapping[str, str] | None = None) -> None:
        self._ckpt_dir, self._parts = ckpt_dir, dict(parts or {})
        self._known: dict[str, str] = {}  # question: why it does not fit, or ""
        self._checkpoint: Checkpoint | None = None
        self._lock = Lock()

    def __call__(self, complete: CompleteRequest, spec: ModelSpec, workers: list[Worker]) -> None:
        """Raise RequestError with the numbers for a request that fits none of the workers."""
        small = spec.name in EMBEDDED
        asked, usual = (prod(one.size) * one.frame_num for one in (complete, spec))
        if not workers or (small and asked <= SURELY * usual):
            return
        reasons = [self._why(complete, spec, worker) for worker in workers]
        if all(reasons):
            raise RequestError(reasons[0])

    def _why(self, complete: CompleteRequest, spec: ModelSpec, worker: Worker) -> str:
        """Return why a request does not fit a worker; "" where it does."""
        shape = asdict(complete)
        for name in ("prompt", "negative_prompt", "seed", "fps", "lora"):
            shape.pop(name)
        pictures = [shape.pop(name) is not None for name in ("image", "last_image")]
        question = [shape, pictures, dict(worker.machine), dict(worker.settings)]
        key = json.dumps(question, sort_keys=True, default=str)
        with self._lock:
            if key not in self._known:
                if len(self._known) >= REMEMBERED:
                    self._known.clear()
                self._known[key] = self._planned(complete, spec, worker)
            return self._known[key]

    def _planned(self, complete: CompleteRequest, spec: ModelSpec, worker: Worker) -> str:
        from dataclasses import replace

        from wanflow.checkpoint.checkpoint import published
        from wanflow.opening import resolve
        from wanflow.plan.solve import solve
        from wanflow.plan.start import raise_if_unfit
        from wanflow.runtime import Runtime

        if self._checkpoint is None:
            named = self._ckpt_dir or (spec.name if spec.name in EMBEDDED else None)
            if named is None and not self._parts:
                self._checkpoint = published(spec)
            else:
                self._checkpoint = resolve(named, self._parts)
        known = {one.name for one in fields(Runtime)}
        settings = {name: value for name, value in worker.settings.items() if name in known}
        runtime = Runtime(**settings)
        processes = int(worker.machine.get("processes", 1))
        machine = machine_of(worker.machine)
        planned = solve(
            self._checkpoint, replace(complete, lora=()), runtime, machine, processes=processes
        )
        try:
            raise_if_unfit(planned)
        except RequestError as error:
            return str(error).replace(FORCE, "").replace("(force starts it anyway)", "").strip()
        return ""
