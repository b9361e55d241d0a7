"""Trace a decode until it repeats itself, of full frames, tiles or one rank's strip; and an encode.

Shapes: a latent is [1, z, t, h, w].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from wanflow.checkpoint.structure import vae_of
from wanflow.conditioning import clip_parts, encoded_shape
from wanflow.config import VAEConfig
from wanflow.models.vae import State, WanVAE, stream
from wanflow.parallel import vae_parallel
from wanflow.parallel.groups import CommStats, Layout, simulated_groups
from wanflow.pipeline import Frames
from wanflow.plan.trace import Trace, Traced, fake, materialise
from wanflow.presets import ModelSpec
from wanflow.request import CompleteRequest
from wanflow.transforms import vae_tiling

Shape = tuple[int, ...]
STEADY = 3  # latent frames: each further one costs what the last of these does
KEPT = 64  # traces: plans of one process differ mostly in what comes before the decode


@lru_cache(KEPT)
def frames(config: VAEConfig, shape: Shape) -> Traced:
    """Trace a decode of full frames; `shape` is the latent's."""

    def run(vae: WanVAE, trace: Trace) -> None:
        latent = torch.empty(shape)[:, :, :STEADY]
        for done, _ in enumerate(vae.decode_frames(latent), start=1):
            _count_frames(trace, done, shape)

    return _traced(config, run)


@lru_cache(KEPT)
def strips(config: VAEConfig, shape: Shape, layout: Layout) -> Traced:
    """Trace the strip of the rank with the most work: a widest one, with most neighbours."""
    cut = vae_parallel.Strips(shape[3], shape[4], layout.size)

    def width(rank: int) -> int:
        return cut.sizes[rank] + vae_parallel.NARROWEST * len(cut.neighbours(rank))

    group = simulated_groups(layout, max(range(len(cut.sizes)), key=width))

    def run(vae: WanVAE, trace: Trace) -> None:
        def on_part(done: int, _: int) -> None:
            _count_frames(trace, done, shape)

        latent = torch.empty(shape)[:, :, :STEADY]
        for _ in vae_parallel.decode_frames(vae, latent, group, _as_numpy, on_part):
            pass

    return _traced(config, run, group.stats)


def _count_frames(trace: Trace, done: int, shape: Shape) -> None:
    if done == STEADY - 1:  # the last one that runs stands for all further ones
        trace.count_as(shape[2] - done)


@lru_cache(KEPT)
def tiles(config: VAEConfig, shape: Shape, tile: int) -> Traced:
    """Trace the layers that see full frames, then one tile of the others: the largest.

    The features that stay in RAM between the two are not counted.
    """
    stride, count = config.spatial_stride, min(STEADY, shape[2])
    height, width = shape[3:]
    boxes = vae_tiling.tiles(config, height * stride, width * stride, tile)
    first_frames = (*shape[:2], count, height, width)

    def full_frames(vae: WanVAE, trace: Trace) -> None:
        layers, local = vae_tiling.halves(vae)
        latent = torch.empty(first_frames)
        features = list(vae_tiling.features(vae, layers, latent))
        next(vae_tiling.decode_tile(local, features, boxes[0], height, width, latent.device))

    def one_tile(vae: WanVAE, trace: Trace) -> None:
        local = vae_tiling.halves(vae)[1]
        cut = [vae_tiling.trimmed(local, box, height, width) for box in boxes]
        box, layers = max(cut, key=lambda found: found[0].area)
        channels = config.dec_dim * config.dim_mult[-1]
        part = torch.empty(1, channels, 1, box.bottom - box.top, box.right - box.left)
        state: State = {}
        for done in range(count):
            _count_frames(trace, done, shape)
            # Not named: the first layer frees the copy.
            copy = [part.contiguous(memory_format=torch.channels_last_3d)]
            torch.cat(list(stream(layers, copy.pop(), state)), dim=2)

    first, local = (_traced(config, run) for run in (full_frames, one_tile))
    # `full_frames` keeps its features in memory here, and goes one frame into a tile.
    activations = first.activations - kept_features(config, first_frames)
    work = first.work.scaled(shape[2] / count) + local.work.scaled(len(boxes))
    larger = first if activations >= local.activations else local
    return Traced(max(activations, local.activations), work, larger.top)


def clip(spec: ModelSpec, request: CompleteRequest) -> Traced:
    """Trace the encoding of a request's pictures, one frame or group of four after the other."""
    _, channels, groups, rows, columns = encoded_shape(spec, request)

    def parts(trace: Trace) -> Iterator[Tensor]:
        for done, part in enumerate(clip_parts(spec, request, {})):
            if done == STEADY:
                break
            if done == STEADY - 1:  # the last one that runs stands for all further ones
                trace.count_as(groups - done)
            yield part.clone()  # they come from RAM
        trace.count_as(1)

    def run(vae: WanVAE, trace: Trace) -> None:
        vae.encode_parts(parts(trace))

    traced = _traced(spec.vae, run)
    codes = 2 * channels * 4 * max(0, groups - STEADY) * rows * columns  # of the other groups
    return replace(traced, activations=traced.activations + codes)


def _traced(
    config: VAEConfig, run: Callable[[WanVAE, Trace], None], stats: CommStats | None = None
) -> Traced:
    vae = vae_of(config)
    with fake(stats) as trace:
        weights = materialise(vae)
        trace.mark()
        run(vae, trace)
        return trace.result(weights)


def kept_features(config: VAEConfig, shape: Shape) -> int:
    """Return the bytes that a tiled decode keeps in RAM between its two halves."""
    count, rows, columns = shape[2:]
    return config.dec_dim * config.dim_mult[-1] * 4 * count * rows * columns


def _as_numpy(part: Tensor) -> Frames:
    """Stand in for a fake tensor's frames; the system gives numpy no memory until it is written."""
    _, _, count, rows, columns = part.shape
    return np.empty((count, rows, columns, 3), dtype=np.uint8)
