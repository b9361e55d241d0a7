"""A VAE decode in tiles, for little memory: the frames of the whole decode, to rounding, with no
seams to blend.

The first layers, up to the first doubling of height and width, work on images 64 times smaller than
the video's and one of them attends to a whole frame: they run on whole frames, and what they give
is kept. The others see no further than their convolutions reach. They run tile by tile, each tile
with as much around it as that reach, and lose of it after every layer what the rest cannot see.
Where a tile ends at the image's border there is nothing around it, and the convolutions pad it with
zeros as they pad the image.

Units: boxes and margins are in pixels of the layer at hand; a latent pixel is 8 * 8 of the video.
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
from wanflow.models.vae import State, Upsample, WanVAE, receptive_margin, stream

Frames = npt.NDArray[np.uint8]
# pixels; with what is around it, such a tile's first layers work on seven times its own area
SMALLEST = 64


@dataclass(frozen=True)
class Box:
    """A part of an image: rows top to bottom, columns left to right, the ends not included."""

    top: int
    bottom: int
    left: int
    right: int

    def grown(self, margin: int, height: int, width: int) -> Box:
        """With a margin around it, inside an image of this size."""
        return Box(
            max(0, self.top - margin),
            min(height, self.bottom + margin),
            max(0, self.left - margin),
            min(width, self.right + margin),
        )

    def times(self, factor: int) -> Box:
        return Box(self.top * factor, self.bottom * factor, self.left * factor, self.right * factor)


class Trim(nn.Module):
    """x [..., H, W], which shows the box `held`, cut to the box `kept` inside it."""

    def __init__(self, held: Box, kept: Box) -> None:
        super().__init__()
        self.rows = slice(kept.top - held.top, kept.bottom - held.top)
        self.columns = slice(kept.left - held.left, kept.right - held.left)

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.rows, self.columns]


def check_tile(tile: int) -> None:
    """RequestError for a side that no tile can have; 0, which stands for whole frames, is the
    caller's to look for.
    """
    if tile < SMALLEST:
        raise RequestError(
            f"vae_tile {tile} is too small for a tile; give {SMALLEST} or more pixels, or 0 to"
            " decode whole frames"
        )


def tiles(config: VAEConfig, height: int, width: int, tile: int) -> list[Box]:
    """The tiles of a frame, row by row, in latent pixels: as few as a side of `tile` allows, and as
    equal as can be.

    Args:
        height, width: of the video, in pixels.
        tile: the longest side of a tile in pixels, rounded down to whole latent pixels.

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
    """The decoder's layers before the first doubling of height and width, which need whole frames,
    and those from it on.
    """
    layers = vae.decoder.layers()
    first = next(
        (number for number, layer in enumerate(layers) if isinstance(layer, Upsample)), len(layers)
    )
    return layers[:first], layers[first:]


def margins(layers: list[nn.Module]) -> list[int]:
    """How many pixels around a box each layer must be given, for the box to be right after the
    last; at the end a 0.

    Each is in pixels of its layer's input.
    """
    found = [0]
    for layer in reversed(layers):
        found.append(receptive_margin(layer, found[-1]))
    return found[::-1]


def trimmed(
    layers: list[nn.Module], box: Box, height: int, width: int
) -> tuple[Box, list[nn.Module]]:
    """What of an image [..., height, width] the layers need for a box of it, and the layers, each
    followed by its `Trim`.

    The last gives the box alone, in its own, larger pixels.
    """
    first, *rest = margins(layers)
    start = held = box.grown(first, height, width)
    out: list[nn.Module] = []
    for layer, margin in zip(layers, rest, strict=True):
        if isinstance(layer, Upsample):
            box, held, height, width = box.times(2), held.times(2), 2 * height, 2 * width
        kept = box.grown(margin, height, width)
        out.append(layer)
        if kept != held:
            out.append(Trim(held, kept))
        held = kept
    return start, out


@torch.no_grad()
def decode_frames(
    vae: WanVAE,
    latent: Tensor,
    tile: int,
    convert: Callable[[Tensor], Frames],
    on_part: Callable[[int, int], None] | None = None,
) -> Iterator[Frames]:
    """Decode in tiles: uint8 [n, H, W, 3], the first frame alone, then four at a time, in the order
    of time.

    A tile is decoded through all its frames before the next begins, so that one tile's memory of
    the past is held at a time; the frames come while the last tile is decoded. Beside them, in RAM:
    the video as uint8, and the kept features, dim * 4 floats per latent pixel (22 MB per latent
    frame at 1280*720).

    Args:
        latent: [1, z, t, h, w], normalised, on the VAE's device.
        tile: the longest side of a tile, in pixels of the video; one as large as the frame is the
            frame, bit-equal to a whole decode.
        convert: turns a part of the video [1, 3, n, height, width] in -1..1, not clamped, into
            uint8 [n, height, width, 3]. It may raise, where a value is NaN.
        on_part: told (done, in all) after each part, which is one latent frame of one tile. What it
            raises ends the decode.

    Raises:
        RequestError: for a tile below 64 pixels.
        ValueError: for a latent of another shape.
    """
    if latent.ndim != 5 or latent.shape[0] != 1:
        raise ValueError(f"latent is {list(latent.shape)}, not [1, z, t, h, w]")
    steps, height, width = latent.shape[2:]
    stride, scale = vae.config.temporal_stride, vae.config.spatial_stride
    boxes = tiles(vae.config, height * scale, width * scale, tile)
    whole, local = halves(vae)
    features = list(_features(vae, whole, latent))
    video = np.empty((1 + stride * (steps - 1), height * scale, width * scale, 3), dtype=np.uint8)
    for number, box in enumerate(boxes):
        place = box.times(scale)
        end = 0
        for step, part in enumerate(_tile(local, features, box, height, width, latent.device)):
            frames = convert(part)
            start, end = end, end + len(frames)
            video[start:end, place.top : place.bottom, place.left : place.right] = frames
            if on_part is not None:
                on_part(number * steps + step + 1, len(boxes) * steps)
            if number == len(boxes) - 1:
                yield video[start:end]


def _features(vae: WanVAE, layers: list[nn.Module], latent: Tensor) -> Iterator[Tensor]:
    """What the layers before the first doubling give, in RAM: [1, C, 1, h, w] for each latent
    frame.
    """
    state: State = {}
    for chunk in vae.chunks(latent):
        for part in stream(layers, chunk, state):
            yield part.cpu()


def _tile(
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
    for whole in features:
        part = whole[..., shown.top : shown.bottom, shown.left : shown.right].to(device)
        yield torch.cat(list(stream(layers, part, state)), dim=2)
