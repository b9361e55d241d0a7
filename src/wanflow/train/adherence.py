"""What a clip shows, read from its pixels alone: does it keep the promises of its caption?

The frames are taken for a mixture of two colours. The background is the median of the border, the
object's colour the median of what is far from it, and each pixel's place on the line between the
two says how much of it the object covers. Then every shape of `toy` is laid over that cover in
every frame, at matched centre and area and at all angles. The shape that overlaps best names the
object, and the course of its fit over time names the motion. Nothing asks for sharp edges.
"""

from __future__ import annotations

import functools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from wanflow.train import toy

Frames = NDArray[np.uint8]

SLOTS = ("background", "colour", "shape", "motion", "size", "speed")
JUDGED = (*SLOTS, "all", "strict")
ORDERS = {
    "circle": 0,
    "square": 4,
    "triangle": 3,
    "star": 5,
    "cross": 4,
}  # turns by 1/order look alike; a circle has no angle

# Lengths of a fit are in units of the object's scale: the radius of the disc that has its area.
CELLS = 32  # side of the patch in which templates are compared
REACH = 1.85  # half the patch's side; the tips of a star are at 1.62
CELL = 2 * REACH / CELLS
ANGLES = 16  # per shape, over one symmetry period
STEPS = 6  # of matching centre and area, at most; only objects cut by the frame's edge need many

CONTRAST = 30.0  # RGB distance of object and background below which there is no object
UNEVEN = (
    40.0  # median RGB distance of the border from its own median above which there is no background
)
SPECK = 0.004  # share of the frame below which a frame shows no object
# radius above which what is seen is an edge, not an object; the largest in the world has 0.33
HUGE = 0.55
VAGUE = 0.4  # overlap with the best shape below which the cover is no object at all
# share of the nominal travel, growth or turn below which nothing happens; "slowly" is 0.65
MOVES = 0.35
COHERENT = 0.6  # agreement of the frames' angles with one steady turn below which they are noise
STRICT = {
    "shape_overlap": 0.75,
    "shape_consistency": 0.7,
    "shape_margin": 0.03,
}  # true clips have 0.86, 1.0 and 0.09 or more


@dataclass(frozen=True)
class Reading:
    """What a clip shows, and how clearly. Colour errors are RGB distances in 0..255, `radius` is a
    fraction of the side.
    """

    background: str
    colour: str
    shape: str
    motion: str
    size: str
    speed: str
    background_error: float
    colour_error: float
    shape_overlap: float  # IoU of the named shape, averaged over frames
    shape_margin: float  # by how much it beats the second best
    shape_consistency: float  # share of frames that alone would name the same shape
    radius: float


@dataclass(frozen=True)
class _Fit:
    """Every shape fitted to every frame, [T, S] each; centre and scale in pixels of the cover."""

    x: Tensor
    y: Tensor
    scale: Tensor
    overlap: Tensor  # IoU at the best angle
    # complex: how strongly the overlap depends on the angle, and the best angle times the shape's
    # order
    phase: Tensor


@functools.cache
def _templates() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every shape at every angle, [S, ANGLES, CELLS**2] in 0..1; the shapes' scale at radius 1,
    [S]; the cells' x and y.
    """
    fine = (torch.arange(1024) + 0.5) / 256 - 2
    areas = [
        float((toy.distance(shape, fine[None, :], fine[:, None]) < 0).double().mean()) * 16
        for shape in toy.SHAPES
    ]
    scales = torch.tensor(areas).div(math.pi).sqrt()
    at = ((torch.arange(CELLS) + 0.5) / CELLS * 2 - 1) * REACH
    x, y = at.repeat(CELLS), at.repeat_interleave(CELLS)
    pictures = []
    for shape, scale in zip(toy.SHAPES, scales.tolist(), strict=True):
        for i in range(ANGLES):
            angle = 2 * math.pi / max(ORDERS[shape], 1) * i / ANGLES
            cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
            pictures.append(
                (
                    0.5 - toy.distance(shape, cos * x + sin * y, cos * y - sin * x) / scale / CELL
                ).clamp(0, 1)
            )
    return torch.stack(pictures).view(len(toy.SHAPES), ANGLES, CELLS**2), scales, x, y


def _nearest(pixel: Tensor, names: dict[str, tuple[int, int, int]]) -> tuple[str, float]:
    """The named colour closest to an RGB triple, and its distance."""
    errors = {name: float((pixel - torch.tensor(rgb)).norm()) for name, rgb in names.items()}
    name = min(errors, key=errors.__getitem__)
    return name, errors[name]


def _two_colours(pixels: Tensor) -> tuple[Tensor, Tensor] | None:
    """RGB of background and object of a clip [T, H, W, 3], or None if there is no such pair."""
    rim = max(1, min(pixels.shape[1:3]) // 32)
    sides = (pixels[:, :rim], pixels[:, -rim:], pixels[:, :, :rim], pixels[:, :, -rim:])
    border = torch.cat([side.reshape(-1, 3) for side in sides])
    background = border.median(0).values
    if float((border - background).norm(dim=-1).median()) > UNEVEN:
        return None
    far = (pixels - background).norm(dim=-1).flatten()
    most = far.kthvalue(
        int(far.numel() * 0.99)
    ).values  # even the smallest object fills 3 % of the frame
    colour = pixels.reshape(-1, 3)[far >= 0.7 * most].median(0).values
    return None if float((colour - background).norm()) < CONTRAST else (background, colour)


def _moments(weights: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mass and centroid of weights [..., P] at points x and y [P]."""
    mass = weights.sum(-1).clamp_min(1e-3)
    return mass, weights @ x / mass, weights @ y / mass


