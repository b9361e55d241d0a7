"""The diffusion transformer of Wan2.2 (one expert): noisy latent, timestep and text -> velocity.

Shapes: B batch, C latent channels, T/H/W latent frames, rows, columns; L = T * H/2 * W/2 tokens,
    ordered frame, row, column; d model width, N heads of size K (d = N K), S text tokens, D text
    width; U distinct timesteps (1 unless they differ per token).

Precision: matmuls run in the dtype of their weight. Everything else is float32 and says so: the
    residual stream, the norms, modulation, rotary embedding, the time embedding and the head. There
    is no autocast.

What sampling, parallelism and offloading need is handed in, not built in: `attend` is a slot on
every attention, `trunk` replaces the loop over the blocks, and all that depends on the request
(`Conditioning`) is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanflow.config import DiTConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
TextStates = tuple[
    tuple[Tensor, Tensor], ...
]  # for each block, keys and values of the text: [B, S, N, K] each
Modulation = tuple[Tensor, Tensor, Tensor]  # shift, scale, gate: [B, 1 or L, d] each, float32


@dataclass(frozen=True)
class Conditioning:
    """All that the blocks and the head are told beside the tokens; data, so that sharding tokens is
    slicing it.
    """

    time: Tensor  # [B, U, d] float32
    modulation: Tensor  # [B, U, 6, d] float32
    index: Tensor | None  # [B, L]: which of the U rows a token uses; None where U = 1
    rope: Tensor  # [L, K/2] complex64
    text: TextStates

    def rows(self, table: Tensor) -> Tensor:
        """Rows of a table [B, U, d] as the tokens need them: [B, 1, d], or [B, L, d] with timesteps
        per token.
        """
        if self.index is None:
            return table
        return table.gather(1, self.index.unsqueeze(-1).expand(-1, -1, table.shape[-1]))

    def part(self, tokens: slice) -> Conditioning:
        """The same for some of the tokens."""
        return replace(
            self,
            index=None if self.index is None else self.index[:, tokens],
            rope=self.rope[tokens],
        )


Trunk = Callable[[Iterable["Block"], "Head", Tensor, Conditioning], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention, [B, L, N, K] each -> [B, L, N, K]: PyTorch's own, on any device."""
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    ).transpose(1, 2)


