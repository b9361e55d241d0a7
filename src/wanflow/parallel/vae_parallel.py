"""A VAE decode on all ranks of a run: each decodes a strip of every frame, rank 0 joins the frames.

A frame is cut across its longer side. Before a layer that sees beyond a pixel, neighbours exchange
a halo: the columns (or rows) at their border that the layer reaches. The layer runs on the strip
with its halo, which is trimmed afterwards. A convolution's memory of past frames has the halo too.
At the border of the image there is no halo, and convolutions pad with zeros. The middle attention
sees a complete frame: there every rank gets the keys and values of all pixels.

So the frames equal those of one process to rounding, and each rank has a share of its memory and
work. All ranks take a strip, whatever the layout: guidance and tokens are done before the decode.

Shapes: B batch, C channels, T frames; H, W of the image, h, w of a strip, in pixels of the layer.
    What is sent is in the order [B, T, h, w, C], in which activations are in memory; frames are
    [n, H, W, 3]. An axis counts from the end of that order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from wanflow.models.vae import AttentionBlock, State, WanVAE, growth, receptive_margin, stream
from wanflow.parallel.groups import Group, ParallelContext, sizes

Frames = npt.NDArray[np.uint8]
# Latent pixels. A residual block, which reaches farthest, sees two, so one neighbour is enough.
NARROWEST = 2


@dataclass(frozen=True)
class Strips:
    """The strips of a frame of height x width latent pixels: one for each of the first ranks."""

    height: int
    width: int
    ranks: int

    @property
    def axis(self) -> int:
        """The side that is cut: -2, the width, or -3, the height where it is the longer one."""
        return -3 if self.height > self.width else -2

    @property
    def across(self) -> int:
        """The length of the other side, which every strip has in full."""
        return min(self.height, self.width)

    @property
    def sizes(self) -> list[int]:
        """The width of each strip, from left to right or from top to bottom."""
        longer = max(self.height, self.width)
        return sizes(longer, max(1, min(self.ranks, longer // NARROWEST)))

    def around(self, rank: int) -> tuple[int, int]:
        """Return how much of the frame is before and after a rank's strip."""
        before = sum(self.sizes[:rank])
        return before, max(self.height, self.width) - before - self.sizes[rank]

    def neighbours(self, rank: int) -> list[int]:
        """Return the ranks with the strips next to a rank's."""
        return [other for other in (rank - 1, rank + 1) if 0 <= other < len(self.sizes)]


class Halo(nn.Module):
    """x [B, C, T, h, w] with the neighbours' border pixels. Every rank with a strip calls it."""

    def __init__(self, strips: Strips, group: Group, reach: int) -> None:
        super().__init__()
        self.strips, self.group, self.reach = strips, group, reach

    def forward(self, x: Tensor) -> Tensor:
        own, axis, rank = x.permute(0, 2, 3, 4, 1), self.strips.axis, self.group.rank
        last = own.shape[axis] - self.reach
        borders = [
            (peer, own.narrow(axis, 0 if peer < rank else last, self.reach))
            for peer in self.strips.neighbours(rank)
        ]
        leaving = [(peer, border.contiguous()) for peer, border in borders]
        arriving = [(peer, torch.empty_like(border)) for peer, border in leaving]
        _exchange(self.group, "halo", leaving, arriving)
        before = [border for peer, border in arriving if peer < rank]
        after = [border for peer, border in arriving if peer > rank]
        return torch.cat([*before, own, *after], dim=axis).permute(0, 4, 1, 2, 3)


class Attention(nn.Module):
    """The middle attention, in which pixels x [B, C, T, h, w] of this rank see those of all ranks.

    Every rank with a strip must call it. A pixel must be a latent pixel: before the first doubling.
    """

    def __init__(self, block: AttentionBlock, strips: Strips, group: Group) -> None:
        super().__init__()
        self.block, self.strips, self.group = block, strips, group

    def forward(self, x: Tensor) -> Tensor:
        return self.block.attend(x, self._complete)

    def _complete(self, own: Tensor) -> Tensor:
        """Return keys and values of all ranks' pixels, strip by strip."""
        own, rank = own.contiguous(), self.group.rank
        shapes = [_resized(own, -2, size * self.strips.across) for size in self.strips.sizes]
        parts = [own.new_empty(shape) for shape in shapes]
        parts[rank] = own
        others = [(peer, part) for peer, part in enumerate(parts) if peer != rank]
        _exchange(self.group, "kv", [(peer, own) for peer, _ in others], others)
        return torch.cat(parts, dim=-2)


