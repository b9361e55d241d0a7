"""Give pictures with the prompts of a measurement, and measure how well the clips keep them."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wanflow.presets import ModelSpec
from wanflow.train import pictured, toy
from wanflow.train.adherence import Frames, rate

NEAR = 25.0  # dB from which on a frame is the picture


def psnr(frame: Frames, other: Frames) -> float:
    """Return the peak signal-to-noise ratio of two uint8 frames, in dB; at most 100."""
    error = float(np.square(frame.astype(float) - other).mean())
    return float(min(10 * np.log10(255**2 / max(error, 1e-9)), 100.0))


@dataclass
class Shown:
    """The pictures of scenes, which training never saw, and what clips made of them.

    ends: the pictures that are given, a key of `pictured.ENDS`.
    hidden: begin as a still clip does, so that the first picture says nothing of the motion.
    """

    spec: ModelSpec
    scenes: Sequence[toy.Scene]
    ends: str = "first"
    hidden: bool = False
    found: dict[str, list[float]] = field(default_factory=dict)

    def pictures(self, n: int) -> pictured.Pictures:
        """Return the pictures of a scene, by field of a request."""
        render = pictured.picture_in_place if self.hidden else toy.render
        rng, sizes = random.Random(f"pictures/{n}"), (self.spec.frame_num, self.spec.size[0])
        return pictured.pictures_of(render(self.scenes[n], rng, *sizes), self.ends)

    def measure(self, n: int, frames: Frames) -> Frames:
        """Note how near the ends of a scene's clip are to its pictures, and return the clip."""
        pictures = self.pictures(n)
        for end, place, picture in (
            ("first", 0, pictures.get("image")),
            ("last", -1, pictures.get("last_image")),
        ):
            if picture is not None:
                self.found.setdefault(end, []).append(psnr(frames[place], picture.pixels))
        return frames

    def as_dict(self) -> dict[str, Any]:
        """Return, for each end, the share of clips that are near, the median and the least dB."""
        return {
            end: rate(sum(value >= NEAR for value in values), len(values))
            | {"median": round(statistics.median(values), 2), "least": round(min(values), 2)}
            for end, values in self.found.items()
        }
