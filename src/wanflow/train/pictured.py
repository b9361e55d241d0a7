"""Draw clips with the picture that they begin or end with: the world that `nano-i2v` learns.

Most clips are those of `toy`. The rest are altered as a person's picture would be: other colours,
a background that fades, an outline, shading, a shaky hand. The course of half the clips is moved,
so that the first frame does not give the motion away.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from torch import Tensor

from wanflow.pictures import open_picture
from wanflow.pipeline import to_uint8
from wanflow.request import Picture
from wanflow.train import toy

MOVED = 0.5  # share of the clips that start elsewhere than `toy`'s
ALTERED = 0.4  # share that looks like a person's picture
ENDS = {"first": ("first",), "both": ("first", "last"), "last": ("last",)}  # pictures given
SHARES = (0.7, 0.2, 0.1)  # of `ENDS`, in training


class Pictures(TypedDict, total=False):
    """The pictures of a request."""

    image: Picture
    last_image: Picture


@dataclass(frozen=True)
class Look:
    """How a clip differs from `toy`'s plain paint."""

    front: Tensor  # [3] 0..255
    back: Tensor  # [3]
    fade: tuple[float, float] = (0.0, 0.0)  # brightness of the background per side, x and y
    light: tuple[float, float] = (0.0, 0.0)  # brightness of the object per radius, x and y
    line: float = 0.0  # width of the outline, of a radius
    bumps: tuple[toy.Bump, ...] = ()


def look(scene: toy.Scene, rng: random.Random) -> Look:
    """Draw a look: plain, or altered."""
    front, back = (
        torch.tensor(rgb).float()
        for rgb in (toy.COLOURS[scene.colour], toy.BACKGROUNDS[scene.background])
    )
    if rng.random() >= ALTERED:
        return Look(front, back)

    def some(share: float, size: float) -> tuple[float, float]:
        there = rng.random() < share
        x, y = rng.uniform(-size, size), rng.uniform(-size, size)
        return (x, y) if there else (0.0, 0.0)

    front, back = (
        (colour + torch.tensor([rng.uniform(-40, 40) for _ in range(3)])).clamp(0, 255)
        for colour in (front, back)
    )
    fade, light = some(0.4, 60), some(0.4, 50)
    line = rng.uniform(0.06, 0.15) if rng.random() < 0.4 else 0.0
    bumps = tuple((n, rng.uniform(0, 0.06), rng.uniform(0, 2 * math.pi)) for n in (2, 3, 5))
    return Look(front, back, fade, light, line, bumps if rng.random() < 0.5 else ())


def begun(scene: toy.Scene, course: Tensor, share: float = 1.0) -> Tensor:
    """Return a course moved so that it begins as a still clip's does: by all of the way, or less.

    The first frame then says nothing of the motion.
    """
    moved = course.clone()
    moved[:, :2] += share * (0.5 - course[0, :2])
    moved[:, 2] *= (toy.SIZES[scene.size] / course[0, 2]) ** share
    return moved


def course(scene: toy.Scene, rng: random.Random, frames: int) -> Tensor:
    """Return a scene's course as `toy.draw` does, half of them begun elsewhere."""
    made = toy.draw(scene, rng, frames)
    if rng.random() >= MOVED:
        return made
    made = begun(scene, made, rng.uniform(0, 1))
    made[:, :2] += torch.tensor([rng.uniform(-0.1, 0.1) for _ in range(2)])
    return made


def render(scene: toy.Scene, rng: random.Random, frames: int, side: int) -> Tensor:
    """Return a clip, [3, frames, side, side] in -1..1, in a look of its own."""
    made, path = look(scene, rng), course(scene, rng, frames)
    x = (torch.arange(side) + 0.5) / side
    at = torch.stack(torch.meshgrid(x, x, indexing="xy"))  # x and y, [2, side, side]
    back = made.back.view(3, 1, 1, 1) + _along(made.fade, at[:, None] - 0.5)
    places = (at[:, None] - path[:, :2].T[:, :, None, None]) / path[:, 2, None, None]
    front = made.front.view(3, 1, 1, 1) + _along(made.light, places.clamp(-1.5, 1.5))
    if made.line:
        wider = path * torch.tensor([1, 1, 1 + made.line, 1])
        rim = toy.coverage(scene.shape, wider, side, made.bumps)
        back = back * (1 - rim) + 25 * rim
    cover = toy.coverage(scene.shape, path, side, made.bumps)
    return (front * cover + back * (1 - cover)).clamp(0, 255) / 127.5 - 1


def _along(slope: tuple[float, float], places: Tensor) -> Tensor:
    return slope[0] * places[0] + slope[1] * places[1]


def worn(picture: Tensor, rng: random.Random) -> Tensor:
    """Return a picture [3, H, W]; one in eight is grainy or soft."""
    if rng.random() >= 0.125:
        return picture
    if rng.random() < 0.5:
        soft = torch.nn.functional.avg_pool2d(picture, 3, 1, 1, count_include_pad=False)
        picture = picture.lerp(soft, rng.random())
    grain = torch.Generator().manual_seed(rng.getrandbits(32))
    strength = rng.uniform(0, 10) / 127.5
    return picture + strength * torch.randn(picture.shape, generator=grain)


def captions(scene: toy.Scene, rng: random.Random) -> list[str]:
    """Return the plain form, a free wording, and one of the motion and little else."""
    words = toy.caption_words(scene, rng)
    kept = {
        "motion",
        "speed",
        "shape",
        *(slot for slot in ("colour", "size") if rng.random() < 0.5),
    }
    brief = [toy.Word("the"), *(word for word in words if word.slot in kept)]
    return [toy.caption(scene), toy.caption(scene, rng), toy.join(brief)]


def pictures_of(clip: Tensor, ends: str, rng: random.Random | None = None) -> Pictures:
    """Return the first frame of a clip, its last, or both; worn where `rng` says so."""
    made: Pictures = {}
    places: dict[str, tuple[Literal["image", "last_image"], int]] = {
        "first": ("image", 0),
        "last": ("last_image", -1),
    }
    for name, place in (places[end] for end in ENDS[ends]):
        picture = clip[:, place] if rng is None else worn(clip[:, place], rng)
        made[name] = open_picture(to_uint8(picture[:, None])[0])
    return made


def picture_in_place(scene: toy.Scene, rng: random.Random, frames: int, side: int) -> Tensor:
    """Return a plain clip that begins as a still one does, [3, frames, side, side]."""
    course = begun(scene, toy.draw(scene, rng, frames))
    cover = toy.coverage(scene.shape, course, side)
    return toy.paint(cover, toy.COLOURS[scene.colour], toy.BACKGROUNDS[scene.background])
