"""Define the Wan2.1 causal 3D VAE: video <-> latent, in memory that does not grow with frames.

Shapes: B batch, C channels, T frames, H height, W width in pixels; t, h, w the same in latent
    units: T = 1 + 4 (t - 1), H = 8 h, W = 8 w.

Every convolution looks back over at most two frames, so a video passes in chunks: the first frame
alone, then groups of four. `State` holds what a convolution needs of the chunk before; it is made
per call and keyed by module. The size of a chunk does not change the result: decoding takes one
latent frame, training all at once. Without gradients a chunk passes the layers two frames at a time
(`stream`).

Activations are in channels-last order: CPU and GPU convolutions are fastest in it, and the channel
norm reads consecutive memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanflow.config import VAEConfig

State = dict[nn.Module, Tensor]
STRIPS = 4  # of rows, in which frames of at least `LARGE` bytes pass a convolution
LARGE = 1 << 23


class Stateful(nn.Module):
    """A layer that is called with the `State` beside its input."""


class CausalConv3d(Stateful, nn.Conv3d):
    """A convolution over (time, height, width) that sees no future.

    Two past frames come from `state`; zeros precede the first frame.
    """

    def forward(self, x: Tensor, state: State) -> Tensor:  # type: ignore[override]
        """Map x [B, C, T, H, W] -> [B, C', T, H, W]."""
        reach, space = self.kernel_size[0] - 1, (self.kernel_size[1] // 2, self.kernel_size[2] // 2)
        if reach == 0:
            return F.conv3d(x, self.weight, self.bias, padding=(0, *space))
        past = state.get(self)
        if past is None and x.shape[2] == 1:
            # Taps that would meet only zeros are skipped: the first frame costs a third.
            state[self] = F.pad(x, (0, 0, 0, 0, reach - 1, 0))
            return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=space).unsqueeze(
                2
            )
        if past is not None and _pairs_pay(self, x):
            return self.pairs(x, past, lambda rows: rows)
        seen = F.pad(x, (0, 0, 0, 0, reach, 0)) if past is None else torch.cat([past, x], dim=2)
        state[self] = seen[:, :, -reach:].clone()  # a view would keep all of `seen` in memory
        return F.conv3d(seen, self.weight, self.bias, padding=(0, *space))

    def after(self, prepare: Callable[[Tensor], Tensor], x: Tensor, state: State) -> Tensor:
        """Map x like `self(prepare(x), state)`; `prepare` works on each pixel.

        Where frames come in pairs, `prepare` and convolution take strips of rows, so what is
        prepared is never in memory as a whole.
        """
        past = state.get(self)
        if past is None or x.shape[2] != 2 or not _pairs_pay(self, x):
            return self(prepare(x), state)
        return self.pairs(x, past, prepare)

    def pairs(self, x: Tensor, past: Tensor, prepare: Callable[[Tensor], Tensor]) -> Tensor:
        """Convolve frames in pairs, and leave the last two prepared ones in `past`."""
        batch, _, frames, height, width = x.shape
        rows = -(-height // STRIPS) if x.nbytes >= LARGE else height
        if frames > 2:
            x, rows, prepare = prepare(x), height, lambda x: x
        size = (batch, self.out_channels, frames, height, width)
        out = torch.empty(
            size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d
        )
        u, v, w = self.weight.unbind(2)
        outer = (u + w) / 2
        taps = u, outer + v / 2, outer - v / 2, w
        del outer
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            first, last = max(0, top - 1), min(bottom + 1, height)
            strip = prepare(x[..., first:last, :])
            seen = [*past[..., first:last, :].unbind(2), *strip.unbind(2)]
            conv_pairs(seen, taps, self.bias, out[..., top:bottom, :], top - first)
            # The next strip looks back at the last two rows of this one.
            done = height if bottom == height else bottom - 1
            past[..., first:done, :] = strip[:, :, -2:, : done - first]
        return out


def conv_pairs(
    frames: list[Tensor], taps: tuple[Tensor, ...], bias: Tensor | None, out: Tensor, skip: int
) -> None:
    """Convolve T + 2 frames [B, C, H, W] by 3x3x3, unpadded in time, T even.

    Convolutions take most of a decode's time. Here two frames of output take four 2D convolutions
    instead of six, by Winograd's F(2, 3) over time. From four frames a, b, c, d and the weights'
    three taps u, v, w it computes

        even = (a - c) u + (b + c) (u + v + w) / 2 + (c - b) (u - v + w) / 2  =  a u + b v + c w
        odd  = (d - b) w + (b + c) (u + v + w) / 2 - (c - b) (u - v + w) / 2  =  b u + c v + d w

    which is equal to rounding: in float32 a direct convolution is no closer to the exact sum.

    Args:
        frames: the images, or some rows of them.
        taps: u, (u + v + w) / 2, (u - v + w) / 2 and w.
        bias: of the convolution.
        out: gets the result, [B, C', T, h, W]: all rows, or those whose neighbours are there.
        skip: rows of the frames before those of `out`.
    """
    u, plus, minus, w = taps
    rows = out.shape[3]
    inside = rows == frames[0].shape[2] - 2  # no row meets the zeros around an image

    def convolve(image: Tensor, tap: Tensor, bias: Tensor | None = None) -> Tensor:
        made = F.conv2d(image, tap, bias, padding=(0 if inside else 1, 1))
        return made if inside else made[:, :, skip : skip + rows]

    for t in range(0, out.shape[2], 2):
        a, b, c, d = frames[t : t + 4]
        even, odd = out[:, :, t], out[:, :, t + 1]
        both, differ = convolve(b + c, plus, bias), convolve(c - b, minus)
        torch.add(both, differ, out=even).add_(convolve(a - c, u))
        torch.sub(both, differ, out=odd).add_(convolve(d - b, w))


def _pairs_pay(layer: nn.Conv3d, x: Tensor) -> bool:
    """Return whether `conv_pairs` applies.

    It overwrites memory that autograd would need, and rounds too often for bfloat16.
    """
    fits = layer.kernel_size == (3, 3, 3) and x.shape[2] % 2 == 0
    return fits and x.dtype == torch.float32 and not _learns([x, layer.weight])


def _learns(*values: Iterable[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(
        value.requires_grad for value in itertools.chain(*values)
    )


class ChannelNorm(nn.Module):
    """x / max(|x|, 1e-12) * sqrt(C) * gamma, over channels; no epsilon inside the root."""

    def __init__(self, dim: int, image: bool = False) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1) if image else torch.ones(dim, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12)
        return (x * (x.shape[1] ** 0.5 / length)).mul_(self.gamma)


class ResidualBlock(Stateful):
    """norm, SiLU, conv, twice, plus a shortcut."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            ChannelNorm(in_dim),
            nn.SiLU(inplace=True),
            CausalConv3d(in_dim, out_dim, 3),
            ChannelNorm(out_dim),
            nn.SiLU(inplace=True),
            nn.Identity(),
            CausalConv3d(out_dim, out_dim, 3),
        )
        self.shortcut = nn.Identity() if in_dim == out_dim else CausalConv3d(in_dim, out_dim, 1)

    def forward(self, x: Tensor, state: State) -> Tensor:
        out = x
        for norm, conv in (
            (self.residual[0], self.residual[2]),
            (self.residual[3], self.residual[6]),
        ):
            out = cast(CausalConv3d, conv).after(_activated(norm), out, state)
        return out.add_(self.shortcut(x, state) if isinstance(self.shortcut, CausalConv3d) else x)


def _activated(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: F.silu(norm(x), inplace=True)


class AttentionBlock(Stateful):
    """Single-head attention over the pixels of one frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim, image=True)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, state: State) -> Tensor:
        """Map x [B, C, T, H, W] -> the same."""
        return self.attend(x, lambda keys_values: keys_values)

    def attend(self, x: Tensor, complete: Callable[[Tensor], Tensor]) -> Tensor:
        """Attend from a part of a frame: x [B, C, T, h, w] -> the same.

        Args:
            x: some pixels of each frame.
            complete: turns the keys and values of these pixels, [B T, 1, h w, 2 C], into those of
                the complete frame, in any order.
        """
        batch, channels, frames, height, width = x.shape
        images = x.transpose(1, 2).reshape(batch * frames, channels, height, width)
        # In order of pixels: fused attention reads a pixel's channels together. Unfused attention
        # would hold a score for each pair of pixels (0.8 GB at 720p, several times).
        qkv = self.to_qkv(self.norm(images)).flatten(2).transpose(1, 2).contiguous().unsqueeze(1)
        q, keys_values = qkv.split((channels, 2 * channels), dim=-1)
        k, v = complete(keys_values).chunk(2, dim=-1)
        out = (
            F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(images.shape)
        )
        out = self.proj(out).view(batch, frames, channels, height, width).transpose(1, 2)
        return x + out


class Downsample(Stateful):
    """Halve height and width, and time too where `temporal`."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.temporal = temporal
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, state: State) -> Tensor:
        x = per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        past = state.get(self)
        state[self] = x[:, :, -1:].clone()  # a view would keep all of `x` in memory
        # The first frame passes unchanged. Later three frames become one; the first of the three
        # is from the chunk before.
        return x if past is None else self.time_conv(torch.cat([past, x], dim=2))


class DoublingConv2d(nn.Conv2d):
    """Nearest-neighbour doubling and the 3x3 convolution after it, as one transposed convolution.

    The doubled image repeats each pixel, so the taps that meet it are added up first: 16 products
    per pixel instead of 36, and no image of four times the size in between.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, T, H, W] -> [B, C', T, 2 H, 2 W]."""
        # In the images' order, or the convolution copies the taps once more.
        order = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
        taps = self.weight.transpose(0, 1).contiguous(memory_format=order).flip(2, 3)
        taps = F.pad(taps, (0, 1)).add_(F.pad(taps, (1, 0)))
        taps = F.pad(taps, (0, 0, 0, 1)).add_(F.pad(taps, (0, 0, 1, 0)))
        return per_frame(lambda x: F.conv_transpose2d(x, taps, self.bias, 2, 1), x)


class Upsample(Stateful):
    """Double time where `temporal`; then `resample`, which `stream` runs, doubles each frame."""

    growth = 2  # see `growth`

    def __init__(self, dim: int, out_dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), DoublingConv2d(dim, out_dim, 3))
        self.temporal = temporal
        self.time_conv = CausalConv3d(dim, dim * 2, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, state: State) -> Tensor:
        """Map x [B, C, T, H, W] -> [B, C, 2 T, H, W]; the first frame stays one."""
        if self.time_conv is None or self not in state:
            # The first latent frame is one frame of video; the next one does not see it.
            state[self] = x.new_empty(0)
            return x
        batch, channels, frames, height, width = x.shape
        both = self.time_conv(x, state).permute(0, 2, 3, 4, 1).unflatten(-1, (2, channels))
        return (
            both.permute(0, 1, 4, 2, 3, 5)
            .reshape(batch, frames * 2, height, width, channels)
            .permute(0, 4, 1, 2, 3)
        )


