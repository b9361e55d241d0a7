"""Read what a clip shows from its pixels alone, and compare it with its caption.

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

from wanflow.screen import Screen, table_lines
from wanflow.train import toy

Frames = NDArray[np.uint8]

SLOTS = ("background", "colour", "shape", "motion", "size", "speed")
JUDGED = (*SLOTS, "all", "strict")
# Turns by 1/order look alike; a circle has no angle.
ORDERS = {"circle": 0, "square": 4, "triangle": 3, "star": 5, "cross": 4}

# Lengths of a fit are in units of the object's scale: the radius of the disc that has its area.
CELLS = 32  # side of the patch in which templates are compared
REACH = 1.85  # half the patch's side; the tips of a star are at 1.62
CELL = 2 * REACH / CELLS
ANGLES = 16  # per shape, over one symmetry period
STEPS = 6  # of matching centre and area, at most; only objects cut by the frame's edge need many

CONTRAST = 30.0  # RGB distance of object and background below which there is no object
UNEVEN = 40.0  # median RGB distance within the border above which there is no background
SPECK = 0.004  # share of the frame below which a frame shows no object
HUGE = 0.55  # radius above which it is an edge, not an object; the largest object has 0.33
VAGUE = 0.4  # overlap with the best shape below which the cover is no object at all
# share of the nominal travel, growth or turn below which nothing happens; "slowly" is 0.65
MOVES = 0.35
COHERENT = 0.6  # agreement of the frames' angles with one steady turn below which they are noise
# True clips have 0.86, 1.0 and 0.09 or more.
STRICT = {"shape_overlap": 0.75, "shape_consistency": 0.7, "shape_margin": 0.03}


@dataclass(frozen=True)
class Reading:
    """What a clip shows, and how clearly.

    Colour errors are RGB distances in 0..255, `radius` is a fraction of the side.
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
    # complex: how strongly the overlap depends on the angle; the best angle times the shape's order
    phase: Tensor


@functools.cache
def _templates() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return every shape at every angle, the shapes' scale at radius 1, the cells' x and y.

    [S, ANGLES, CELLS**2] in 0..1, [S], [CELLS**2] twice.
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
            edge = toy.distance(shape, cos * x + sin * y, cos * y - sin * x)
            pictures.append((0.5 - edge / scale / CELL).clamp(0, 1))
    return torch.stack(pictures).view(len(toy.SHAPES), ANGLES, CELLS**2), scales, x, y


def _nearest(pixel: Tensor, names: dict[str, tuple[int, int, int]]) -> tuple[str, float]:
    """Return the named colour closest to an RGB triple, and its distance."""
    errors = {name: float((pixel - torch.tensor(rgb)).norm()) for name, rgb in names.items()}
    name = min(errors, key=errors.__getitem__)
    return name, errors[name]