def _fit(cover: Tensor) -> _Fit:
    """Lay every shape over a cover [T, H, W] that is not empty in any frame.

    Area and centroid of the template are matched to those of the cover, counting only what is
    inside the frame on both sides. An object in full view is found at once; one cut by the edge
    grows step by step until its visible part fits.
    """
    height, width = cover.shape[1:]
    templates, _, gx, gy = _templates()
    rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    mass, x, y = (
        moment[:, None]
        for moment in _moments(
            cover.flatten(1), columns.repeat(height), rows.repeat_interleave(width)
        )
    )
    x, y, scale = (values.expand(-1, len(toy.SHAPES)) for values in (x, y, (mass / math.pi).sqrt()))
    turns = torch.polar(torch.ones(ANGLES), 2 * math.pi * torch.arange(ANGLES) / ANGLES)
    best = _Fit(x, y, scale, torch.zeros_like(x), torch.zeros_like(x, dtype=torch.complex64))
    for _ in range(STEPS):
        u, v = (
            (at[..., None] + scale[..., None] * by) * (2 / side) - 1
            for at, by, side in ((x, gx, width), (y, gy, height))
        )
        inside = (torch.maximum(u.abs(), v.abs()) < 1).float()  # [T, S, P]
        patch = (
            F.grid_sample(
                cover[:, None], torch.stack([u, v], -1), padding_mode="border", align_corners=False
            )[:, 0]
            * inside
        )
        common = torch.minimum(patch[:, :, None], templates).sum(-1)  # [T, S, ANGLES]
        visible = torch.einsum("tsp,skp->tsk", inside, templates)
        everywhere = torch.maximum(
            mass / (scale * CELL).square(), patch.sum(-1)
        )  # what lies outside the patch counts against it
        overlap = common / (everywhere[..., None] + visible - common)
        top, angle = overlap.max(-1)
        old, new = (
            vars(best).values(),
            (x, y, scale, top, (overlap.to(torch.complex64) * turns).sum(-1)),
        )
        best = _Fit(*(torch.where(top > best.overlap, b, a) for a, b in zip(old, new, strict=True)))
        chosen = templates[torch.arange(len(toy.SHAPES)), angle] * inside
        (area, cx, cy), (meant, mx, my) = _moments(patch, gx, gy), _moments(chosen, gx, gy)
        dx, dy, growth = (
            (cx - mx).clamp(-0.5, 0.5),
            (cy - my).clamp(-0.5, 0.5),
            (area / meant).sqrt().clamp(0.8, 1.25),
        )
        if max(float(change.abs().max()) for change in (dx, dy, growth - 1)) < 0.02:
            break
        x, y, scale = x + scale * dx, y + scale * dy, scale * growth
    return best


def _slope(time: Tensor, values: Tensor) -> float:
    """Least-squares change of values [T] over one unit of time."""
    centred = time - time.mean()
    return float((centred * values).sum() / centred.square().sum())