def per_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply an image layer to every frame of x [B, C, T, H, W]; only views in channels-last."""
    batch, channels, frames = x.shape[:3]
    images = (
        x.permute(0, 2, 3, 4, 1).reshape(batch * frames, *x.shape[3:], channels).permute(0, 3, 1, 2)
    )
    out = layer(images)
    return (
        out.permute(0, 2, 3, 1)
        .reshape(batch, frames, *out.shape[2:], out.shape[1])
        .permute(0, 4, 1, 2, 3)
    )


def flat(*layers: nn.Module) -> Iterator[nn.Module]:
    """Yield layers one by one: a sequence's own layers in its place."""
    for layer in layers:
        yield from flat(*layer) if isinstance(layer, nn.Sequential) else (layer,)


def run(layers: Iterable[nn.Module], x: Tensor, state: State) -> Tensor:
    """Run layers in order; those that are stateful get `state`."""
    for layer in layers:
        x = layer(x, state) if isinstance(layer, Stateful) else layer(x)
    return x


def stream(layers: list[nn.Module], x: Tensor, state: State) -> Iterator[Tensor]:
    """Run layers in order, two frames at a time unless a gradient is needed.

    Where there are more, as after a doubling of time, two of them pass all layers that follow
    before the next two do. This halves the memory of the layers with the largest images.
    """
    for index, layer in enumerate(layers):
        if isinstance(layer, Upsample):  # the next frames wait while they are small
            x, layer = layer(x, state), layer.resample
        if x.shape[2] > 2 and not _learns([x], *(layer.parameters() for layer in layers)):
            for part in x.split(2, dim=2):
                yield from stream([layer, *layers[index + 1 :]], part, state)
            return
        x = run([layer], x, state)
    yield x