def _two_colours(pixels: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the RGB of background and object of a clip [T, H, W, 3], or None."""
    rim = max(1, min(pixels.shape[1:3]) // 32)
    sides = (pixels[:, :rim], pixels[:, -rim:], pixels[:, :, :rim], pixels[:, :, -rim:])
    border = torch.cat([side.reshape(-1, 3) for side in sides])
    background = border.median(0).values
    if float((border - background).norm(dim=-1).median()) > UNEVEN:
        return None
    far = (pixels - background).norm(dim=-1).flatten()
    # Even the smallest object fills 3 % of the frame.
    most = far.kthvalue(int(far.numel() * 0.99)).values
    colour = pixels.reshape(-1, 3)[far >= 0.7 * most].median(0).values
    return None if float((colour - background).norm()) < CONTRAST else (background, colour)


def _moments(weights: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mass and centroid of weights [..., P] at points x and y [P]."""
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
    at_x, at_y = columns.repeat(height), rows.repeat_interleave(width)
    mass, x, y = (moment[:, None] for moment in _moments(cover.flatten(1), at_x, at_y))
    x, y, scale = (values.expand(-1, len(toy.SHAPES)) for values in (x, y, (mass / math.pi).sqrt()))
    turns = torch.polar(torch.ones(ANGLES), 2 * math.pi * torch.arange(ANGLES) / ANGLES)
    best = _Fit(x, y, scale, torch.zeros_like(x), torch.zeros_like(x, dtype=torch.complex64))
    for _ in range(STEPS):
        u, v = (
            (at[..., None] + scale[..., None] * by) * (2 / side) - 1
            for at, by, side in ((x, gx, width), (y, gy, height))
        )
        inside = (torch.maximum(u.abs(), v.abs()) < 1).float()  # [T, S, P]
        grid = torch.stack([u, v], -1)
        sampled = F.grid_sample(cover[:, None], grid, padding_mode="border", align_corners=False)
        patch = sampled[:, 0] * inside
        common = torch.minimum(patch[:, :, None], templates).sum(-1)  # [T, S, ANGLES]
        visible = torch.einsum("tsp,skp->tsk", inside, templates)
        # Cover outside the patch counts against the shape.
        everywhere = torch.maximum(mass / (scale * CELL).square(), patch.sum(-1))
        overlap = common / (everywhere[..., None] + visible - common)
        top, angle = overlap.max(-1)
        phase = (overlap.to(torch.complex64) * turns).sum(-1)
        old, new = vars(best).values(), (x, y, scale, top, phase)
        best = _Fit(*(torch.where(top > best.overlap, b, a) for a, b in zip(old, new, strict=True)))
        chosen = templates[torch.arange(len(toy.SHAPES)), angle] * inside
        (area, cx, cy), (meant, mx, my) = _moments(patch, gx, gy), _moments(chosen, gx, gy)
        dx, dy = (cx - mx).clamp(-0.5, 0.5), (cy - my).clamp(-0.5, 0.5)
        growth = (area / meant).sqrt().clamp(0.8, 1.25)
        if max(float(change.abs().max()) for change in (dx, dy, growth - 1)) < 0.02:
            break
        x, y, scale = x + scale * dx, y + scale * dy, scale * growth
    return best


def _slope(time: Tensor, values: Tensor) -> float:
    """Return the least-squares change of values [T] over one unit of time."""
    centred = time - time.mean()
    return float((centred * values).sum() / centred.square().sum())


def _turn(time: Tensor, phase: Tensor, order: int, gap: float) -> float:
    """Return the steady turn, radians per unit of time, that fits the frames' angles best, or 0.

    Adding up phasors needs no unwrapping, and frames of vague angle weigh little. `gap` is the time
    between frames: turns faster than half a symmetry period in it look like turns the other way.
    """
    if not order or not float(phase.abs().sum()):
        return 0.0
    limit = min(2 * toy.TURN, 0.99 * math.pi / order / gap)
    rates = torch.linspace(-limit, limit, 401)
    sums = (phase * torch.polar(torch.ones(1), -order * rates[:, None] * time)).sum(-1).abs()
    steady = float(sums.max()) >= COHERENT * float(phase.abs().sum())
    return float(rates[sums.argmax()]) if steady else 0.0


def _motion(dx: float, dy: float, growth: float, turn: float) -> tuple[str, float]:
    """Return the motion with the largest share of its nominal amount, and its speed (1: normal).

    Travel is in sides, growth is the log of a ratio, turn is in radians; all from the first frame
    to the last.
    """
    across = {"right": dx, "left": -dx, "down": dy, "up": -dy}
    direction = max(across, key=across.__getitem__)
    speeds = {
        direction: math.hypot(dx, dy) / toy.TRAVEL,
        "grows" if growth > 0 else "shrinks": (math.exp(min(abs(growth), 5.0)) - 1)
        / (toy.GROWTH - 1),
        "spins": abs(turn) / toy.TURN,
    }
    motion = max(speeds, key=speeds.__getitem__)
    return (motion, speeds[motion]) if speeds[motion] >= MOVES else ("still", 1.0)


def _closest(value: float, names: dict[str, float]) -> str:
    return min(names, key=lambda name: abs(math.log(max(value, 1e-6) / names[name])))


@torch.no_grad()
def read(clip: Frames) -> Reading | None:
    """Return what a clip shows, uint8 [T, H, W, 3] with T >= 5.

    None if there is no object on a plain background.
    """
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or len(clip) < 5:
        raise ValueError(
            f"a clip is uint8 [T, H, W, 3] with at least 5 frames, not {clip.dtype}"
            f" {list(clip.shape)}"
        )
    pixels = torch.from_numpy(np.ascontiguousarray(clip)).float()
    factor = max(1, min(clip.shape[1:3]) // 64)  # finer detail adds nothing about the shape
    if factor > 1:
        pixels = F.avg_pool2d(pixels.permute(0, 3, 1, 2), factor).permute(0, 2, 3, 1)
    pair = _two_colours(pixels)
    if pair is None:
        return None
    cover = (pixels - pair[0]) @ ((pair[1] - pair[0]) / (pair[1] - pair[0]).square().sum())
    # Faint noise, spread over the frame, must not add up to area.
    cover = ((cover - 0.1) / 0.8).clamp(0, 1)
    shown = cover.mean((1, 2)) > SPECK
    if int(shown.sum()) < max(3, len(clip) // 2):
        return None
    fit, side = _fit(cover[shown]), min(cover.shape[1:])
    overlaps = fit.overlap.sum(0) / len(clip)  # a frame without an object counts as a misfit
    first, second = overlaps.topk(2).indices.tolist()
    shape, time = toy.SHAPES[first], torch.linspace(0, 1, len(clip))[shown]
    size = (fit.scale[:, first] / _templates()[1][first] / side).log()
    radius = math.exp(float(size.mean()))
    if overlaps[first] < VAGUE or radius > HUGE:
        return None
    turn = _turn(time, fit.phase[:, first], ORDERS[shape], 1 / (len(clip) - 1))
    dx, dy = (_slope(time, at[:, first]) / side for at in (fit.x, fit.y))
    motion, pace = _motion(dx, dy, _slope(time, size), turn)
    background, background_error = _nearest(pair[0], toy.BACKGROUNDS)
    colour, colour_error = _nearest(pair[1], toy.COLOURS)
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
    """Return which slots of a scene a reading confirms.

    `all` is background, colour, shape and motion; `strict` asks for a clear shape too.
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
    """Return which slots of a scene a clip shows, uint8 [T, H, W, 3]."""
    return compare(read(clip), scene)


def rate(right: int, of: int) -> dict[str, float]:
    """Return a share of clips with its 95 % Wilson interval."""
    z2, share = 1.96**2, right / max(of, 1)
    middle = (right + z2 / 2) / (of + z2)
    spread = math.sqrt(z2 * (right * (1 - share) + z2 / 4)) / (of + z2)
    return {
        "right": right,
        "of": of,
        "share": share,
        "low": max(middle - spread, 0.0),
        "high": min(middle + spread, 1.0),
    }


@dataclass
class Tally:
    """Sums of judgements: by slot, by held-out kind, and what shapes and motions were read as."""

    clips: int = 0
    right: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, Counter[str]] = field(default_factory=dict)  # of `toy.held_out`, or "seen"
    # slot, requested, read
    taken: dict[str, dict[str, Counter[str]]] = field(
        default_factory=lambda: {"shape": {}, "motion": {}}
    )

    def add(self, reading: Reading | None, scene: toy.Scene) -> None:
        right = [name for name, fine in compare(reading, scene).items() if fine]
        self.clips += 1
        self.right.update(right)
        self.kinds.setdefault(toy.held_out(scene) or "seen", Counter()).update(["clips", *right])
        for slot, table in self.taken.items():
            found = getattr(reading, slot, "nothing")
            table.setdefault(getattr(scene, slot), Counter())[found] += 1

    def line(self) -> str:
        """Return the main counts."""
        return f"all four {self.right['all']}, strict {self.right['strict']}"

    def as_dict(self) -> dict[str, Any]:
        """Return all counts for JSON; shares as in `rate`."""
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
        groups = {
            "slots": table["slots"],
            "all four, by kind": {kind: cells["all"] for kind, cells in table["kinds"].items()},
        }
        groups |= {slot: dict(sorted(table[slot].items())) for slot in self.taken}
        lines = []
        for group, cells in groups.items():
            head = (group, "share", "95 %", "of", "taken for")
            rows = [
                (
                    name,
                    f"{cell['share']:.3f}",
                    f"[{cell['low']:.3f}, {cell['high']:.3f}]",
                    str(cell["of"]),
                    ", ".join(
                        f"{read} {count}"
                        for read, count in sorted(cell.get("read", {}).items())
                        if read != name
                    ),
                )
                for name, cell in cells.items()
            ]
            lines += table_lines(head, rows, "lrrrl")
        return "\n".join(lines)


def evaluate(
    generate: Callable[[str, int], Frames],
    scenes: Sequence[toy.Scene],
    seeds: Sequence[int],
    screen: Screen,
    wording: random.Random | None = None,
) -> Tally:
    """Generate a clip for each scene's caption with its own seed, and tally what the clips show.

    Captions are plain, or worded at random with `wording`. The screen gets the table at the end.
    """
    tally = Tally()
    for scene, seed in zip(scenes, seeds, strict=True):
        screen.progress("measuring", tally.clips, len(scenes), "clip", tally.line())
        tally.add(read(generate(toy.caption(scene, wording), seed)), scene)
    screen.progress("measuring", tally.clips, len(scenes), "clip", tally.line(), last_line=True)
    screen.say(*str(tally).splitlines())
    return tally
