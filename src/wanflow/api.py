"""Offer a loaded model in four calls: `Pipeline` makes a `Video` of a request."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wanflow.config import RequestError
from wanflow.media import VideoWriter, Writer, one_frame, recipe_tags, save_picture
from wanflow.pipeline import Engine, Frames, OnPart, OnStep, Run, begin, decode, denoise
from wanflow.presets import ModelSpec
from wanflow.request import Request
from wanflow.sanity import OutputError
from wanflow.untrusted import user_path

if TYPE_CHECKING:
    from typing import Unpack

    from wanflow.options import Encoding


@dataclass(frozen=True, eq=False)
class Video:
    """A finished video: frames uint8 [T, H, W, 3], frames per second, and its recipe."""

    frames: Frames
    fps: float
    recipe: dict[str, Any]

    def __repr__(self) -> str:
        count, height, width = self.frames.shape[:3]
        return f"<Video: {count} frame{'s' * (count != 1)} of {width}*{height} at {self.fps:g} fps>"

    def save(
        self, path: str | os.PathLike[str], overwrite: bool = False, **encoding: Unpack[Encoding]
    ) -> Path:
        """Write the video with its recipe inside; return the path.

        Write nothing where there are no frames, as in all processes but the first.
        """
        writer = self.writer_of(target := user_path(path), **encoding)
        if not len(self.frames):
            return target
        frames = iter([self.frames])
        return save_frames(target, frames, self.fps, self.recipe, overwrite, writer)

    @staticmethod
    def writer_of(path: Path, **encoding: Unpack[Encoding]) -> Writer:
        """Return what writes a file of this name; `wanflow.Video` knows more than .mp4 and .png."""
        if encoding or path.suffix.lower() not in (".mp4", ".png"):
            raise RequestError(f"{path.name}: name an .mp4 or .png, without {[*encoding]}")
        return VideoWriter


def save_frames(
    path: Path,
    chunks: Iterator[Frames],
    fps: float,
    recipe: dict[str, Any],
    overwrite: bool = False,
    writer: Writer = VideoWriter,
) -> Path:
    """Write frames as they come; the file appears under its name when it is complete.

    Raises:
        OutputError: when all frames are one constant; nothing is left under `path`.
    """
    tags = recipe_tags(recipe, str(recipe.get("request", {}).get("prompt", "")))
    first = next(chunks)
    if path.suffix.lower() == ".png":
        total = len(first) + sum(map(len, chunks))
        if total != 1:
            raise RequestError(one_frame(path, total))
        refuse_constant(int(first.min()), int(first.max()))
        save_picture(path, first[0], tags, overwrite)
        return path
    low, high = int(first.min()), int(first.max())
    height, width = first.shape[1:3]
    with writer(path, width, height, fps, tags, overwrite) as opened:
        opened.write(first)
        for chunk in chunks:
            opened.write(chunk)
            low, high = min(low, int(chunk.min())), max(high, int(chunk.max()))
        refuse_constant(low, high)
    return path


def refuse_constant(low: int, high: int) -> None:
    """Raise OutputError where every value of a video is the same."""
    if low == high:
        raise OutputError(
            f"the output is constant (every value is {low}): the weights are empty or damaged, or"
            " the model is not a Wan2.2 one"
        )


class Pipeline:
    """A loaded model. `front` adds `generate`: begin a request, resume it, finish it.

    parts: what the engine's callables read from, for tools that look inside; may be None.
    video: what it makes.
    """

    def __init__(self, engine: Engine, parts: Any = None, video: type[Video] = Video) -> None:
        self.engine, self.parts, self.video = engine, parts, video

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
        return self.video(frames, run.request.fps, self.engine.used(run).recipe.to_json())