def joined(parts: Iterable[Tensor]) -> Tensor:
    """Join parts of a video [B, C, T, H, W]; one part stays as it is."""
    first, *others = parts
    return torch.cat([first, *others], dim=2) if others else first


def growth(layer: nn.Module) -> int:
    """Return by how much a layer of a decoder enlarges height and width."""
    return int(getattr(layer, "growth", 1))


def receptive_margin(layer: nn.Module, margin: int = 0) -> int:
    """Return how many pixels around a box a decoder's layer reads, to get box and margin right.

    Attention, which sees everything, is no such layer. A layer's convolutions count as a sequence;
    a residual block's 1x1 shortcut reaches nowhere.

    Args:
        layer: the layer.
        margin: in pixels of the layer's output; the result is in pixels of its input.
    """
    margin += sum(
        part.kernel_size[-1] // 2
        for part in layer.modules()
        if isinstance(part, nn.Conv2d | nn.Conv3d)
    )
    # An upsampling's convolution sees the doubled image: half as many pixels, rounded up, of the
    # small one.
    return -(-margin // growth(layer))


def _middle(dim: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))


def _head(dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(ChannelNorm(dim), nn.SiLU(inplace=True), CausalConv3d(dim, out_dim, 3))


def _blocks(in_dim: int, out_dim: int, count: int) -> list[nn.Module]:
    return [ResidualBlock(out_dim if number else in_dim, out_dim) for number in range(count)]


class Encoder(nn.Module):
    """Video [B, 3, T, H, W] -> [B, 2 z, t, h, w], which `conv1` turns into mean and variance."""

    last_of_stage: type[nn.Module] = Downsample

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims = [config.dim * mult for mult in (1, *config.dim_mult)]
        self.conv1 = CausalConv3d(3 * config.patch**2, dims[0], 3)
        stages: list[nn.Module] = []
        for level, (in_dim, out_dim) in enumerate(itertools.pairwise(dims)):
            layers = _blocks(in_dim, out_dim, config.num_res_blocks)
            if level < len(config.dim_mult) - 1:
                layers.append(Downsample(out_dim, config.temperal_downsample[level]))
            stages += self.stage(layers, in_dim, out_dim)
        self.downsamples = nn.Sequential(*stages)
        self.middle = _middle(dims[-1])
        self.head = _head(dims[-1], config.z_dim * 2)

    def stage(self, layers: list[nn.Module], in_dim: int, out_dim: int) -> list[nn.Module]:
        """Return the layers of one size of image as they stand in `downsamples`."""
        return layers

    def sections(self) -> list[list[nn.Module]]:
        """Return all layers in order, cut after each stage: time halves at the end of one."""
        sections: list[list[nn.Module]] = [[]]
        for layer in flat(self.conv1, self.downsamples, self.middle, self.head):
            sections[-1].append(layer)
            if isinstance(layer, self.last_of_stage):
                sections.append([])
        return sections

    def forward(self, x: Tensor, state: State) -> Tensor:
        for layers in self.sections():
            x = joined(stream(layers, x, state))
        return x


class Decoder(nn.Module):
    """Latent [B, z, t, h, w] -> video [B, 3, T, H, W]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width, *dims = (
            config.dec_dim * mult for mult in (config.dim_mult[-1], *reversed(config.dim_mult))
        )
        self.conv1 = CausalConv3d(config.z_dim, width, 3)
        self.middle = _middle(width)
        temporal = tuple(reversed(config.temperal_downsample))
        stages: list[nn.Module] = []
        for level, out_dim in enumerate(dims):
            layers = _blocks(width, out_dim, config.num_res_blocks + 1)
            in_dim, width = width, out_dim
            if level < len(dims) - 1:
                width = self.enlarged(out_dim)
                layers.append(Upsample(out_dim, width, temporal[level]))
            stages += self.stage(layers, in_dim, width)
        self.upsamples = nn.Sequential(*stages)
        self.head = _head(width, 3 * config.patch**2)

    def enlarged(self, dim: int) -> int:
        """Return the width after a doubling of height and width."""
        return dim // 2

    def stage(self, layers: list[nn.Module], in_dim: int, out_dim: int) -> list[nn.Module]:
        """Return the layers of one size of image as they stand in `upsamples`."""
        return layers

    def layers(self) -> list[nn.Module]:
        """Return all layers in the order in which `stream` runs them."""
        return list(flat(self.conv1, self.middle, self.upsamples, self.head))

    def forward(self, x: Tensor, state: State) -> Tensor:
        return joined(stream(self.layers(), x, state))


class WanVAE(nn.Module):
    """The VAE. Latents are normalised by channel with the config's mean and standard deviation."""

    encoder_class, decoder_class = Encoder, Decoder

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = self.encoder_class(config)
        self.conv1 = CausalConv3d(config.z_dim * 2, config.z_dim * 2, 1)
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, 1)
        self.decoder = self.decoder_class(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv2.weight.dtype

    def encode(self, video: Tensor, groups: int = 1) -> Tensor:
        """Return the normalised mean latent of a video.

        Args:
            video: [B, 3, T, H, W] in -1..1; T = 4n + 1, H and W multiples of the stride.
            groups: how many groups of four frames to take at once; the result is the same.

        Returns:
            [B, z, t, h, w] float32.

        Raises:
            ValueError: for another number of frames or size.
        """
        return self._normalised(self.moments(video, groups)[0])

    def encode_parts(self, parts: Iterable[Tensor]) -> Tensor:
        """Encode a video as it comes: its first frame, then groups of four; see `encode`."""
        return self._normalised(self._moments(parts)[0])

    def _normalised(self, mean: Tensor) -> Tensor:
        shift, scale = self._statistics(mean)
        return (mean - shift) / scale

    def moments(self, video: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
        """Return mean and log variance, [B, z, t, h, w] each, not normalised; for training."""
        stride, space = self.config.temporal_stride, self.config.spatial_stride
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"video is {list(video.shape)}, not [B, 3, T, H, W]")
        frames, height, width = video.shape[2:]
        if frames < 1 or (frames - 1) % stride or height % space or width % space:
            raise ValueError(
                f"a video of {frames} frames, {width}*{height}: frames must be {stride}n+1, sides"
                f" multiples of {space}"
            )
        return self._moments(
            [video[:, :, :1], *video[:, :, 1:].split(stride * groups, dim=2)]
            if frames > 1
            else [video]
        )

    def _moments(self, parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        state: State = {}
        like = self.conv2.weight  # parts may be on another device
        codes = [self.encoder(_channels_last(part.to(like)), state) for part in parts]
        mean, log_variance = self.conv1(joined(codes), state).chunk(2, dim=1)
        return mean, log_variance

    def decode(self, latent: Tensor, groups: int = 1) -> Tensor:
        """Decode a normalised latent [B, z, t, h, w] -> video [B, 3, T, H, W], unclamped."""
        return joined(self.decode_frames(latent, groups))

    def decode_frames(self, latent: Tensor, groups: int = 1) -> Iterator[Tensor]:
        """Yield decoded frames, unclamped: [B, 3, 1, H, W], then [B, 3, 4 * groups, H, W]."""
        state: State = {}
        for chunk in self.chunks(latent, groups):
            yield self.decoder(chunk, state)

    def chunks(self, latent: Tensor, groups: int = 1) -> Iterator[Tensor]:
        """Yield the decoder's input, denormalised: [B, z, 1, h, w], then [B, z, groups, h, w]."""
        if latent.ndim != 5 or latent.shape[1] != self.config.z_dim or not latent.shape[2]:
            raise ValueError(
                f"latent is {list(latent.shape)}, not [B, {self.config.z_dim}, t, h, w]"
            )
        shift, scale = self._statistics(latent)
        chunks = (
            [latent[:, :, :1], *latent[:, :, 1:].split(groups, dim=2)]
            if latent.shape[2] > 1
            else [latent]
        )
        for chunk in chunks:
            yield self.conv2(_channels_last((chunk * scale + shift).to(self.dtype)), {})

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        def channel(values: tuple[float, ...]) -> Tensor:
            return torch.tensor(values, device=like.device, dtype=torch.float32).view(
                1, -1, 1, 1, 1
            )

        return channel(self.config.latent_mean), channel(self.config.latent_std)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)
