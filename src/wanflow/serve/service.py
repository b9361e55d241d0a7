"""Serve jobs: what HTTP does with the store and the data folder; each method may wait for them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from wanflow.config import RequestError
from wanflow.files import write_bytes
from wanflow.presets import EMBEDDED, FAMILY, NANO, NANO_I2V, SETTINGS, ModelSpec
from wanflow.request import PICTURES, CompleteRequest, Picture
from wanflow.serve.errors import Code, Refusal
from wanflow.serve.fields import as_sent, for_clients
from wanflow.serve.folder import DataFolder
from wanflow.serve.jobs import FullError, Job, Store, StoreError, Worker, new_id
from wanflow.serve.limits import Limits
from wanflow.serve.wire import Seen, again, asked, video

SPECS = {spec.name: spec for spec in (*FAMILY, NANO, NANO_I2V)}
SIZES = {
    "Wan2.2-TI2V-5B": ((1280, 704), (704, 1280)),
    **dict.fromkeys(EMBEDDED, ((64, 64), (96, 64), (64, 96))),
}
OFFICIAL = ((1280, 720), (720, 1280), (832, 480), (480, 832))
USUAL_S = 60.0  # a job, where none was measured yet
PACE_S = 1.0  # between two estimates of how fast the queue moves
RECENT = 20  # completed jobs that an estimate counts
Fits = Callable[[CompleteRequest, ModelSpec, list[Worker]], None]


@dataclass
class Service:
    """What the routes call.

    spec: of the model; None: that of the workers. loras: names that clients may use, with files.
    fits: refuses what no worker can run; see `wanflow.serve.fitting`.
    on_deleted: called with each job that a client deletes.
    """

    store: Store
    data: DataFolder
    limits: Limits
    spec: ModelSpec | None
    loras: Mapping[str, Path]
    fits: Fits
    on_deleted: Callable[[Job], object] = lambda job: None

    def __post_init__(self) -> None:
        self._opening = Lock()  # one large picture in memory at a time
        self._paced = -PACE_S, (USUAL_S, 0.0, 1)

    def model(self) -> ModelSpec:
        """Return the model that is served.

        Raises:
            Refusal: where no worker has enrolled.
        """
        if self.spec is not None:
            return self.spec
        for worker in self.store.workers():
            if worker.model in SPECS:
                return SPECS[worker.model]
        raise Refusal(
            503, "no worker has enrolled yet, so the model is not known; start `wanflow worker`",
            "no_worker", retry_s=5,
        )  # fmt: skip

    # Submission

    def submit(self, given: Mapping[str, Any], in_form: bool, idempotency: str | None) -> Job:
        """Check a submission and keep its job.

        Raises:
            Refusal: for what is invalid, or fits no worker; for a full disk or queue; and for an
                idempotency key of another submission.
        """
        spec = self.model()
        self._check_disk()
        code: Code = "invalid_value"
        try:
            one = asked(given, in_form, spec, self.limits, self.loras, self._read_picture)
            code = "does_not_fit"
            self.fits(one.complete, spec, self.store.workers())
        except RequestError as error:
            message, param = as_sent(str(error), given)
            raise Refusal(400, message, code, param) from None
        for name in PICTURES:
            picture = getattr(one.request, name)
            if picture is not None:
                self._keep(picture)
        job = Job(
            new_id(), one.document, one.key, about=one.about, idempotency=idempotency,
            created_at=time.time(),
        )  # fmt: skip
        try:
            kept, new = self.store.submit(job, self.limits.max_queue)
        except FullError as error:
            raise Refusal(
                429,
                f"the queue is full: {error}; try again later",
                "queue_full",
                retry_s=min(3600.0, self._next_place_s()),
            ) from None
        if not new and kept.about.get("mark") != one.about["mark"]:
            raise Refusal(
                409,
                "Idempotency-Key: it is that of a job with another request; send a new key for a"
                " new request",
                "idempotency_conflict",
            )
        return kept

    def _check_disk(self) -> None:
        try:
            free = shutil.disk_usage(self.data.path).free
        except OSError as error:  # the folder is gone, or its storage away
            raise StoreError(f"{self.data.path}: {error.strerror}") from error
        least = self.limits.min_free_gb * 1e9
        if free < least:
            raise Refusal(
                503,
                f"the disk of the server has {free / 1e9:.1f} GB left; a job needs"
                f" {least / 1e9:g} GB free: delete videos, or try again later",
                "disk_full",
                retry_s=60,
            )

    def _read_picture(self, data: bytes | str, name: str) -> Picture:
        from wanflow.pictures import read_picture  # takes time to import

        if isinstance(data, str):
            sha256 = data
            try:
                data = self.data.picture(sha256).read_bytes()
            except OSError:
                words = f"{name}: the picture {sha256[:12]}... is not kept any more; send it again"
                raise Refusal(400, words, "picture_missing", name) from None
        with self._opening:
            return read_picture(data, name, int(self.limits.max_picture_mp * 1e6))

    def _keep(self, picture: Picture) -> None:
        from PIL import Image

        path = self.data.picture(picture.sha256)
        if path.exists():
            os.utime(path)  # retention counts from here
            return
        file = io.BytesIO()
        Image.fromarray(picture.pixels).save(file, "PNG", compress_level=1)
        write_bytes(path, file.getvalue(), overwrite=True)

    # Answers

    def seconds_a_job(self) -> float:
        """Return how long a recent job took."""
        jobs = self.store.page(limit=RECENT, states=("completed",))
        took = [
            job.completed_at - job.started_at
            for job in jobs
            if job.started_at is not None and job.completed_at is not None
        ]
        return max(0.1, statistics.median(took)) if took else USUAL_S

    def _next_place_s(self) -> float:
        """Return when the next of the jobs at work ends, which frees a place of the queue."""
        running = self.store.page(limit=100, states=("in_progress",))
        left = [job.progress.eta_s for job in running if job.progress.eta_s is not None]
        return min(left) if left else self.seconds_a_job()

    def _pace(self) -> tuple[float, float, int]:
        """Return the seconds of a job and of those at work, and the workers; as of a moment ago."""
        now = time.monotonic()
        if now - self._paced[0] > PACE_S:
            each, running = (
                self.seconds_a_job(),
                self.store.page(limit=100, states=("in_progress",)),
            )
            left = (job.progress.eta_s for job in running)
            ahead = sum(each / 2 if one is None else one for one in left)
            self._paced = now, (each, ahead, max(1, len(self.store.workers())))
        return self._paced[1]

    def videos(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Return video objects of jobs, newest first, without a gap among those that wait."""
        waiting = [job.id for job in reversed(jobs) if job.state == "queued"]
        places: dict[str, int] = {}
        if waiting:
            first = self.store.ahead(waiting[0]) + 1
            places = {id: first + n for n, id in enumerate(waiting)}
        return [self._video(job, places.get(job.id)) for job in jobs]

    def _video(self, job: Job, place: int | None) -> dict[str, Any]:
        eta = job.progress.eta_s if job.state == "in_progress" else None
        if place is not None:
            each, ahead, workers = self._pace()
            eta = (ahead + place * each) / workers
        return video(job, Seen(place, eta, self.limits.keep_days * 86_400))

    def kept(self, job: Job) -> dict[str, Any]:
        """Return the video object of a job just kept, also where the store is away by now."""
        try:
            return self.one(job.id)[1]
        except StoreError:  # no client may believe that it is not kept
            return self._video(job, None)

    def one(self, id: str) -> tuple[Job, dict[str, Any], int]:
        """Return a job, its video object, and when its preview was written (0: there is none).

        Raises:
            Refusal: where there is no such job.
        """
        job = self.store.get(id)
        if job is None:
            raise missing(id)
        return job, self.videos([job])[0], self._written(self.data.preview(id))

    def page(
        self, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[dict[str, Any]], bool]:
        """Return video objects of a page, and whether more follow.

        Raises:
            Refusal: where there is no job `after`.
        """
        if after is not None and self.store.get(after) is None:
            raise missing(after, "after")
        jobs = self.store.page(after, limit + 1, newest_first)
        turn = 1 if newest_first else -1
        return self.videos(jobs[:limit][::turn])[::turn], len(jobs) > limit

    def recent(self, limit: int) -> list[tuple[dict[str, Any], int, str]]:
        """Return the newest jobs and all that are not final, newest first.

        Each with when its preview was written, and a mark that is another after each change.
        """
        jobs = self.store.page(limit=limit)
        here = {job.id for job in jobs}
        others = self.store.page(limit=10_000, states=("queued", "in_progress"))
        jobs += [job for job in others if job.id not in here]
        found = []
        for one in self.videos(jobs):
            working = one["status"] == "in_progress"
            written = self._written(self.data.preview(one["id"])) if working else 0
            found.append((one, written, mark_of(one)))
        return found

    def cancel(self, id: str) -> dict[str, Any]:
        """Cancel a job; one in a final state stays as it is."""
        job = self.store.cancel(id)
        if job is None:
            raise missing(id)
        return self.one(id)[1]

    def delete(self, id: str) -> bool:
        """Delete a finished job with its files; cancel another, and return False until it ends."""
        job = self.store.cancel(id)
        if job is None:
            raise missing(id)
        deleted = self.store.delete(id)
        if deleted is None:
            return self.store.get(id) is None
        self.on_deleted(deleted)
        self.data.forget(id)
        return True

    def file(self, id: str, variant: str) -> Path:
        """Return the file of a job's result.

        Raises:
            Refusal: while there is none.
        """
        job = self.store.get(id)
        if job is None:
            raise missing(id)
        if not job.final:
            raise Refusal(
                409, f"video {id} is {job.state}; try again when it is completed", "not_ready",
                retry_s=self.one(id)[1]["eta_seconds"] or 1,
            )  # fmt: skip
        if job.state != "completed":
            why = for_clients((job.error or {}).get("message", ""))
            words = f"video {id} is {job.state}{why and ': ' + why}"
            raise Refusal(404, words, "cancelled" if job.state == "cancelled" else "failed")
        path = self.data.path / "videos" / Path(str(job.result.get("file", ""))).name
        if variant != "video":
            path = self.data.beside(path, variant)
        if not path.is_file():
            raise Refusal(404, f"video {id} has no {variant} any more", "file_missing")
        return path

    def preview(self, id: str) -> Path:
        """Return the newest preview of a job."""
        job = self.store.get(id)
        path = self.data.preview(id)
        if job is None or not path.is_file():
            raise Refusal(404, f"there is no preview of {id}", "no_preview")
        return path

    def recipe(self, id: str) -> dict[str, Any]:
        """Return the recipe inside a job's video."""
        from wanflow.clipfiles import read_recipe

        return read_recipe(self.file(id, "video"))

    def request(self, id: str) -> dict[str, Any]:
        """Return what a client submits to make a job again."""
        job = self.store.get(id)
        if job is None:
            raise missing(id)
        return again(job)

    def ready(self) -> bool:
        """Return whether a job can start."""
        return any(worker.ready for worker in self.store.workers())

    def settings(self) -> dict[str, Any]:
        """Return what the page needs to offer: the model, its sizes and defaults, limits, LoRAs."""
        spec = self.model()
        names = ("sample_solver", "cfg_high", "cfg_low", "boundary", "fps", "negative_prompt")
        limits = self.limits
        return {
            "model": spec.name,
            "task": spec.task,
            "conditioning": spec.conditioning,
            "pictures": {"text": 0, "channels": 2, "first_frame": 1}[spec.conditioning],
            "picture_needed": spec.conditioning == "channels",
            "experts": list(spec.expert_names),
            "fps": spec.fps,
            "sizes": ["x".join(map(str, size)) for size in SIZES.get(spec.name, OFFICIAL)],
            "defaults": {
                "size": "x".join(map(str, spec.size)),
                "num_frames": spec.frame_num,
                "num_inference_steps": spec.sample_steps,
                "flow_shift": spec.sample_shift,
                **{name: getattr(spec, name) for name in names},
            },
            "presets": list(SETTINGS),
            "loras": list(self.loras),
            "limits": {
                "prompt": limits.max_prompt,
                "area": limits.area,
                "frames": limits.max_frames,
                "steps": limits.max_steps,
                "queue": limits.max_queue,
                "body_bytes": limits.body,
                "picture_megapixels": limits.max_picture_mp,
            },
            "keep_days": limits.keep_days,
        }

    @staticmethod
    def _written(file: Path) -> int:
        try:
            return file.stat().st_mtime_ns
        except OSError:
            return 0


def mark_of(video: Mapping[str, Any]) -> str:
    """Return what is equal for equal video objects; a reader sends it back to go on."""
    return hashlib.sha256(json.dumps(video, sort_keys=True).encode()).hexdigest()[:16]


def missing(id: str, param: str = "video_id") -> Refusal:
    """Return the answer for a job that is not there."""
    return Refusal(404, f"there is no video {id}; GET /v1/videos lists all", "not_found", param)