def rope_table(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Tensor:
    """Rotations of neighbouring pairs by frame, row and column: complex64 [L, K/2]; angles are
    float64.
    """
    pairs = head_dim // 2
    side = pairs // 3
    parts = []
    for axis, (length, count) in enumerate(zip(grid, (pairs - 2 * side, side, side), strict=True)):
        frequency = torch.pow(10000.0, -torch.arange(count, dtype=torch.float64) / count)
        angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
        shape = [1, 1, 1, count]
        shape[axis] = length
        parts.append(
            torch.polar(torch.ones_like(angle), angle)
            .to(torch.complex64)
            .view(shape)
            .expand(*grid, count)
        )
    return torch.cat(parts, dim=-1).reshape(math.prod(grid), pairs).to(device)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Apply rotary embedding to x [B, L, N, K] in float32."""
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * rope.unsqueeze(1)
    return torch.view_as_real(turned).flatten(-2)


def time_features(timestep: Tensor, size: int) -> Tensor:
    """Cosines, then sines, of t * 10000^(-k / half): [*t.shape, size] float32; angles are float64
    (float32 is seen in the output).
    """
    half = size // 2
    frequency = torch.pow(10000.0, -torch.arange(half, dtype=torch.float64) / half)
    angle = timestep.detach().to("cpu", torch.float64).unsqueeze(-1) * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float().to(timestep.device)


class Linear(nn.Linear):
    """A matmul in the weight's dtype. Leaves that stand in for it (quantised, say) set
    `compute_dtype` likewise.
    """

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return F.linear(x.to(self.weight.dtype), self.weight, bias)


class Linear32(nn.Linear):
    """A matmul in float32 whatever the weight is stored in: the time embedding and the head are
    float32 islands.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(
            x.float(), self.weight.float(), None if self.bias is None else self.bias.float()
        )


class PatchEmbedding(nn.Conv3d):
    """Patches to tokens, in the weight's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return F.conv3d(x.to(self.weight.dtype), self.weight, bias, self.stride)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        """In and out float32."""
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """Over the full width, before the split into heads; float32 inside, rounded to x's dtype before
    the weight.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.q, self.k, self.v, self.o = (Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(config.dim, config.eps), RMSNorm(config.dim, config.eps)
        self.attend: Attend = sdpa

    def split(self, x: Tensor) -> Tensor:
        """[B, L, d] -> [B, L, N, K]."""
        return x.unflatten(-1, (self.heads, -1))


class SelfAttention(Attention):
    chunk = 0  # as in Block

    def forward(
        self, x: Tensor, rope: Tensor, modulated_input: Callable[[Tensor, slice], Tensor]
    ) -> Tensor:
        """x [B, L, d], rope [L, K/2] -> [B, L, d]; `ready` makes of some tokens of x, and where
        they stand, what is projected.
        """
        q, k, v = by_chunks(
            lambda part: self.qkv(modulated_input(x[:, part], part), rope[part]),
            x.shape[1],
            self.chunk,
        )
        mixed = self.attend(q, k, v).flatten(2)
        del q, k, v  # three of the largest tensors there are
        return cast(Tensor, self.o(mixed))

    def qkv(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, d], rope [L, K/2] -> queries, keys and values [B, L, N, K] each."""
        v = self.split(self.v(x))
        q = rotate(self.split(self.norm_q(self.q(x))), rope).to(v.dtype)
        k = rotate(self.split(self.norm_k(self.k(x))), rope).to(v.dtype)
        return q, k, v


class CrossAttention(Attention):
    def text_kv(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded text [B, S, d] -> keys and values [B, S, N, K]; the same at every step of a
        run.
        """
        v = self.split(self.v(text))
        return self.split(self.norm_k(self.k(text))).to(v.dtype), v

    def forward(self, x: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, L, d] -> [B, L, d]."""
        k, v = text
        q = self.split(self.norm_q(self.q(x))).to(v.dtype)
        return cast(Tensor, self.o(self.attend(q, k, v).flatten(2)))


def modulated(norm: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm * (1 + scale) + shift, float32."""
    return torch.addcmul(shift, norm, 1 + scale)


class Block(nn.Module):
    """Self-attention and feed-forward, each modulated by time, around an unmodulated
    cross-attention to the text.

    All but self-attention works token by token; `chunk` bounds how many tokens go through it at a
    time (0: all).
    """

    chunk = 0

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.self_attn = SelfAttention(config)
        self.norm3 = LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.norm2 = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            Linear(config.dim, config.ffn_dim), nn.GELU("tanh"), Linear(config.ffn_dim, config.dim)
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))

    def text_kv(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded text [B, S, d] -> what `forward` takes as `text`."""
        return self.cross_attn.text_kv(text)

    def forward(self, x: Tensor, conditioning: Conditioning, text: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, L, d] float32 -> [B, L, d] float32."""
        table = conditioning.modulation + self.modulation.float()
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(2)

        def modulated_input(x: Tensor, part: slice) -> Tensor:
            rows = conditioning.part(part).rows
            return modulated(self.norm1(x), rows(shift1), rows(scale1)).to(
                self.self_attn.q.compute_dtype
            )

        mixed = self.self_attn(x, conditioning.rope, modulated_input)

        def cross_attn_and_ffn(part: slice) -> tuple[Tensor]:
            rows = conditioning.part(part).rows
            y = torch.addcmul(x[:, part], mixed[:, part].float(), rows(gate1))
            y = y + self.cross_attn(self.norm3(y), text).float()
            h = modulated(self.norm2(y), rows(shift2), rows(scale2))
            return (torch.addcmul(y, self.ffn(h).float(), rows(gate2)),)

        return by_chunks(cross_attn_and_ffn, x.shape[1], self.chunk)[0]


def by_chunks(
    work: Callable[[slice], tuple[Tensor, ...]], length: int, chunk: int
) -> tuple[Tensor, ...]:
    """What `work` makes of a range of tokens, [B, n, ...] each, for all `length` of them, `chunk`
    at a time (0: at once).
    """
    if not chunk or chunk >= length:
        return work(slice(None))
    whole: tuple[Tensor, ...] = ()
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        values = work(part)
        # Written into place: parts that wait to be joined would take as much again.
        whole = whole or tuple(
            value.new_empty(value.shape[0], length, *value.shape[2:]) for value in values
        )
        for target, value in zip(whole, values, strict=True):
            target[:, part] = value
    return whole


class Head(nn.Module):
    chunk = 0  # as in Block

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = Linear32(config.dim, math.prod(config.patch_size) * config.out_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        """x [B, L, d] -> patches [B, L, 4 C] float32."""
        table = tuple(conditioning.time + row.float() for row in self.modulation.unbind(1))

        def patches(part: slice) -> tuple[Tensor]:
            shift, scale = (conditioning.part(part).rows(row) for row in table)
            return (self.head(modulated(self.norm(x[:, part]), shift, scale)),)

        return by_chunks(patches, x.shape[1], self.chunk)[0]


def run_blocks(
    blocks: Iterable[Block], head: Head, tokens: Tensor, conditioning: Conditioning
) -> Tensor:
    """The plain trunk: every block in turn, then the head. Tokens [B, L, d] -> patches [B, L, 4
    C].
    """
    for block, text in zip(blocks, conditioning.text, strict=True):
        tokens = block(tokens, conditioning, text)
    return cast(Tensor, head(tokens, conditioning))


class WanDiT(nn.Module):
    """One expert. Parameter names are those of the official checkpoint."""

    blocks: Iterable[Block]

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = PatchEmbedding(
            config.in_dim, dim, config.patch_size, stride=config.patch_size
        )
        self.text_embedding = nn.Sequential(
            Linear(config.text_dim, dim), nn.GELU("tanh"), Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            Linear32(config.freq_dim, dim), nn.SiLU(), Linear32(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), Linear32(dim, dim * 6))
        self.blocks = cast(
            Iterable[Block], nn.ModuleList(Block(config) for _ in range(config.num_layers))
        )
        self.head = Head(config)

    def forward(
        self, latent: Tensor, timestep: Tensor, text: Tensor | TextStates, trunk: Trunk = run_blocks
    ) -> Tensor:
        """Predict the velocity (noise minus data).

        Args:
            latent: [B, C, T, H, W]; H and W even.
            timestep: [B] in 0..1000, integers or floats; or [B, L], one per token.
            text: [B, S, D], zero past each prompt's end (rows missing up to `text_len` count as
                zero; they are attended to, as the model was trained); or what `text_states` made of
                it.
            trunk: runs the blocks and the head; replaced by sequence sharding, block streaming,
                step caches.

        Returns:
            [B, C, T, H, W] float32.

        Raises:
            ValueError: for shapes that do not fit.
        """
        if (
            latent.ndim != 5
            or latent.shape[1] != self.config.in_dim
            or latent.shape[3] % 2
            or latent.shape[4] % 2
        ):
            raise ValueError(
                f"latent is {list(latent.shape)}, not [B, {self.config.in_dim}, T, even H, even W]"
            )
        if timestep.ndim not in (1, 2):
            raise ValueError(f"timestep is {list(timestep.shape)}, not [B] or [B, L]")
        rows = {
            len(latent),
            len(timestep),
            len(text) if isinstance(text, Tensor) else len(text[0][0]),
        }
        if len(rows) > 1:
            raise ValueError(
                f"latent {list(latent.shape)}, timestep {list(timestep.shape)} and text are of"
                f" {sorted(rows)} samples"
            )
        states = self.text_states(text) if isinstance(text, Tensor) else text
        sizes = zip(latent.shape[2:], self.config.patch_size, strict=True)
        grid = cast(tuple[int, int, int], tuple(side // patch for side, patch in sizes))
        time, modulation, index = self._time(timestep, len(latent), math.prod(grid))
        head_dim = self.config.dim // self.config.num_heads
        conditioning = Conditioning(
            time, modulation, index, rope_table(grid, head_dim, latent.device), states
        )
        # The tokens are handed over and not kept: a name for them here would hold 1.5 GB at 720p
        # until the last block is done.
        return self._unpatch(
            trunk(self.blocks, self.head, self._tokens(latent), conditioning), grid
        )

    def _tokens(self, latent: Tensor) -> Tensor:
        return cast(Tensor, self.patch_embedding(latent).flatten(2).transpose(1, 2).float())

    def text_states(self, text: Tensor, blocks: Iterable[Block] | None = None) -> TextStates:
        """Every block's keys and values of a text [B, S, d]: once per prompt and expert, not once
        per step.

        `blocks` stand in for the model's own where these are not in memory.
        """
        missing = self.config.text_len - text.shape[1]
        if missing < 0 or text.shape[2] != self.config.text_dim:
            raise ValueError(
                f"text is {list(text.shape)}, not [B, at most {self.config.text_len},"
                f" {self.config.text_dim}]"
            )
        embedded = self.text_embedding(F.pad(text, (0, 0, 0, missing)))
        return tuple(
            block.text_kv(embedded) for block in (self.blocks if blocks is None else blocks)
        )

    def _time(
        self, timestep: Tensor, batch: int, length: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        index = None
        if timestep.ndim == 2:
            if timestep.shape != (batch, length):
                raise ValueError(
                    f"timestep is {list(timestep.shape)}, not [B] or [B, L] = {[batch, length]}"
                )
            # A table of the distinct timesteps and an index, instead of a row per token (9 GB at
            # 720p).
            timestep, index = torch.unique(timestep, return_inverse=True)
            timestep = timestep.expand(batch, -1)
        else:
            timestep = timestep.view(-1, 1)
        time = self.time_embedding(time_features(timestep, self.config.freq_dim))
        return time, self.time_projection(time).unflatten(-1, (6, -1)), index

    def _unpatch(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        frames, rows, columns = grid
        pt, ph, pw = self.config.patch_size
        x = patches.view(-1, frames, rows, columns, pt, ph, pw, self.config.out_dim)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.reshape(-1, self.config.out_dim, frames * pt, rows * ph, columns * pw)
