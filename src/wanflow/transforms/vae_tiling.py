"""Decode with the VAE in tiles, for little memory: equal to the full decode to rounding, no seams.

The first layers see images of the latent's size, and one of them attends to the full frame. They
run on full frames, and their features are stored. The other layers see no further than their
convolutions reach. They run tile by tile, each tile with a margin of that reach; after every layer
the margin shrinks to what the remaining layers need. At the image's border a tile has no margin,
and the convolutions pad it with zeros as they pad the image.

Boxes and margins are in pixels of the current layer; a latent pixel is 8 * 8 or 16 * 16 of the
video.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from wanflow.config import RequestError, VAEConfig
from wanflow.models.vae import State, Stateful, WanVAE, growth, receptive_margin, stream
from wanflow.models.vae22 import Keep, Repeats

Frames = npt.NDArray[np.uint8]
# Pixels. With its margin, the first layers of such a tile compute seven times its own area.
SMALLEST = 64


@dataclass(frozen=True)
class Box:
    """A part of an image: rows top to bottom, columns left to right, ends excluded."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)

    def grown(self, margin: int, height: int, width: int) -> Box:
        """Return the box with a margin around it, cut to an image of this size."""
        return Box(
            max(0, self.top - margin),
            min(height, self.bottom + margin),
            max(0, self.left - margin),
            min(width, self.right + margin),
        )

    def times(self, factor: int) -> Box:
        return Box(self.top * factor, self.bottom * factor, self.left * factor, self.right * factor)

    def over(self, factor: int) -> Box:
        """Return the box in pixels that are larger; its sides are multiples of `factor`."""
        sides = self.top, self.bottom, self.left, self.right
        return Box(*(side // factor for side in sides))


class Trim(nn.Module):
    """x [..., H, W] that shows the box `outer`, cut to the box `inner`."""

    def __init__(self, outer: Box, inner: Box) -> None:
        super().__init__()
        self.rows = slice(inner.top - outer.top, inner.bottom - outer.top)
        self.columns = slice(inner.left - outer.left, inner.right - outer.left)

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.rows, self.columns]


class TrimmedRepeats(Stateful):
    """A stage's shortcut whose input shows more than its output."""

    def __init__(self, shortcut: Repeats, trim: Trim) -> None:
        super().__init__()
        self.shortcut, self.trim = shortcut, trim

    def forward(self, x: Tensor, state: State) -> Tensor:
        return self.shortcut.add(x, self.trim(self.shortcut.part(x, state)))


def check_tile(tile: int) -> None:
    """Raise RequestError for a tile that is too small; the caller handles 0, no tiles."""
    if tile < SMALLEST:
        raise RequestError(
            f"vae_tile {tile} is too small; expected {SMALLEST} or more pixels, or 0 for full"
            " frames: --vae_tile 256"
        )


def tiles(config: VAEConfig, height: int, width: int, tile: int) -> list[Box]:
    """Return the tiles of a frame, row by row, in latent pixels: few, and as equal as possible.

    Args:
        height, width: of the video, in pixels.
        tile: the longest side of a tile in pixels, rounded down to latent pixels.

    Raises:
        RequestError: for a tile below 64 pixels.
    """
    check_tile(tile)
    stride = config.spatial_stride
    rows, columns = (_spans(side // stride, tile // stride) for side in (height, width))
    return [Box(top, bottom, left, right) for top, bottom in rows for left, right in columns]


def _spans(length: int, longest: int) -> list[tuple[int, int]]:
    count = -(-length // longest)
    return list(itertools.pairwise(length * number // count for number in range(count + 1)))


def halves(vae: WanVAE) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the decoder's layers for full frames, and the others.

    Full frames pass all layers before the first doubling, or before the first stage that has a
    shortcut: its input would have to be stored too.
    """
    layers = vae.decoder.layers()
    ends = (number for number, layer in enumerate(layers) if _ends_full_frames(layer))
    first = next(ends, len(layers))
    return layers[:first], layers[first:]


def _ends_full_frames(layer: nn.Module) -> bool:
    return growth(layer) > 1 or isinstance(layer, Keep)


def margins(layers: list[nn.Module]) -> list[int]:
    """Return the margin that each layer needs for a box to be right after the last, then 0.

    Each is in pixels of its layer's input.
    """
    found = [0]
    for layer in reversed(layers):
        margin = receptive_margin(layer, found[-1])
        if isinstance(layer, Repeats):  # its output shows whole pixels of its input
            margin += -margin % layer.space
        found.append(margin)
    return found[::-1]


def trimmed(
    layers: list[nn.Module], box: Box, height: int, width: int
) -> tuple[Box, list[nn.Module]]:
    """Return the box of an image [..., height, width] to start from, and the layers with `Trim`s.

    The last layer's output is the box alone, in its own, larger pixels.
    """
    first, *rest = margins(layers)
    start = outer = kept = box.grown(first, height, width)
    out: list[nn.Module] = []
    for layer, margin in zip(layers, rest, strict=True):
        if isinstance(layer, Keep):
            kept = outer
        if isinstance(layer, Repeats):
            layer = TrimmedRepeats(layer, Trim(kept, outer.over(layer.space)))
        scale = growth(layer)
        box, outer, height, width = (
            box.times(scale),
            outer.times(scale),
            scale * height,
            scale * width,
        )
        inner = box.grown(margin, height, width)
        out.append(layer)
        if inner != outer:
            out.append(Trim(outer, inner))
        outer = inner
    return start, out


@torch.no_grad()
def decode_frames(
    vae: WanVAE,
    latent: Tensor,
    tile: int,
    convert: Callable[[Tensor], Frames],
    on_part: Callable[[int, int], None] | None = None,
) -> Iterator[Frames]:
    """Decode in tiles: yield uint8 [n, H, W, 3] in order, the first frame alone, then four each.

    A tile is decoded through all its frames before the next, so one tile's memory of past frames is
    held at a time; frames are yielded while the last tile is decoded. RAM also holds the video as
    uint8, and the features: dim * 4 floats per latent pixel (22 MB per latent frame at 1280*720).

    Args:
        latent: [1, z, t, h, w], normalised, on the VAE's device.
        tile: the longest side of a tile, in pixels of the video. A tile as large as the frame is
            bit-equal to a full decode.
        convert: [1, 3, n, height, width] in -1..1, not clamped -> uint8 [n, height, width, 3]. It
            may raise where a value is NaN.
        on_part: called with (done, total) after each latent frame of each tile. What it raises ends
            the decode.

    Raises:
        RequestError: for a tile below 64 pixels.
        ValueError: for a latent of another shape.
    """
    if latent.ndim != 5 or latent.shape[0] != 1:
        raise ValueError(f"latent is {list(latent.shape)}, not [1, z, t, h, w]")
    steps, height, width = latent.shape[2:]
    stride, scale = vae.config.temporal_stride, vae.config.spatial_stride
    boxes = tiles(vae.config, height * scale, width * scale, tile)
    full, local = halves(vae)
    held = list(features(vae, full, latent))
    video = np.empty((1 + stride * (steps - 1), height * scale, width * scale, 3), dtype=np.uint8)
    for number, box in enumerate(boxes):
        target = box.times(scale)
        end = 0
        for step, part in enumerate(decode_tile(local, held, box, height, width, latent.device)):
            frames = convert(part)
            start, end = end, end + len(frames)
            video[start:end, target.top : target.bottom, target.left : target.right] = frames
            if on_part is not None:
                on_part(number * steps + step + 1, len(boxes) * steps)
            if number == len(boxes) - 1:
                yield video[start:end]


def features(vae: WanVAE, layers: list[nn.Module], latent: Tensor) -> Iterator[Tensor]:
    """The features before the first doubling, in RAM: [1, C, 1, h, w] for each latent frame."""
    state: State = {}
    for chunk in vae.chunks(latent):
        for part in stream(layers, chunk, state):
            yield part.cpu()


def decode_tile(
    layers: list[nn.Module],
    features: list[Tensor],
    box: Box,
    height: int,
    width: int,
    device: torch.device,
) -> Iterator[Tensor]:
    """One tile of the video, [1, 3, 1 or 4, H, W] for each latent frame."""
    shown, layers = trimmed(layers, box, height, width)
    state: State = {}
    for frame in features:
        part = frame[..., shown.top : shown.bottom, shown.left : shown.right].to(device)
        yield torch.cat(list(stream(layers, part, state)), dim=2)
