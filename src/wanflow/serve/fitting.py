"""Refuse, before a job is accepted, what fits none of the workers as they enrolled."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import prod
from typing import TYPE_CHECKING, Any

from wanflow.config import RequestError
from wanflow.geometry import geometry_of, parse_size
from wanflow.presets import EMBEDDED, ModelSpec
from wanflow.request import CompleteRequest
from wanflow.serve.jobs import Worker
from wanflow.serve.planner import TABLES, Planner

if TYPE_CHECKING:
    from wanflow.plan.gpus import Machine

REMEMBERED = 1000  # plans
SURELY = 64  # times the default video of a miniature: a run takes megabytes
WITHOUT = ("prompt", "negative_prompt", "seed", "fps", "lora", "image", "last_image")  # in a plan


def machine_document(machine: Machine, processes: int = 1) -> dict[str, Any]:
    """Return what a worker says of its machine when it enrols, for `planner.described`."""
    found = {name: value for name, value in vars(machine).items() if name not in TABLES}
    return {**found, "processes": processes}


class Fitting:
    """Remembers which requests fit which workers."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._known: dict[str, str] = {}  # question: why it does not fit, or ""

    def __call__(self, complete: CompleteRequest, spec: ModelSpec, workers: list[Worker]) -> None:
        """Raise RequestError with the numbers for a request that fits none of the workers.

        Where no worker has enrolled, nothing is refused: it is not known yet who will come.
        """
        reasons = []
        for worker in workers:
            reason = self._why_not(complete, spec, worker)
            if not reason:
                return
            reasons.append(reason)
        if reasons:
            raise RequestError(reasons[0])

    def _why_not(self, complete: CompleteRequest, spec: ModelSpec, worker: Worker) -> str:
        """Return why a request does not fit a worker; "" where it does."""
        size = parse_size(worker.limits.get("size") or spec.size, geometry_of(spec))
        frames = int(worker.limits.get("frame_num") or spec.frame_num)
        asked = prod(complete.size), complete.frame_num
        if worker.ready and asked[0] <= prod(size) and asked[1] <= frames:
            return ""  # what it was loaded for
        if worker.limits.get("size") and asked[0] > prod(size):
            return f"size {_text(complete.size)} is above {_text(size)}, the limit of the worker"
        if worker.limits.get("frame_num") and asked[1] > frames:
            return f"num_frames {asked[1]} is above {frames}, the limit of the worker"
        if spec.name in EMBEDDED and prod(asked) <= SURELY * prod(spec.size) * spec.frame_num:
            return ""
        request: dict[str, Any] = asdict(complete)
        for name in WITHOUT:
            del request[name]
        request |= {"prompt": "any", "seed": 0}
        about = {"machine": dict(worker.machine), "settings": dict(worker.settings)}
        key = json.dumps([request, about], sort_keys=True, default=str)
        if key not in self._known:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[key] = self._planner.why_not(request, spec.name, about)
        return self._known[key]


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