def _turn(time: Tensor, phase: Tensor, order: int, gap: float) -> float:
    """The steady turn in radians over one unit of time that explains the frames' angles best; 0 if
    none does.

    Adding up phasors needs no unwrapping, and frames of vague angle have little say. `gap` is the
    time between frames: faster turns than half a symmetry period in it cannot be told from turns
    the other way.
    """
    if not order or not float(phase.abs().sum()):
        return 0.0
    limit = min(2 * toy.TURN, 0.99 * math.pi / order / gap)
    rates = torch.linspace(-limit, limit, 401)
    sums = (phase * torch.polar(torch.ones(1), -order * rates[:, None] * time)).sum(-1).abs()
    return (
        float(rates[sums.argmax()])
        if float(sums.max()) >= COHERENT * float(phase.abs().sum())
        else 0.0
    )


def _motion(dx: float, dy: float, growth: float, turn: float) -> tuple[str, float]:
    """The motion with the largest share of its nominal amount, and its speed (1 is normal).

    Travel is in sides, growth is the log of a ratio, turn is in radians; all from the first frame
    to the last.
    """
    across = {"right": dx, "left": -dx, "down": dy, "up": -dy}
    direction = max(across, key=across.__getitem__)
    sizing, change = (
        "grows" if growth > 0 else "shrinks",
        (math.exp(min(abs(growth), 5.0)) - 1) / (toy.GROWTH - 1),
    )
    speeds = {
        direction: math.hypot(dx, dy) / toy.TRAVEL,
        sizing: change,
        "spins": abs(turn) / toy.TURN,
    }
    motion = max(speeds, key=speeds.__getitem__)
    return (motion, speeds[motion]) if speeds[motion] >= MOVES else ("still", 1.0)


def _closest(value: float, names: dict[str, float]) -> str:
    return min(names, key=lambda name: abs(math.log(max(value, 1e-6) / names[name])))