class Trim(nn.Module):
    """x [B, C, T, h, w] without some pixels at both ends of an axis; a view."""

    def __init__(self, axis: int, before: int, after: int) -> None:
        super().__init__()
        self.axis, self.before, self.after = axis + 1, before, after  # channels are not last here

    def forward(self, x: Tensor) -> Tensor:
        return x.narrow(self.axis, self.before, x.shape[self.axis] - self.before - self.after)


def connected(layers: list[nn.Module], strips: Strips, group: Group) -> list[nn.Module]:
    """Return the layers, each between what adds other ranks' pixels and what trims them."""
    if len(strips.sizes) == 1:
        return layers
    rank = group.rank
    out: list[nn.Module] = []
    for layer in layers:
        reach = receptive_margin(layer)
        if isinstance(layer, AttentionBlock):
            out.append(Attention(layer, strips, group))
        elif reach:
            margin = reach * growth(layer)
            neighbours = strips.neighbours(rank)
            before, after = (margin * (peer in neighbours) for peer in (rank - 1, rank + 1))
            out += [Halo(strips, group, reach), layer, Trim(strips.axis, before, after)]
        else:
            out.append(layer)
    return out


@torch.no_grad()
def decode_frames(
    vae: WanVAE,
    latent: Tensor,
    ctx: ParallelContext,
    convert: Callable[[Tensor], Frames],
    on_part: Callable[[int, int], None] | None = None,
) -> Iterator[Frames]:
    """Decode on all ranks: yield frames uint8 [n, H, W, 3] on rank 0 and nothing on the others.

    The first frame comes alone, then four at a time. Every rank must iterate to the end, with the
    same latent. One rank gives the bits of `vae.decode_frames`.

    Args:
        vae: on every rank.
        latent: [1, z, t, h, w], normalised, on the VAE's device.
        ctx: this rank.
        convert: turns this rank's strip of the video, [1, 3, n, height, width] in -1..1, not
            clamped, into uint8 [n, height, width, 3]. It may raise, where a value is NaN; the
            other ranks then wait until the watchdog ends them.
        on_part: gets (done, total) after each latent frame, on every rank. What it raises ends
            the decode.

    Raises:
        ValueError: for a latent of another shape.
    """
    if latent.ndim != 5 or latent.shape[0] != 1:
        raise ValueError(f"latent is {list(latent.shape)}, expected [1, z, t, h, w]")
    steps, height, width = latent.shape[2:]
    strips, rank = Strips(height, width, ctx.world.size), ctx.world.rank
    has_strip = rank < len(strips.sizes)
    parts = _decode_strip(vae, latent, strips, ctx.world) if has_strip else iter([None] * steps)
    for done, part in enumerate(parts, 1):
        frames = None if part is None else _collect(convert(part), strips, ctx)
        if on_part is not None:
            on_part(done, steps)
        if frames is not None:
            yield frames


def _decode_strip(vae: WanVAE, latent: Tensor, strips: Strips, group: Group) -> Iterator[Tensor]:
    """Yield this rank's strip of the video, [1, 3, n, h, w] for each latent frame."""
    layers = connected(vae.decoder.layers(), strips, group)
    own = Trim(strips.axis, *strips.around(group.rank))
    state: State = {}
    for chunk in vae.chunks(latent):
        yield torch.cat(list(stream(layers, own(chunk), state)), dim=2)


def _collect(frames: Frames, strips: Strips, ctx: ParallelContext) -> Frames | None:
    """Join the strips [n, h, w, 3] of all ranks to frames [n, H, W, 3] on rank 0."""
    if len(strips.sizes) == 1:
        return frames
    group, axis = ctx.world, strips.axis
    own = torch.from_numpy(np.ascontiguousarray(frames)).to(ctx.info.device)
    if group.rank:
        _exchange(group, "frames", [(0, own)], [])
        return None
    scale = frames.shape[axis] // strips.sizes[0]
    shapes = [_resized(own, axis, size * scale) for size in strips.sizes]
    arriving = [(peer, own.new_empty(shape)) for peer, shape in enumerate(shapes) if peer]
    _exchange(group, "frames", [], arriving)
    joined = np.empty(_resized(own, axis, sum(strips.sizes) * scale), dtype=np.uint8)
    ends = accumulate(strips.sizes)
    for (_, strip), size, end in zip([(0, own), *arriving], strips.sizes, ends, strict=True):
        torch.from_numpy(joined).narrow(axis, (end - size) * scale, size * scale).copy_(strip)
    return joined


def _resized(like: Tensor, axis: int, size: int) -> list[int]:
    shape = list(like.shape)
    shape[axis] = size
    return shape


def _exchange(
    group: Group,
    purpose: str,
    leaving: list[tuple[int, Tensor]],
    arriving: list[tuple[int, Tensor]],
) -> None:
    for work in group.exchange(purpose, leaving, arriving):
        work.wait()
