"""Turn a video's size and length into the latent's shape and its tokens, and check both.

No other file knows how many pixels a latent pixel covers, or how many latent pixels a token.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import partial
from operator import index

from wanflow.config import RequestError
from wanflow.presets import FAMILY, ModelSpec
from wanflow.untrusted import shown

Size = tuple[int, int]  # width, height in pixels

# Tokens along an axis, at most: the positions that Wan2.2's rotary table was made for.
POSITIONS = 1024


@dataclass(frozen=True)
class Geometry:
    """The strides of one model, each as (frames, rows, columns).

    channels: of the latent.
    stride: pixels for each latent pixel; the first frame has a latent frame of its own.
    patch: latent pixels for each token.
    """

    channels: int
    stride: tuple[int, int, int]
    patch: tuple[int, int, int]

    @property
    def size_multiple(self) -> int:
        """The number that divides every width and height."""
        return self.stride[1] * self.patch[1]

    @property
    def frame_step(self) -> int:
        """How many frames each latent frame after the first adds; a video has `step * n + 1`."""
        return self.stride[0]

    @property
    def most_frames(self) -> int:
        """The longest video that is accepted."""
        return (POSITIONS - 1) * self.frame_step * self.patch[0] + 1

    def latent_shape(self, size: Size, frames: int) -> tuple[int, int, int, int]:
        """Return the latent's (C, T, H, W)."""
        width, height = size
        return (
            self.channels,
            (frames - 1) // self.stride[0] + 1,
            height // self.stride[1],
            width // self.stride[2],
        )

    def grid(self, size: Size, frames: int) -> tuple[int, int, int]:
        """Return the tokens along (frames, rows, columns)."""
        _, t, h, w = self.latent_shape(size, frames)
        return t // self.patch[0], h // self.patch[1], w // self.patch[2]

    def tokens(self, size: Size, frames: int) -> int:
        """Return how many tokens the transformer sees."""
        return math.prod(self.grid(size, frames))

    def longest(self, frames: int) -> int:
        """Return the largest valid length of at most `frames` frames."""
        return max(0, frames - 1) // self.frame_step * self.frame_step + 1

    def nearest_frames(self, frames: int) -> int:
        """Return the valid length nearest to `frames`."""
        return max(1, round((frames - 1) / self.frame_step) * self.frame_step + 1)

    def check_size(self, size: Size) -> None:
        """Raise RequestError for a side that is no multiple of `size_multiple`, or too long."""
        step = self.size_multiple
        for side, name in zip(size, ("width", "height"), strict=True):
            if side > POSITIONS * step:
                raise RequestError(f"{name} {side} is too much: at most {POSITIONS * step} pixels")
            if side <= 0 or side % step:
                near = [max(step, round(one / step) * step) for one in size]
                raise RequestError(
                    f"{name} {side} is not a positive multiple of {step}; the nearest is"
                    f" {near[name == 'height']} (--size {near[0]}*{near[1]})"
                )

    def check_frames(self, frames: int) -> None:
        """Raise RequestError for a length that is not `frame_step * n + 1`, or too long."""
        if frames > self.most_frames:
            raise RequestError(f"frame_num {frames} is too much: at most {self.most_frames} frames")
        if frames < 1 or (frames - 1) % self.frame_step:
            raise RequestError(
                f"frame_num {frames} is not {self.frame_step}n+1;"
                f" the nearest is {self.nearest_frames(frames)}"
            )


def geometry_of(spec: ModelSpec) -> Geometry:
    """Return the strides of a model's VAE and the patches of its transformer."""
    vae = spec.vae
    stride = (vae.temporal_stride, vae.spatial_stride, vae.spatial_stride)
    return Geometry(vae.z_dim, stride, spec.dit.patch_size)


def picture_size(spec: ModelSpec, picture: Size, area: int) -> Size:
    """Return a video's size for a picture: the picture's ratio, at most `area` pixels.

    The two official rules differ. Both are float64, and round every side down.

    Raises:
        RequestError: for a picture of which a side of the video would vanish.
    """
    geometry, (width, height) = geometry_of(spec), picture
    step, stride, ratio = geometry.size_multiple, geometry.stride[1], width / height
    down = partial(_down, step)
    if spec.conditioning == "channels":
        tall = height / width
        columns, rows = (math.sqrt(x) // stride * stride for x in (area / tall, area * tall))
        size = down(columns), down(rows)
    else:
        side = math.sqrt(area * ratio)
        first, second = down(side), down(area / side)
        by_width = first, down(area / max(first, 1))
        by_height = down(area / max(second, 1)), second
        size = min(by_height, by_width, key=lambda size: _stretch(ratio, size))
    if not all(size):
        raise RequestError(
            f"a picture of {width}*{height} is too long: a side of the video would have less than"
            f" {step} pixels; crop the picture"
        )
    geometry.check_size(size)
    return size


def _down(step: int, side: float) -> int:
    return int(side // step) * step


def _stretch(ratio: float, size: Size) -> float:
    """Return how much a picture of this ratio is stretched to a size; infinite for no size."""
    if not all(size):
        return math.inf
    other = size[0] / size[1]
    return max(ratio / other, other / ratio)


# Of all models; the first is what every model accepts at most. One may ask for coarser multiples.
GEOMETRIES = (*dict.fromkeys(map(geometry_of, FAMILY)),)
COMMON = GEOMETRIES[0]


def parse_size(value: str | Size, geometry: Geometry = COMMON) -> Size:
    """Read `"1280*720"`, `"1280x720"` or `(1280, 720)` as (width, height).

    Raises:
        RequestError: for other values, and for sides that the geometry does not take.
    """
    try:
        parts = re.split("[*x\u00d7]", value.lower()) if isinstance(value, str) else value
        width, height = (int(part) if isinstance(part, str) else index(part) for part in parts)
    except (ValueError, TypeError):
        raise RequestError(f"size {shown(value)} is not WIDTH*HEIGHT, such as 1280*720") from None
    geometry.check_size((width, height))
    return width, height