@torch.no_grad()
def read(clip: Frames) -> Reading | None:
    """What a clip, uint8 [T, H, W, 3] with T >= 5, shows; None if there is no object on a plain
    background.
    """
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or len(clip) < 5:
        raise ValueError(
            f"a clip is uint8 [T, H, W, 3] with at least 5 frames, not {clip.dtype}"
            f" {list(clip.shape)}"
        )
    pixels = torch.from_numpy(np.ascontiguousarray(clip)).float()
    factor = max(
        1, min(clip.shape[1:3]) // 64
    )  # finer detail than this says nothing more about the shape
    pixels = (
        pixels
        if factor == 1
        else F.avg_pool2d(pixels.permute(0, 3, 1, 2), factor).permute(0, 2, 3, 1)
    )
    pair = _two_colours(pixels)
    if pair is None:
        return None
    cover = (pixels - pair[0]) @ ((pair[1] - pair[0]) / (pair[1] - pair[0]).square().sum())
    cover = ((cover - 0.1) / 0.8).clamp(
        0, 1
    )  # so that faint noise, spread over the frame, does not add up to area
    shown = cover.mean((1, 2)) > SPECK
    if int(shown.sum()) < max(3, len(clip) // 2):
        return None
    fit, side = _fit(cover[shown]), min(cover.shape[1:])
    overlaps = fit.overlap.sum(0) / len(
        clip
    )  # a frame without an object counts as one that does not fit
    first, second = overlaps.topk(2).indices.tolist()
    shape, order, time = (
        toy.SHAPES[first],
        ORDERS[toy.SHAPES[first]],
        torch.linspace(0, 1, len(clip))[shown],
    )
    size = (fit.scale[:, first] / _templates()[1][first] / side).log()
    radius = math.exp(float(size.mean()))
    if overlaps[first] < VAGUE or radius > HUGE:
        return None
    turn = _turn(time, fit.phase[:, first], order, 1 / (len(clip) - 1))
    motion, pace = _motion(
        _slope(time, fit.x[:, first]) / side,
        _slope(time, fit.y[:, first]) / side,
        _slope(time, size),
        turn,
    )
    (background, background_error), (colour, colour_error) = (
        _nearest(pair[0], toy.BACKGROUNDS),
        _nearest(pair[1], toy.COLOURS),
    )
    return Reading(
        background,
        colour,
        shape,
        motion,
        _closest(radius, toy.SIZES),
        _closest(pace, toy.SPEEDS),
        background_error,
        colour_error,
        shape_overlap=float(overlaps[first]),
        shape_margin=float(overlaps[first] - overlaps[second]),
        shape_consistency=int((fit.overlap.argmax(-1) == first).sum()) / len(clip),
        radius=radius,
    )


def compare(reading: Reading | None, scene: toy.Scene) -> dict[str, bool]:
    """Which slots of a scene a reading confirms; `all` is background, colour, shape and motion,
    `strict` asks for a clear shape too.
    """
    right = {
        slot: reading is not None and getattr(reading, slot) == getattr(scene, slot)
        for slot in SLOTS
    }
    right["all"] = all(right[slot] for slot in SLOTS[:4])
    right["strict"] = (
        right["all"]
        and reading is not None
        and all(getattr(reading, name) >= least for name, least in STRICT.items())
    )
    return right


def judge(clip: Frames, scene: toy.Scene) -> dict[str, bool]:
    """`compare` for a clip, uint8 [T, H, W, 3]."""
    return compare(read(clip), scene)


def rate(right: int, of: int) -> dict[str, float]:
    """A share of clips with its 95 % Wilson interval."""
    z2, share = 1.96**2, right / max(of, 1)
    middle, spread = (
        (right + z2 / 2) / (of + z2),
        math.sqrt(z2 * (right * (1 - share) + z2 / 4)) / (of + z2),
    )
    return {
        "right": right,
        "of": of,
        "share": share,
        "low": max(middle - spread, 0.0),
        "high": min(middle + spread, 1.0),
    }


@dataclass
class Tally:
    """Judgements added up: per slot, per kind of held-out combination, and what each shape and
    motion was taken for.
    """

    clips: int = 0
    right: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, Counter[str]] = field(
        default_factory=dict
    )  # of `toy.held_out`, "seen" if none
    taken: dict[str, dict[str, Counter[str]]] = field(
        default_factory=lambda: {"shape": {}, "motion": {}}
    )  # slot, asked for, read

    def add(self, reading: Reading | None, scene: toy.Scene) -> None:
        right = [name for name, fine in compare(reading, scene).items() if fine]
        self.clips += 1
        self.right.update(right)
        self.kinds.setdefault(toy.held_out(scene) or "seen", Counter()).update(["clips", *right])
        for slot, table in self.taken.items():
            table.setdefault(getattr(scene, slot), Counter())[
                getattr(reading, slot, "nothing")
            ] += 1

    def as_dict(self) -> dict[str, Any]:
        """Everything counted, for JSON; shares as in `rate`."""
        result: dict[str, Any] = {
            "clips": self.clips,
            "slots": {name: rate(self.right[name], self.clips) for name in JUDGED},
        }
        result["kinds"] = {
            kind: {name: rate(count[name], count["clips"]) for name in JUDGED}
            for kind, count in self.kinds.items()
        }
        for slot, table in self.taken.items():
            result[slot] = {
                name: rate(count[name], count.total()) | {"read": dict(count)}
                for name, count in table.items()
            }
        return result

    def __str__(self) -> str:
        table = self.as_dict()
        parts = {
            "slots": table["slots"],
            "all four, by kind": {kind: cells["all"] for kind, cells in table["kinds"].items()},
        }
        lines = []
        for part, cells in (
            parts | {slot: dict(sorted(table[slot].items())) for slot in self.taken}
        ).items():
            lines.append(part)
            for name, cell in cells.items():
                wrong = ", ".join(
                    f"{read} {count}"
                    for read, count in sorted(cell.get("read", {}).items())
                    if read != name
                )
                span = (
                    f"  {name:13}{cell['share']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}] of"
                    f" {cell['of']}"
                )
                lines.append(span + (f"; taken for {wrong}" if wrong else ""))
        return "\n".join(lines)


def evaluate(
    generate: Callable[[str, int], Frames],
    scenes: Sequence[toy.Scene],
    seeds: Sequence[int],
    wording: random.Random | None = None,
    report: Callable[[str], None] = print,
) -> Tally:
    """Generate a clip for each scene's caption with its own seed (as many as scenes) and tally what
    the clips show.

    Captions are plain, or worded at random with `wording`. `report` gets a line every 32 clips and
    the table at the end.
    """
    tally = Tally()
    for scene, seed in zip(scenes, seeds, strict=True):
        tally.add(read(generate(toy.caption(scene, wording), seed)), scene)
        if tally.clips % 32 == 0:
            report(
                f"{tally.clips}/{len(scenes)}: all four {tally.right['all']}, strict"
                f" {tally.right['strict']}"
            )
    report(str(tally))
    return tally
