"""Make the videos of jobs, one after the other, with one loaded model: the gang's side.

A gang is one process, or the ranks of one run. Rank 0 talks with the worker; the others follow it.
An error at the job's fault ends the job; any other error ends the gang, and the worker starts a
fresh one.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from wanflow.config import RequestError
from wanflow.files import DISK_TROUBLE, DiskError
from wanflow.front import Pipeline
from wanflow.hardware import peak_memory
from wanflow.keeping import Keeper
from wanflow.media import check_target
from wanflow.out_of_memory import is_out_of_memory, words
from wanflow.outputs import refuse_without_room
from wanflow.pictures import open_picture
from wanflow.pipeline import Cancelled, Progress, Run
from wanflow.preview import Previewer
from wanflow.request import PICTURES, Picture, Request
from wanflow.sanity import OutputError
from wanflow.serve.chosen import Chosen
from wanflow.serve.folder import DataFolder
from wanflow.serve.jobs import Job
from wanflow.serve.line import Line, Message
from wanflow.serve.loras import with_files
from wanflow.serve.named import without_folders
from wanflow.serve.tracker import Tracker
from wanflow.video import save_frames

if TYPE_CHECKING:
    from wanflow.loaders.parts import Report
    from wanflow.parallel.orders import Orders

DENSITY = 4  # pixels of a video that take a byte of its file, at the least; ours take more

logger = logging.getLogger("wanflow")


class Instructions:
    """Rank 0's side of the line: the jobs that come, and which of them are to stop.

    Args:
        line: to the worker.
        on_gone: called where the worker is gone.
    """

    def __init__(self, line: Line, on_gone: Callable[[], object] = lambda: os._exit(1)) -> None:
        self.line = line
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._cancelled, self._draining = set[str](), Event()
        self._on_gone = on_gone
        Thread(target=self._hear, name="worker-line", daemon=True).start()

    def next(self) -> Job | None:
        """Wait for the next job; None: there will be none."""
        self.line.say(say="idle")
        job = self._jobs.get()
        return None if self._draining.is_set() else job

    def stopping(self, job: Job) -> bool:
        """Return whether to stop after this step."""
        return self._draining.is_set() or job.id in self._cancelled

    def kept(self, job: Job) -> bool:
        """Return whether the state of a job that stops is worth keeping."""
        return job.id not in self._cancelled

    def forget(self, job: Job) -> None:
        """Forget that a job was cancelled, now that it has ended."""
        self._cancelled.discard(job.id)

    def _hear(self) -> None:
        self.line.hear(self._take)
        self._on_gone()

    def _take(self, message: Message) -> None:
        if message["do"] == "make":
            job = Job(**message["job"])
            self.forget(job)  # it may have been cancelled here after its last attempt
            self._jobs.put(job)
        elif message["do"] == "cancel":
            self._cancelled.add(message["id"])
        elif message["do"] == "drain":
            self._draining.set()
            self._jobs.put(None)


class Refused(Exception):
    """A request that cannot be made; the words are for its client."""


@dataclass
class Maker:
    """What makes videos on every rank of a gang.

    open: opens the model, and calls its argument while weights are read.
    folder: of data. loras: folders of registered LoRAs.
    worker: on rank 0, the line to the worker; None on the other ranks.
    orders: from rank 0 to the others; None where there are none.
    on_abort: is given what saves the state of the present run.
    save_s: seconds between two saved states.
    """

    open: Callable[[Report | None], Pipeline]
    folder: DataFolder
    loras: Sequence[Path] = ()
    worker: Instructions | None = None
    orders: Orders | None = None
    on_abort: Callable[[Callable[[], object]], object] = lambda save: None
    save_s: float | None = None

    def __post_init__(self) -> None:
        self._job: Job | None = None  # at work
        self._tracker: Tracker | None = None
        self._keeper: Keeper | None = None
        self._decode_rate: float | None = None  # seconds for each value of a video
        self.pipe = self._opened()

    def work(self) -> None:
        """Make jobs until there will be none."""
        while (job := self._next()) is not None:
            if self.worker is None:
                self._follow(job)
            else:
                self._lead(job, self.worker)
            if self.pipe.parts.adapted:  # what took less memory changes other videos by rounding
                self.pipe.parts.close()
                self.pipe = self._opened()

    def on_end(self, code: int, message: str) -> None:
        """Tell the worker why the ranks of a run end, where one of them failed."""
        if self._job is None or self.worker is None:
            return
        say, id = self.worker.line.say, self._job.id
        if ": out of memory" in message:
            say(say="failed", id=id, code="out_of_memory", message=message)
        else:
            say(say="crashed", id=id, why=message)

    def _opened(self) -> Pipeline:
        return self.open(None if self.worker is None else self._loading)

    def _loading(self, what: str, done: int, total: int) -> None:
        if self._tracker is None or self._keeper is None:
            return
        self._tracker.loading(done, total)
        alone, job = self.orders is None, self._job  # ranks read an expert together
        if alone and job is not None and self.worker is not None and self.worker.stopping(job):
            raise Cancelled(self._keeper.run)

    def _next(self) -> Job | None:
        """Return the next job, the same on all ranks; None: there will be none."""
        if self.worker is None:
            assert self.orders is not None
            text = self.orders.take()
            return Job(**json.loads(text)) if text else None
        job = self.worker.next()
        if self.orders is not None:
            self.orders.give("" if job is None else json.dumps(made_of(job)))
        return job

    def _follow(self, job: Job) -> None:
        with suppress(Refused, OutputError, Cancelled):
            for _ in self.pipe.frames(self.pipe.resume(self._begun(job)[0])):
                pass

    def _lead(self, job: Job, worker: Instructions) -> None:
        """Make a job, and tell the worker how it ended."""
        say, self._job = worker.line.say, job
        try:
            say(say="done", id=job.id, result=self._made(job, worker))
        except Cancelled as stop:
            say(say="stopped", id=job.id, step=stop.run.state.index)
            if self._tracker is not None and self._tracker.reading:
                self.pipe.parts.close()  # what is read in part
        except Refused as error:
            say(say="failed", id=job.id, code="invalid_request", message=str(error))
        except OutputError as error:
            say(say="failed", id=job.id, code="bad_output", message=str(error))
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_TROUBLE:
                say(say="stopped", id=job.id, why=str(error))
            elif is_out_of_memory(error):
                say(say="failed", id=job.id, code="out_of_memory", message=words(error))
                if self.orders is not None:
                    self._job = None
                    raise  # the other ranks wait in the midst of a pass
                error.__traceback__ = None  # which holds tensors
                self.pipe.parts.close()
                self.pipe = self._opened()
            else:
                if self.orders is None:  # of several ranks, the watchdog knows which one failed
                    say(say="crashed", id=job.id, why=f"{type(error).__name__}: {error}")
                raise
        worker.forget(job)
        self._job = self._tracker = self._keeper = None

    def _made(self, job: Job, worker: Instructions) -> dict[str, Any]:
        """Make the video of a job, and return the facts of its result.

        Raises:
            Cancelled: once its state is saved, or was given up.
        """
        began = time.monotonic()
        self._tracker = tracker = Tracker(job, worker.line.say)
        run, stored, notes = self._begun(job)
        video = self.folder.video(job, run.request.frame_num)
        if self.orders is None:  # before the work; ranks stop together after it
            self._check_disk(video)
        tracker.begin(run, self._decode_rate)
        keeper = Keeper(run, self.folder.state(job.id), logger.warning, stored, self.save_s)
        self._keeper = keeper
        self.on_abort(keeper.save)
        try:
            run = self._denoised(run, job, worker, keeper, tracker)
            keeper.take(run)
            keeper.try_to_save()
            run = self._written(run, video, job, worker, tracker)
        except BaseException as error:
            keeper.wait()
            if not isinstance(error, OutputError) and worker.kept(job):
                keeper.try_to_save()
            raise
        finally:
            self.on_abort(lambda: None)
        keeper.wait()
        width, height = run.request.size
        tracker.end()
        self._decode_rate = tracker.stages.get("decoding", 0.0) / values(run)
        return {
            "file": video.name,
            "bytes": video.stat().st_size,
            "width": width,
            "height": height,
            "frames": run.request.frame_num,
            "fps": run.request.fps,
            "seed": run.request.seed,
            "seconds": round(time.monotonic() - began, 3),
            "stages": {name: round(spent, 3) for name, spent in tracker.stages.items()},
            "seconds_per_step": tracker.seconds_per_step,
            "peak_memory": peak_memory(),
            "notes": notes,
        }

    def _check_disk(self, video: Path, needed: int = 0) -> None:
        """Raise DiskError unless a video of so many bytes can be written: no fault of its job."""
        try:
            check_target(video, overwrite=True)
            if needed:
                refuse_without_room(video, needed, "the video")
        except RequestError as error:
            raise DiskError(errno.ENOSPC, str(error)) from None

    def _begun(self, job: Job) -> tuple[Run, int | None, list[str]]:
        """Return the run of a job, the step of its state on the disk, and what to know about it."""
        notes: list[str] = []
        try:
            run = self.pipe.begin(self._request(job))
            saved = self._saved(job, run, notes)
            self.pipe.check(saved or run)
        except RequestError as error:
            raise Refused(str(error)) from None
        return (run, None, notes) if saved is None else (saved, saved.state.index, notes)

    def _request(self, job: Job) -> Request:
        known = {one.name for one in fields(Request)}
        values = {name: value for name, value in job.request.items() if name in known}
        for name in PICTURES:
            if values.get(name):
                values[name] = self._picture(values[name], name)
        if values.get("lora"):
            values["lora"] = with_files(values["lora"], self.loras)
        return Request(**values)

    def _picture(self, sha256: str, name: str) -> Picture:
        file = self.folder.picture(sha256)
        picture = open_picture(file, name) if file.is_file() else None
        if picture is None or picture.sha256 != sha256:
            raise RequestError(f"{name}: the picture is gone from the server; send it again")
        return replace(picture, file="")

    def _saved(self, job: Job, begun: Run, notes: list[str]) -> Run | None:
        """Return the saved run of a job that an earlier attempt began, if it is this video's."""
        file = self.folder.state(job.id)
        if not file.exists():
            return None
        try:
            saved = Run.load(file)
        except RequestError as error:
            notes.append(f"its saved state is damaged, so it began again ({error})")
        else:
            ours, other = begun.recipe, saved.recipe
            same = ours.request == other.request and ours.loras == other.loras
            if same and ours.model.fingerprint == other.model.fingerprint:
                return saved
            notes.append("its saved state is of another video, so it began again")
        logger.warning("job %s: %s", job.id, notes[-1])
        return None

    def _denoised(
        self, run: Run, job: Job, worker: Instructions, keeper: Keeper, tracker: Tracker
    ) -> Run:
        def on_step(progress: Progress) -> bool:
            keeper(progress)
            tracker.step(progress)
            preview(progress)
            return not worker.stopping(job)

        with Previewer(self.pipe, self.folder.preview(job.id)) as preview:
            return self.pipe.resume(run, on_step)

    def _written(
        self, run: Run, video: Path, job: Job, worker: Instructions, tracker: Tracker
    ) -> Run:
        """Decode a run and write its files; return it with the recipe of what was really used."""
        tracker.decoding()
        alone = self.orders is None
        try:
            self._check_disk(video, values(run) // (3 * DENSITY))
        except DiskError:
            for _ in () if alone else self.pipe.frames(run):  # the other ranks decode
                pass
            raise

        def on_part(done: int, total: int) -> None:
            tracker.part(done, total)
            if alone and worker.stopping(job):  # ranks cannot leave a decode together
                raise Cancelled(run)

        chunks = self.pipe.frames(run, on_part)
        chosen = Chosen(run.request.frame_num)
        try:
            first = next(chunks)  # from now on the recipe stands
            used = self.pipe.engine.used(run)
            frames = chosen.passed(first, chunks)
            recipe = without_folders(used.recipe).to_json()
            save_frames(video, frames, run.request.fps, recipe, overwrite=True)
        except Exception:
            for _ in chunks:  # the other ranks go through to the end
                pass
            raise
        tracker.saving()
        chosen.write(self.folder, video)
        return used


def values(run: Run) -> int:
    """Return the bytes of a video's pixels."""
    width, height = run.request.size
    return 3 * width * height * run.request.frame_num


def made_of(job: Job) -> dict[str, Any]:
    """Return what a gang needs to know of a job."""
    return {"id": job.id, "attempts": job.attempts, "request": dict(job.request)}


def settings(pipe: Pipeline) -> dict[str, Any]:
    """Return the settings of a loaded model, without names of folders."""
    found = asdict(pipe.parts.runtime)
    return {name: value for name, value in found.items() if not name.endswith("_cache")}
