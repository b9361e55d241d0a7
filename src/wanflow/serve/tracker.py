"""Follow a job through its stages: how far it is, how long it takes, and when it will end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from wanflow.serve.jobs import Job, Progress

if TYPE_CHECKING:
    from wanflow import pipeline

DENOISED = 90  # per cent of a job that the denoising stands for
LOADING_S = 0.5  # between two messages while weights are read


class Tracker:
    """The stages of one job, reported as they go.

    stages: the seconds that each took. seconds_per_step: the median, None before the first step.

    Args:
        job: that is made.
        say: tells the worker.
    """

    def __init__(self, job: Job, say: Callable[..., object]) -> None:
        self.stages: dict[str, float] = {}
        self.seconds_per_step: float | None = None
        self._job, self._say = job, say
        self._stage, self._since = "prompt", time.monotonic()
        self._before, self._told = "", 0.0
        self._steps: list[float] = []
        self._step, self._total, self._first, self._expert = 0, 0, 0, ""
        self._percent = 0
        self._eta: float | None = None
        self._decode_s: float | None = None

    def begin(self, run: pipeline.Run, decode_rate: float | None) -> None:
        """Take what is known of the run.

        Args:
            run: at its first step, or at a later one.
            decode_rate: seconds of decoding for each value of a video, if they are known.
        """
        width, height = run.request.size
        amount = 3 * width * height * run.request.frame_num
        self._decode_s = None if decode_rate is None else decode_rate * amount
        self._step = self._first = run.state.index
        self._total = run.request.sample_steps
        self._at = time.monotonic()
        self._enter("picture" if run.pictures and not self._step else "prompt")
        self._tell()

    @property
    def reading(self) -> bool:
        """Whether weights are read now."""
        return self._stage == "loading"

    def loading(self, done: int, total: int) -> None:
        """Take how many bytes of a part are read."""
        if self._stage != "loading":
            self._before = self._stage
            self._enter("loading")
        if done >= total:
            self._enter(self._before)
        if done >= total or time.monotonic() - self._told > LOADING_S:
            self._tell()

    def step(self, progress: pipeline.Progress) -> None:
        """Take a step that is done."""
        now = time.monotonic()
        self._steps.append(now - self._at)
        self._at = now
        self.seconds_per_step = round(sorted(self._steps)[len(self._steps) // 2], 6)
        self._step, self._expert = progress.step, progress.expert
        self._enter("denoising")
        self._percent = DENOISED * self._step // self._total
        left = self.seconds_per_step * (self._total - self._step)
        self._eta = None if self._decode_s is None else round(left + self._decode_s, 1)
        self._tell()

    def decoding(self) -> None:
        """Take that the latent is finished."""
        self._step, self._percent, self._eta = self._total, DENOISED, None
        self._enter("decoding")
        self._at = time.monotonic()
        self._tell()

    def part(self, done: int, total: int) -> None:
        """Take a part that is decoded."""
        passed = time.monotonic() - self._at
        self._percent = DENOISED + (99 - DENOISED) * done // total
        self._eta = round(passed / done * (total - done), 1) if done else None
        self._tell()

    def saving(self) -> None:
        """Take that all frames are there."""
        self._enter("saving")
        self._tell()

    def end(self) -> None:
        """Count the time of the last stage."""
        self._enter("")

    def _enter(self, stage: str) -> None:
        now = time.monotonic()
        self.stages[self._stage] = self.stages.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now

    def _tell(self) -> None:
        self._told = time.monotonic()
        where = self._stage, self._expert, self._eta, self._percent
        progress = Progress(self._step, self._total, *where)
        self._say(say="progress", id=self._job.id, progress=asdict(progress))
