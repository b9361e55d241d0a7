"""A VAE decode on all processes of a run: each decodes a strip of every frame, and process 0 puts
the frames together.

A frame is cut across its longer side. Before a layer that sees beyond a pixel, neighbours give each
other the columns (or rows) at their border that it reaches, a halo; it runs on the strip with them,
and they are taken off again. What a convolution remembers of the past is then of the strip with its
halo. At the image's own border there is none, and convolutions pad it with zeros as they pad the
image. The attention of the middle sees a whole frame: there every process gets the keys and values
of all pixels.

So the frames are those of one process to rounding, and each has a share of the memory and the work
that one would need. Strips are of all processes, whatever the layout: guidance and tokens are
behind when a latent is decoded.

Shapes: B batch, C channels, T frames; H, W of the whole image, h, w of a strip, in pixels of the
    layer at hand. What is sent is in the order [B, T, h, w, C], in which activations lie in memory;
    frames come as [n, H, W, 3]. An axis counts from the end of that order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from wanflow.models.vae import AttentionBlock, State, Upsample, WanVAE, receptive_margin, stream
from wanflow.parallel.groups import Group, ParallelContext, sizes

Frames = npt.NDArray[np.uint8]
# Latent pixels. A residual block, which reaches farthest, sees two; so a halo comes from the
# nearest neighbour alone.
NARROWEST = 2


@dataclass(frozen=True)
class Strips:
    """How the processes share a frame of `height` * `width` latent pixels: the first ones hold a
    strip each, the others none.
    """

    height: int
    width: int
    processes: int

    @property
    def axis(self) -> int:
        """The side that is cut: -2, the width, or -3, the height where it is the longer one."""
        return -3 if self.height > self.width else -2

    @property
    def across(self) -> int:
        """The other side, which every strip has whole."""
        return min(self.height, self.width)

    @property
    def sizes(self) -> list[int]:
        """How wide each strip is, from left to right or from top to bottom; as many as there are
        strips.
        """
        longer = max(self.height, self.width)
        return sizes(longer, max(1, min(self.processes, longer // NARROWEST)))

    def around(self, rank: int) -> tuple[int, int]:
        """How much of the frame lies before and after a process' strip."""
        before = sum(self.sizes[:rank])
        return before, max(self.height, self.width) - before - self.sizes[rank]

    def neighbours(self, rank: int) -> list[int]:
        """The processes whose strips lie next to a process' own."""
        return [other for other in (rank - 1, rank + 1) if 0 <= other < len(self.sizes)]


def sent(vae: WanVAE, frames: int, strips: Strips, rank: int = 0) -> dict[str, int]:
    """Bytes that one process sends to others in a decode, by what they are: the keys are those of
    `Traffic`.

    Args:
        vae: its weights may have no memory (meta).
        frames: of the latent.
        strips: how its frames are cut.
        rank: the process.
    """
    if rank >= len(strips.sizes) or len(strips.sizes) == 1:
        return {}
    own, scale, halo, keys_values = strips.sizes[rank], 1, 0, 0
    for layer in vae.decoder.layers():
        channels = next(
            (
                part.in_channels
                for part in layer.modules()
                if isinstance(part, nn.Conv2d | nn.Conv3d)
            ),
            0,
        )
        column = channels * frames * strips.across * scale * vae.dtype.itemsize
        if isinstance(layer, AttentionBlock):
            keys_values += 2 * (len(strips.sizes) - 1) * own * column
        else:
            halo += len(strips.neighbours(rank)) * receptive_margin(layer) * column
        if isinstance(layer, Upsample):
            scale *= 2
            frames = frames if layer.time_conv is None else 2 * frames - 1
    shown = 3 * frames * own * strips.across * scale**2 if rank else 0  # process 0 keeps its own
    return {
        key: value
        for key, value in {"halo": halo, "kv": keys_values, "frames": shown}.items()
        if value
    }


class Halo(nn.Module):
    """x [B, C, T, h, w] of this process, with so many pixels of each neighbour's beside it; every
    process that has a strip must call it.
    """

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
        _trade(self.group, "halo", leaving, arriving)
        before, after = (
            [border for peer, border in arriving if (peer < rank) is first]
            for first in (True, False)
        )
        return torch.cat([*before, own, *after], dim=axis).permute(0, 4, 1, 2, 3)


class Attention(nn.Module):
    """The middle's attention, in which the pixels x [B, C, T, h, w] of this process see those of
    all; every process that has a strip
    must call it. Only where a pixel is a latent pixel, before the first doubling.
    """

    def __init__(self, block: AttentionBlock, strips: Strips, group: Group) -> None:
        super().__init__()
        self.block, self.strips, self.group = block, strips, group

    def forward(self, x: Tensor) -> Tensor:
        return self.block.attend(x, self._complete)

    def _complete(self, own: Tensor) -> Tensor:
        """Keys and values of this process' pixels -> of all, strip by strip."""
        own = own.contiguous()
        parts = [
            own.new_empty(_resized(own, -2, size * self.strips.across))
            for size in self.strips.sizes
        ]
        parts[self.group.rank] = own
        others = [peer for peer in range(len(parts)) if peer != self.group.rank]
        _trade(
            self.group,
            "kv",
            [(peer, own) for peer in others],
            [(peer, parts[peer]) for peer in others],
        )
        return torch.cat(parts, dim=-2)


