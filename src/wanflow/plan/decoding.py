"""A decode traced until it repeats itself: of whole frames, of tiles, and of one process' strip.

Shapes: a latent is [1, z, t, h, w].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from wanflow.checkpoint.structure import build
from wanflow.config import VAEConfig
from wanflow.models.vae import State, WanVAE, stream
from wanflow.parallel.groups import CommStats, Layout, simulated_groups
from wanflow.parallel.vae_parallel import NARROWEST, Strips
from wanflow.parallel.vae_parallel import decode_frames as decode_in_strips
from wanflow.pipeline import Frames
from wanflow.plan.trace import Trace, Traced, Work, fake, materialise
from wanflow.transforms import vae_tiling as tiling

STEADY = 3  # latent frames after which every further one takes what the one before did
Shape = tuple[int, int, int, int, int]


class StopTrace(Exception):
    """Ends a traced decode when it repeats itself."""


class Parts:
    """The work of a decode and what it sends, told after each latent frame; ends it when it repeats
    itself.
    """

    def __init__(self, trace: Trace, frames: int, traffic: CommStats | None = None) -> None:
        self.trace, self.frames, self.traffic = trace, frames, traffic or CommStats()
        self.work, self.sent, self.messages, self.done = Work(), Counter[str](), 0, 0

    def __call__(self, *_: int) -> None:
        last = self.done == STEADY - 1
        times = self.frames - STEADY + 1 if last else 1
        new, self.trace.work = self.trace.work, Work()
        self.work = self.work + new.scaled(times)
        self.sent.update(
            {what: count * times for what, count in self.traffic.sent.items() if count}
        )
        self.messages += sum(self.traffic.calls.values()) * times
        self.traffic.reset()
        self.done += 1
        if last:
            raise StopTrace


def whole(config: VAEConfig, shape: Shape) -> Traced:
    """Whole frames."""
    vae = build(WanVAE, config)
    with fake() as trace:
        weights = materialise(vae)
        latent, told = torch.empty(shape), Parts(trace, shape[2])
        trace.mark()
        with suppress(StopTrace):
            for _ in vae.decode_frames(latent):
                told()
    return Traced(trace.peak - weights, told.work, tuple(trace.top()))


def in_strips(config: VAEConfig, shape: Shape, layout: Layout) -> Traced:
    """The strip of the process that has the most to do: a widest one, with a neighbour on each
    side.
    """
    cut, vae = Strips(*shape[3:], layout.size), build(WanVAE, config)
    rank = max(
        range(len(cut.sizes)),
        key=lambda rank: cut.sizes[rank] + NARROWEST * len(cut.neighbours(rank)),
    )
    ctx = simulated_groups(layout, rank)
    with fake() as trace:
        weights = materialise(vae)
        latent, told = torch.empty(shape), Parts(trace, shape[2], ctx.stats)
        trace.mark()
        with suppress(StopTrace):
            for _ in decode_in_strips(vae, latent, ctx, as_numpy, told):
                pass
    return Traced(trace.peak - weights, told.work, tuple(trace.top()), told.sent, told.messages)


def tiled(config: VAEConfig, shape: Shape, tile: int) -> Traced:
    """The layers that see whole frames, then those that do not, for the tile that sees the most
    around it.

    The features that are kept in RAM between the two are not counted.
    """
    stride, frames = config.spatial_stride, min(STEADY, shape[2])
    boxes = tiling.tiles(config, shape[3] * stride, shape[4] * stride, tile)

    def first_part(vae: WanVAE) -> None:
        with suppress(StopTrace):
            for _ in tiling.decode_frames(
                vae, torch.empty(*shape[:2], frames, *shape[3:]), tile, as_numpy, _enough
            ):
                pass

    def one_tile(vae: WanVAE) -> None:
        _, local = tiling.halves(vae)
        shown, layers = max(
            (tiling.trimmed(local, box, *shape[3:]) for box in boxes),
            key=lambda found: _area(found[0]),
        )
        part = torch.empty(
            1,
            vae.config.dim * vae.config.dim_mult[-1],
            1,
            shown.bottom - shown.top,
            shown.right - shown.left,
        )
        state: State = {}
        for _ in range(frames):
            torch.cat(
                list(stream(layers, part.contiguous(memory_format=torch.channels_last_3d), state)),
                dim=2,
            )

    first, local = (_traced(config, run) for run in (first_part, one_tile))
    # The first part keeps its features in RAM; its run here has gone one frame into a tile.
    beside = first.beside - kept_features(config, (*shape[:2], frames, *shape[3:]))
    work = first.work.scaled(shape[2] / frames) + local.work.scaled(len(boxes) * shape[2] / frames)
    most = max(
        (Traced(beside, work, first.top), Traced(local.beside, work, local.top)),
        key=lambda traced: traced.beside,
    )
    return most


def kept_features(config: VAEConfig, shape: Shape) -> int:
    """Bytes of what a tiled decode keeps in RAM between its two halves."""
    frames, rows, columns = shape[2:]
    return config.dim * config.dim_mult[-1] * 4 * frames * rows * columns


def _traced(config: VAEConfig, run: Callable[[WanVAE], None]) -> Traced:
    vae = build(WanVAE, config)
    with fake() as trace:
        weights = materialise(vae)
        trace.mark()
        run(vae)
    return Traced(trace.peak - weights, trace.work, tuple(trace.top()))


def _area(box: tiling.Box) -> int:
    return (box.bottom - box.top) * (box.right - box.left)


def as_numpy(part: Tensor) -> Frames:
    """What stands for a fake tensor's frames; numpy's memory is the system's until it is written
    to.
    """
    _, _, count, rows, columns = part.shape
    return np.empty((count, rows, columns, 3), dtype=np.uint8)


def _enough(*_: int) -> None:
    raise StopTrace
