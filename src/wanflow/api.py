"""Offer the public face of a loaded model: `Pipeline` makes a `Video` of a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wanflow.config import RequestError
from wanflow.media import VideoWriter, recipe_tags, save_picture
from wanflow.pipeline import Engine, Frames, OnPart, OnStep, Run, begin, decode, denoise
from wanflow.presets import ModelSpec
from wanflow.request import Request, with_settings
from wanflow.sanity import OutputError


@dataclass(frozen=True)
class Video:
    """A finished video: frames uint8 [T, H, W, 3], frames per second, and its recipe."""

    frames: Frames
    fps: float
    recipe: dict[str, Any]

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write an mp4 with the recipe inside, or a PNG of a single frame; return the path.

        Write nothing where there are no frames, as in all processes but the first.
        """
        if not len(self.frames):
            return Path(path)
        return save_frames(Path(path), iter([self.frames]), self.fps, self.recipe, overwrite)


def save_frames(
    path: Path,
    chunks: Iterator[Frames],
    fps: float,
    recipe: dict[str, Any],
    overwrite: bool = False,
) -> Path:
    """Write frames as they come; the file appears under its name when it is complete.

    Raises:
        OutputError: when all frames are one constant; nothing is left under `path`.
    """
    tags = recipe_tags(recipe, recipe["request"]["prompt"])
    first = next(chunks)
    if path.suffix.lower() == ".png":
        if any(len(chunk) for chunk in chunks) or len(first) != 1:
            raise RequestError(
                f"{path.name}: a PNG holds one frame; ask for frame_num 1 or name an .mp4"
            )
        refuse_constant(int(first.min()), int(first.max()))
        save_picture(path, first[0], tags, overwrite)
        return path
    low, high = int(first.min()), int(first.max())
    with VideoWriter(
        path, first.shape[2], first.shape[1], fps, tags, overwrite=overwrite
    ) as writer:
        writer.write(first)
        for chunk in chunks:
            writer.write(chunk)
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
    """A loaded model; made by `wanflow.load`.

    parts: what the engine's callables read from, for tools that look inside; may be None.
    """

    def __init__(self, engine: Engine, parts: Any = None) -> None:
        self.engine, self.parts = engine, parts

    @property
    def spec(self) -> ModelSpec:
        """The model's shapes and defaults."""
        return self.engine.spec

    def generate(self, prompt: str, on_step: OnStep | None = None, **request: Any) -> Video:
        """Make a video.

        Args:
            prompt: what the video shows.
            on_step: called after each step with a `Progress`; returning False cancels.
            **request: fields of `wanflow.Request` (negative_prompt, size, frame_num, sample_steps,
                sample_shift, sample_solver, cfg_high, cfg_low, boundary, fps, seed, lora, ...), and
                `preset`, the name of a step preset.

        Raises:
            RequestError: for invalid values.
            Cancelled: when `on_step` returned False; it carries the run, which `resume` continues.
            OutputError: when the result is NaN or constant.
        """
        settings = request.pop("preset", None)
        unknown = sorted(set(request) - set(Request.__dataclass_fields__))
        if unknown:
            known = ", ".join(sorted([*Request.__dataclass_fields__, "preset"]))
            raise RequestError(f"generate does not know {', '.join(unknown)}; it knows {known}")
        asked = Request(prompt, **request)
        run = self.begin(with_settings(asked, settings) if settings else asked)
        return self.finish(self.resume(run, on_step))

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

    def finish(self, run: Run) -> Video:
        """Decode a finished run. Of several processes the first one gets a video with frames."""
        width, height = run.request.size
        frames = np.concatenate([np.empty((0, height, width, 3), np.uint8), *self.frames(run)])
        if len(frames):
            refuse_constant(int(frames.min()), int(frames.max()))
        return Video(frames, run.request.fps, run.recipe.to_json())