class Trim(nn.Module):
    """x [B, C, T, h, w] without so many pixels at the beginning and the end of an axis; a view."""

    def __init__(self, axis: int, before: int, after: int) -> None:
        super().__init__()
        self.axis, self.before, self.after = axis + 1, before, after  # channels are not last here

    def forward(self, x: Tensor) -> Tensor:
        return x.narrow(self.axis, self.before, x.shape[self.axis] - self.before - self.after)


def connected(layers: list[nn.Module], strips: Strips, group: Group) -> list[nn.Module]:
    """The layers, each between what brings it the pixels of others that it sees and what takes them
    off again.
    """
    if len(strips.sizes) == 1:
        return layers
    rank = group.rank
    out: list[nn.Module] = []
    for layer in layers:
        reach = receptive_margin(layer)
        if isinstance(layer, AttentionBlock):
            out.append(Attention(layer, strips, group))
        elif reach:
            beside = reach * (2 if isinstance(layer, Upsample) else 1)
            before, after = (
                beside * (peer in strips.neighbours(rank)) for peer in (rank - 1, rank + 1)
            )
            out += [Halo(strips, group, reach), layer, Trim(strips.axis, before, after)]
        else:
            out.append(layer)
    return out


@torch.no_grad()
def decode_frames(
    vae: WanVAE,
    latent: Tensor,
    team: ParallelContext,
    convert: Callable[[Tensor], Frames],
    on_part: Callable[[int, int], None] | None = None,
) -> Iterator[Frames]:
    """Decode on all processes: on process 0 uint8 [n, H, W, 3], the first frame alone, then four at
    a time; on the others nothing.

    Every process must iterate to the end, with the same latent. One process gives what
    `vae.decode_frames` gives, bit by bit.

    Args:
        latent: [1, z, t, h, w], normalised, on the VAE's device.
        convert: turns this process' strip of the video, [1, 3, n, height, width] in -1..1, not
            clamped, into uint8 [n, height, width, 3]. It may raise, where a value is NaN; the other
            processes then wait for this one in vain.
        on_part: told (done, in all) after each latent frame, on every process, those without a
            strip too. What it raises ends the decode.

    Raises:
        ValueError: for a latent of another shape.
    """
    if latent.ndim != 5 or latent.shape[0] != 1:
        raise ValueError(f"latent is {list(latent.shape)}, not [1, z, t, h, w]")
    steps, height, width = latent.shape[2:]
    strips, rank = Strips(height, width, team.world.size), team.world.rank
    parts = (
        _parts(vae, latent, strips, team.world)
        if rank < len(strips.sizes)
        else iter([None] * steps)
    )
    for done, part in enumerate(parts, 1):
        frames = None if part is None else _collected(convert(part), strips, team)
        if on_part is not None:
            on_part(done, steps)
        if frames is not None:
            yield frames


def _parts(vae: WanVAE, latent: Tensor, strips: Strips, group: Group) -> Iterator[Tensor]:
    """This process' strip of the video, [1, 3, n, h, w] for each latent frame."""
    layers = connected(vae.decoder.layers(), strips, group)
    own = Trim(strips.axis, *strips.around(group.rank))
    state: State = {}
    for chunk in vae.chunks(latent):
        yield torch.cat(list(stream(layers, own(chunk), state)), dim=2)


def _collected(frames: Frames, strips: Strips, team: ParallelContext) -> Frames | None:
    """The whole frames [n, H, W, 3] on process 0, from everybody's [n, h, w, 3]."""
    if len(strips.sizes) == 1:
        return frames
    group, axis = team.world, strips.axis
    own = torch.from_numpy(np.ascontiguousarray(frames)).to(team.ranks.device)
    if group.rank:
        _trade(group, "frames", [(0, own)], [])
        return None
    scale = frames.shape[axis] // strips.sizes[0]
    arriving = [
        (peer, own.new_empty(_resized(own, axis, size * scale)))
        for peer, size in enumerate(strips.sizes)
        if peer
    ]
    _trade(group, "frames", [], arriving)
    whole = np.empty(_resized(own, axis, sum(strips.sizes) * scale), dtype=np.uint8)
    ends = accumulate(strips.sizes)
    for (_, strip), size, end in zip([(0, own), *arriving], strips.sizes, ends, strict=True):
        torch.from_numpy(whole).narrow(axis, (end - size) * scale, size * scale).copy_(strip)
    return whole


def _resized(like: Tensor, axis: int, size: int) -> list[int]:
    shape = list(like.shape)
    shape[axis] = size
    return shape


def _trade(
    group: Group, what: str, leaving: list[tuple[int, Tensor]], arriving: list[tuple[int, Tensor]]
) -> None:
    for work in group.exchange(what, leaving, arriving):
        work.wait()
