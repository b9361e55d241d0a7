"""Define the Wan2.2 VAE of TI2V-5B: that of Wan2.1 with folded pixels, shortcuts, a wider decoder.

Shapes: as in `vae`, with H = 16 h and W = 16 w.

Blocks of 2 x 2 pixels become channels before the encoder, and channels become pixels after the
decoder. The layers of one size of image form a stage, with a shortcut from its input to its output.
It has no weights: an encoder's folds time, rows and columns into channels and takes means, a
decoder's repeats channels and unfolds them. `Keep` stands before a stage's layers, and `Averages`
or `Repeats` after them.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from wanflow.models.vae import Decoder, Downsample, Encoder, State, Stateful, Upsample, WanVAE


class Keep(Stateful):
    """Keep a stage's input for the shortcut at its end."""

    def forward(self, x: Tensor, state: State) -> Tensor:
        state[self] = x
        return x


class Shortcut(Stateful):
    """Add what a stage's input tells of its output.

    A pixel of the smaller image stands for a group of times, rows and columns of the larger one.
    Where the smaller image has `ratio` times as many channels, neighbouring ones differ first in
    time, then in the row, then in the column; `lead` is how many of each they tell apart.

    Args:
        keep: what has the input.
        few, many: channels of the larger and the smaller image.
        time, space: frames and pixels along each side of a group.
    """

    def __init__(self, keep: Keep, few: int, many: int, time: int, space: int) -> None:
        super().__init__()
        self.keep, self.time, self.space = keep, time, space
        ratio, self.lead = many // few, list[int]()
        for size in (time, space, space):
            self.lead.append(min(size, ratio))
            ratio //= self.lead[-1]

    def take(self, frames: int, state: State) -> Tensor:
        """Take the next frames of the input; a part of the output may come at a time."""
        kept = state.pop(self.keep)
        if kept.shape[2] > frames:
            state[self.keep] = kept[:, :, frames:]
        return kept[:, :, :frames]

    def groups(self, x: Tensor, time: int) -> Tensor:
        """View x [B, C, T, H, W] as [B, C, time, space, space, T/time, H/space, W/space]."""
        x = x.unflatten(4, (-1, self.space)).unflatten(3, (-1, self.space)).unflatten(2, (-1, time))
        return x.permute(0, 1, 3, 5, 7, 2, 4, 6)


class Averages(Shortcut):
    """The shortcut of an encoder's stage."""

    def forward(self, x: Tensor, state: State) -> Tensor:
        kept = self.take(x.shape[2] * self.time, state)
        # The first frame is the last of its group, and zeros are the others.
        kept = F.pad(kept, (0, 0, 0, 0, -kept.shape[2] % self.time, 0))
        means = self.groups(kept, self.time)
        for axis, size in enumerate(self.lead, start=2):
            if size == 1 < means.shape[axis]:
                means = means.mean(axis, keepdim=True)
        return x.add_(means.flatten(1, 4))


class Repeats(Shortcut):
    """The shortcut of a decoder's stage."""

    def forward(self, x: Tensor, state: State) -> Tensor:
        return self.add(x, self.part(x, state))

    def part(self, x: Tensor, state: State) -> Tensor:
        """Return the part of the input that belongs to x [B, C, T, H, W]."""
        return self.take(-(-x.shape[2] // self.time), state)

    def add(self, x: Tensor, kept: Tensor) -> Tensor:
        """Add the shortcut of a part of the input; the repeated values are never in memory."""
        time = x.shape[2] // kept.shape[2]  # 1 for the first frame: the last of its group
        self.groups(x, time).add_(kept.unflatten(1, (-1, *self.lead))[:, :, -time:])
        return x


class Unfold(nn.Module):
    """Channels (colour, column, row) to pixels: [B, 12, T, H, W] -> [B, 3, T, 2 H, 2 W]."""

    growth = 2

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 4, 1).unflatten(-1, (-1, 2, 2)).permute(0, 1, 2, 6, 3, 5, 4)
        return x.flatten(4, 5).flatten(2, 3).permute(0, 4, 1, 2, 3)


class Encoder22(Encoder):
    """Video [B, 3, T, H, W] -> [B, 2 z, t, h, w]; all its stages have a shortcut."""

    last_of_stage = Averages

    def stage(self, layers: list[nn.Module], in_dim: int, out_dim: int) -> list[nn.Module]:
        keep, last = Keep(), layers[-1]
        halves = isinstance(last, Downsample), isinstance(last, Downsample) and last.temporal
        space, time = (2 if half else 1 for half in halves)
        shortcut = Averages(keep, in_dim, out_dim, time, space)
        return [_named(keep=keep, downsamples=nn.Sequential(*layers), avg_shortcut=shortcut)]

    def forward(self, x: Tensor, state: State) -> Tensor:
        """Fold 2 x 2 pixels to channels, and encode those."""
        x = x.permute(0, 2, 3, 4, 1).unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        x = x.permute(0, 1, 2, 4, 6, 5, 3).flatten(4).permute(0, 4, 1, 2, 3)
        return super().forward(x, state)


class Decoder22(Decoder):
    """Latent [B, z, t, h, w] -> video [B, 3, T, H, W]; its last stage has no shortcut."""

    def enlarged(self, dim: int) -> int:
        return dim

    def stage(self, layers: list[nn.Module], in_dim: int, out_dim: int) -> list[nn.Module]:
        keep, stage, last = Keep(), nn.Sequential(*layers), layers[-1]
        if not isinstance(last, Upsample):
            return [_named(upsamples=stage)]
        shortcut = Repeats(keep, out_dim, in_dim, 2 if last.temporal else 1, 2)
        return [_named(keep=keep, upsamples=stage, avg_shortcut=shortcut)]

    def layers(self) -> list[nn.Module]:
        return [*super().layers(), Unfold()]


class WanVAE22(WanVAE):
    """The VAE; `config` is a `VAE22Config`."""

    encoder_class, decoder_class = Encoder22, Decoder22


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))
