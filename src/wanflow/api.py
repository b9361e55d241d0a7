"""Offer a loaded model in four calls: `Pipeline` makes a `Video` of a request.

The core ends here, where the frames exist; `wanflow.Video` writes them into files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from wanflow.pipeline import Engine, Frames, OnPart, OnStep, Run, begin, decode, denoise
from wanflow.presets import ModelSpec
from wanflow.request import Request
from wanflow.sanity import refuse_constant


@dataclass(frozen=True, eq=False)
class Video:
    """A finished video: frames uint8 [T, H, W, 3], frames per second, and its recipe."""

    frames: Frames
    fps: float
    recipe: dict[str, Any]

    def __repr__(self) -> str:
        count, height, width = self.frames.shape[:3]
        return f"<Video: {count} frame{'s' * (count != 1)} of {width}*{height} at {self.fps:g} fps>"


class Pipeline:
    """A loaded model. `front` adds `generate`: begin a request, resume it, finish it.

    parts: what the engine's callables read from, for tools that look inside; may be None.
    """

    def __init__(self, engine: Engine, parts: Any = None) -> None:
        self.engine, self.parts = engine, parts

    @property
    def spec(self) -> ModelSpec:
        """The model's shapes and defaults."""
        return self.engine.spec

    def begin(self, request: Request) -> Run:
        """Complete a request and draw its noise: a run at step 0. Reads no weights."""
        return begin(self.engine, request)

    def check(self, run: Run) -> None:
        """Raise RequestError for a run that cannot continue here."""
        self.engine.check(run)

    def resume(self, run: Run, on_step: OnStep | None = None) -> Run:
        """Denoise a run from its state to its end; see `wanflow.pipeline.denoise`.

        Several processes continue the first one's state, and its `on_step` decides for all.
        """
        return denoise(self.engine, run, on_step)

    def frames(self, run: Run, on_part: OnPart | None = None) -> Iterator[Frames]:
        """Decode a finished run as it goes; see `wanflow.pipeline.decode`.

        Of several processes the first one gets the frames; each must go through to the end.
        """
        return decode(self.engine, run, on_part)

    def finish(self, run: Run, on_part: OnPart | None = None) -> Video:
        """Decode a finished run. Of several processes the first one gets a video with frames."""
        width, height = run.request.size
        chunks = self.frames(run, on_part)
        frames = np.concatenate([np.empty((0, height, width, 3), np.uint8), *chunks])
        if len(frames):
            refuse_constant(int(frames.min()), int(frames.max()))
        return Video(frames, run.request.fps, self.engine.used(run).recipe.to_json())
