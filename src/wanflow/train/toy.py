"""Draw procedural, captioned clips: the world that `nano` learns.

A `Scene` holds the content of a caption. `draw` adds what depends on the seed (exact place, tilt),
`render` turns that into frames with anti-aliased edges. Lengths are fractions of the frame's side
unless they are called pixels.

Some combinations are never shown in training (`held_out`), so that a test can tell composing from
remembering.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wanflow import nano_words

RGB = nano_words.RGB
COLOURS, BACKGROUNDS = nano_words.COLOURS, nano_words.BACKGROUNDS
SHAPES, MOTIONS = nano_words.SHAPES, nano_words.MOTIONS
NAMES, VERBS = nano_words.NAMES, nano_words.VERBS
SIZES = {"small": 0.18, "medium": 0.24, "large": 0.31}
SPEEDS = {"slow": 0.65, "normal": 1.0, "fast": 1.4}
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
TRAVEL = 0.33  # of the side, at normal speed
GROWTH = 1.5  # from first frame to last, at normal speed
TURN = math.radians(120)


OPENINGS = (
    *("", "", "", "a video of", "a clip of", "an animation of"),
    *("there is", "we see", "simple animation of"),
)
ADJECTIVES = (
    *("", "", "", "", "bright", "beautiful", "nice", "single"),
    *("solid", "plain", "shiny", "smooth"),
)


@dataclass(frozen=True)
class Scene:
    """The content of a caption."""

    colour: str
    background: str
    shape: str
    motion: str
    size: str = "medium"
    speed: str = "normal"


# Colour with shape, and shape with motion.
HELD_OUT_COLOUR_SHAPE = set(
    zip(
        ("red", "blue", "yellow", "green", "purple"),
        ("star", "triangle", "cross", "circle", "square"),
        strict=True,
    )
)
HELD_OUT_SHAPE_MOTION = set(
    zip(
        ("star", "circle", "triangle", "cross", "square"),
        ("left", "grows", "up", "right", "shrinks"),
        strict=True,
    )
)


def held_out(scene: Scene) -> str | None:
    """Return why training never sees a scene, or None if it may.

    The reasons are `colour-shape`, `shape-motion` and `triple`.
    """
    if (scene.colour, scene.shape) in HELD_OUT_COLOUR_SHAPE:
        return "colour-shape"
    if (scene.shape, scene.motion) in HELD_OUT_SHAPE_MOTION:
        return "shape-motion"
    triple = f"{scene.colour} {scene.shape} {scene.motion}"
    return "triple" if zlib.crc32(triple.encode()) % 10 == 0 else None


def sample_scene(rng: random.Random, unseen: bool | None = False) -> Scene:
    """Draw a scene that training may see (`unseen=False`), never sees (True), or any (None)."""
    while True:
        scene = Scene(
            rng.choice(list(COLOURS)),
            rng.choice(list(BACKGROUNDS)),
            rng.choice(SHAPES),
            rng.choice(MOTIONS),
            rng.choice(("small", "medium", "medium", "large")),
            rng.choice(("slow", "normal", "normal", "fast")),
        )
        if scene.colour == scene.background or (scene.shape, scene.motion) == ("circle", "spins"):
            continue
        if scene.motion == "still":
            scene = Scene(scene.colour, scene.background, scene.shape, "still", scene.size)
        if unseen is None or (held_out(scene) is not None) == unseen:
            return scene


@dataclass(frozen=True)
class Word:
    """A stretch of a caption that names the value of a slot; slot "" is filler."""

    text: str
    slot: str = ""
    value: str = ""


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Return a caption: the plain form without `rng`, a random wording with it."""
    return join(caption_words(scene, rng))


def join(words: Sequence[Word]) -> str:
    """Return words as text, with "an" before vowels."""
    return spans(words)[0]


def spans(words: Sequence[Word]) -> tuple[str, list[tuple[int, Word]]]:
    """Return words as text, and the offset at which each word ends in it."""
    shown = [word for word in words if word.text]
    text, ends = "", []
    for i, word in enumerate(shown):
        following = shown[i + 1].text[0] if i + 1 < len(shown) else ""
        article = word.text in ("a", "A") and following in tuple("aeiou")
        space = "" if not text or word.text in ",." else " "
        text += space + word.text + ("n" if article else "")
        ends.append((len(text), word))
    return text, ends


def caption_words(scene: Scene, rng: random.Random | None = None) -> list[Word]:
    """Return the caption as tagged words; training the text encoder needs the tags."""
    pick = (lambda options: options[0]) if rng is None else rng.choice

    def name(slot: str, value: str) -> Word:
        return Word(pick(NAMES[value]), slot, value)

    continuous = False if rng is None else rng.random() < 0.3
    verb = Word(pick(VERBS[scene.motion])[int(continuous)], "motion", scene.motion)
    is_or_not = [Word("is")] if continuous and rng is not None and rng.random() < 0.5 else []
    speed = name("speed", scene.speed) if scene.motion != "still" else Word("")
    background = [
        name("background", scene.background),
        Word(pick(("background", "backdrop")) if rng else "background"),
    ]
    subject = [name("size", scene.size), name("colour", scene.colour), name("shape", scene.shape)]
    if rng is None:
        return [Word("a"), *subject, verb, speed, Word("on a"), *background]
    action = [*is_or_not, verb, speed] if rng.random() < 0.7 else [*is_or_not, speed, verb]
    article = Word(rng.choice(("a", "a", "the", "")))
    place = Word(rng.choice(("on", "on", "over", "against", "in front of")))
    opening = [Word(rng.choice(OPENINGS))]
    adjective = Word(rng.choice(ADJECTIVES))
    subject = [article, adjective, *subject] if article.text else [*opening, adjective, *subject]
    wall = [Word(rng.choice(("a", "a", "the", "a plain"))), *background]
    form = rng.randrange(6)
    if form == 0:
        words = [place, *wall, Word(","), *subject, *action]
    elif form == 1:
        words = [*subject, *action, Word(","), *background]
    elif form == 2 and not continuous:
        words = [*wall, Word("with"), *subject, Word("that"), *action]
    else:
        words = [*subject, *action, place, *wall]
    if rng.random() < 0.3:
        words = [*words, Word(".")]
    first = next(i for i, word in enumerate(words) if word.text)
    if rng.random() < 0.3:
        words[first] = Word(words[first].text.capitalize(), words[first].slot, words[first].value)
    return words


def draw(scene: Scene, rng: random.Random, frames: int) -> Tensor:
    """Return the scene's course over time, [frames, 4].

    Centre x, centre y and radius are fractions of the side, the angle is in radians.
    """
    speed = SPEEDS[scene.speed] * rng.uniform(0.95, 1.05)
    radius = SIZES[scene.size] * rng.uniform(0.95, 1.05)
    x, y = (0.5 + rng.uniform(-0.05, 0.05) for _ in range(2))
    angle = math.radians(rng.uniform(-10, 10))
    time = torch.linspace(0, 1, frames)
    course = torch.tensor([x, y, radius, angle]).repeat(frames, 1)
    if scene.motion in DIRECTIONS:
        way = torch.tensor(DIRECTIONS[scene.motion])
        course[:, :2] += (time[:, None] - 0.4) * way * TRAVEL * speed
    elif scene.motion in ("grows", "shrinks"):
        rate = (1 if scene.motion == "grows" else -1) * math.log(1 + (GROWTH - 1) * speed)
        course[:, 2] *= torch.exp((time - 0.5) * rate)
    elif scene.motion == "spins":
        course[:, 3] += time * TURN * speed
    return course


def _polygon(x: Tensor, y: Tensor, corners: Sequence[tuple[float, float]]) -> Tensor:
    """Return the signed distance to a convex polygon given clockwise (y down)."""
    edges = []
    for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
        length = math.hypot(bx - ax, by - ay)
        edges.append(((by - ay) * (x - ax) - (bx - ax) * (y - ay)) / length)
    return torch.stack(edges).amax(0)


def distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Return the signed distance (negative inside) to a shape of radius about 1; y points down."""
    if shape == "circle":
        return torch.hypot(x, y) - 0.95
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.85
    if shape == "triangle":
        corners = [
            (1.25 * math.sin(a), -1.25 * math.cos(a)) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)
        ]
        return _polygon(x, y, corners)
    if shape == "cross":
        long, wide = 1.1, 0.36
        return torch.minimum(
            torch.maximum(x.abs() - long, y.abs() - wide),
            torch.maximum(x.abs() - wide, y.abs() - long),
        )
    # A star: fold the plane onto one of ten equal wedges, whose boundary is a single line from tip
    # to notch.
    tip, notch, fold = 1.3, 0.53, math.pi / 5
    angle = torch.remainder(torch.atan2(x, -y), 2 * fold)
    angle = torch.minimum(angle, 2 * fold - angle)
    length = torch.hypot(x, y)
    px, py = length * torch.cos(angle), length * torch.sin(angle)
    bx, by = notch * math.cos(fold), notch * math.sin(fold)
    return (by * (px - tip) - (bx - tip) * py) / math.hypot(bx - tip, by)


Bump = tuple[int, float, float]  # bumps round the shape, their height in radii, their angle


def coverage(shape: str, course: Tensor, side: int, bumps: Sequence[Bump] = ()) -> Tensor:
    """Return how much of each pixel the shape covers, [frames, side, side] in 0..1."""
    centres = (torch.arange(side, dtype=torch.float32) + 0.5) / side
    x0, y0, radius, angle = (course[:, i, None, None] for i in range(4))
    dx, dy = centres[None, None, :] - x0, centres[None, :, None] - y0
    cos, sin = torch.cos(angle), torch.sin(angle)
    x, y = (cos * dx + sin * dy) / radius, (cos * dy - sin * dx) / radius
    for count, height, phase in bumps:
        reach = 1 + height * torch.cos(count * torch.atan2(y, x) + phase)
        x, y = x / reach, y / reach
    return (0.5 - distance(shape, x, y) * radius * side).clamp(0, 1)


def paint(cover: Tensor, colour: RGB, background: RGB) -> Tensor:
    """Paint coverage [..., H, W] in two colours -> frames [3, ..., H, W] in -1..1."""
    shape = 3, *(1,) * cover.ndim
    front, back = (torch.tensor(rgb).float().view(shape) for rgb in (colour, background))
    return (front * cover + back * (1 - cover)) / 127.5 - 1


def render(scene: Scene, rng: random.Random, frames: int = 17, side: int = 64) -> Tensor:
    """Return a clip of the scene, [3, frames, side, side] in -1..1."""
    cover = coverage(scene.shape, draw(scene, rng, frames), side)
    return paint(cover, COLOURS[scene.colour], BACKGROUNDS[scene.background])


def vocabulary() -> list[str]:
    """Return every word that a caption can contain, lower case, sorted."""
    phrases = [phrase for names in NAMES.values() for phrase in names]
    phrases += [phrase for verbs in VERBS.values() for pair in verbs for phrase in pair]
    rng = random.Random(0)
    phrases += [caption(sample_scene(rng, None), rng) for _ in range(3000)]
    words = {word.strip(",.").lower() for phrase in phrases for word in phrase.split()}
    return sorted(words - {""})
