"""The diffusion transformer of Wan2.2 (one expert): noisy latent, timestep and text -> velocity.

Shapes: B batch, C latent channels, T/H/W latent frames, rows, columns; L = T * H/2 * W/2 tokens, ordered frame, row, column;
    d model width, N heads of size K (d = N K), S text tokens, D text width; U distinct timesteps (1 unless they differ per token).

Precision: matmuls run in the dtype of their weight. Everything else is float32 and says so: the residual stream, the norms,
modulation, rotary embedding, the time embedding and the head. There is no autocast.

What sampling, parallelism and offloading need is handed in, not built in: `attend` is a slot on every attention, `trunk`
replaces the loop over the blocks, and all that depends on the request (`Conditioning`) is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanflow.config import DiTConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
TextStates = tuple[tuple[Tensor, Tensor], ...]  # for each block, keys and values of the text: [B, S, N, K] each
Modulation = tuple[Tensor, Tensor, Tensor]  # shift, scale, gate: [B, 1 or L, d] each, float32


@dataclass(frozen=True)
class Conditioning:
    """All that the blocks and the head are told beside the tokens; data, so that sharding tokens is slicing it."""

    time: Tensor  # [B, U, d] float32
    modulation: Tensor  # [B, U, 6, d] float32
    index: Tensor | None  # [B, L]: which of the U rows a token uses; None where U = 1
    rope: Tensor  # [L, K/2] complex64
    text: TextStates

    def rows(self, table: Tensor) -> Tensor:
        """Rows of a table [B, U, d] as the tokens need them: [B, 1, d], or [B, L, d] with timesteps per token."""
        if self.index is None:
            return table
        return table.gather(1, self.index.unsqueeze(-1).expand(-1, -1, table.shape[-1]))


Trunk = Callable[[Iterable["Block"], "Head", Tensor, Conditioning], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention, [B, L, N, K] each -> [B, L, N, K]: PyTorch's own, on any device."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def rope_table(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Tensor:
    """Rotations of neighbouring pairs by frame, row and column: complex64 [L, K/2]; angles are float64."""
    pairs = head_dim // 2
    side = pairs // 3
    parts = []
    for axis, (length, count) in enumerate(zip(grid, (pairs - 2 * side, side, side), strict=True)):
        frequency = torch.pow(10000.0, -torch.arange(count, dtype=torch.float64) / count)
        angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
        shape = [1, 1, 1, count]
        shape[axis] = length
        parts.append(torch.polar(torch.ones_like(angle), angle).to(torch.complex64).view(shape).expand(*grid, count))
    return torch.cat(parts, dim=-1).reshape(math.prod(grid), pairs).to(device)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Apply rotary embedding to x [B, L, N, K] in float32."""
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * rope.unsqueeze(1)
    return torch.view_as_real(turned).flatten(-2)


def time_features(timestep: Tensor, size: int) -> Tensor:
    """Cosines, then sines, of t * 10000^(-k / half): [*t.shape, size] float32; angles are float64 (float32 is seen in the output)."""
    half = size // 2
    frequency = torch.pow(10000.0, -torch.arange(half, dtype=torch.float64) / half)
    angle = timestep.detach().to("cpu", torch.float64).unsqueeze(-1) * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float().to(timestep.device)


class Linear(nn.Linear):
    """A matmul in the weight's dtype. Leaves that stand in for it (quantised, say) set `compute_dtype` likewise."""

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return F.linear(x.to(self.weight.dtype), self.weight, bias)


class Linear32(nn.Linear):
    """A matmul in float32 whatever the weight is stored in: the time embedding and the head are float32 islands."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


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
    """Over the full width, before the split into heads; float32 inside, rounded to x's dtype before the weight."""

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
    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """x [B, L, d], rope [L, K/2] -> [B, L, d]."""
        v = self.split(self.v(x))
        q = rotate(self.split(self.norm_q(self.q(x))), rope).to(v.dtype)
        k = rotate(self.split(self.norm_k(self.k(x))), rope).to(v.dtype)
        return cast(Tensor, self.o(self.attend(q, k, v).flatten(2)))


class CrossAttention(Attention):
    def text_kv(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded text [B, S, d] -> keys and values [B, S, N, K]; the same at every step of a run."""
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
    """Self-attention and feed-forward, each modulated by time, around an unmodulated cross-attention to the text."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.self_attn = SelfAttention(config)
        self.norm3 = LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.norm2 = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(Linear(config.dim, config.ffn_dim), nn.GELU("tanh"), Linear(config.ffn_dim, config.dim))
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))

    def text_kv(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded text [B, S, d] -> what `forward` takes as `text`."""
        return self.cross_attn.text_kv(text)

    def forward(self, x: Tensor, conditioning: Conditioning, text: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, L, d] float32 -> [B, L, d] float32."""
        table = conditioning.modulation + self.modulation.float()
        shift1, scale1, gate1, shift2, scale2, gate2 = (conditioning.rows(row) for row in table.unbind(2))
        h = modulated(self.norm1(x), shift1, scale1).to(self.self_attn.q.compute_dtype)
        x = torch.addcmul(x, self.self_attn(h, conditioning.rope).float(), gate1)
        x = x + self.cross_attn(self.norm3(x), text).float()
        h = modulated(self.norm2(x), shift2, scale2)
        return torch.addcmul(x, self.ffn(h).float(), gate2)


class Head(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = Linear32(config.dim, math.prod(config.patch_size) * config.out_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        """x [B, L, d] -> patches [B, L, 4 C] float32."""
        shift, scale = (conditioning.rows(conditioning.time + row.float()) for row in self.modulation.unbind(1))
        return cast(Tensor, self.head(modulated(self.norm(x), shift, scale)))


def run_blocks(blocks: Iterable[Block], head: Head, tokens: Tensor, conditioning: Conditioning) -> Tensor:
    """The plain trunk: every block in turn, then the head. Tokens [B, L, d] -> patches [B, L, 4 C]."""
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
        self.patch_embedding = PatchEmbedding(config.in_dim, dim, config.patch_size, stride=config.patch_size)
        self.text_embedding = nn.Sequential(Linear(config.text_dim, dim), nn.GELU("tanh"), Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear32(config.freq_dim, dim), nn.SiLU(), Linear32(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear32(dim, dim * 6))
        self.blocks = cast(Iterable[Block], nn.ModuleList(Block(config) for _ in range(config.num_layers)))
        self.head = Head(config)

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor | TextStates, trunk: Trunk = run_blocks) -> Tensor:
        """Predict the velocity (noise minus data).

        Args:
            latent: [B, C, T, H, W]; H and W even.
            timestep: [B] in 0..1000, integers or floats; or [B, L], one per token.
            text: [B, S, D], zero past each prompt's end (rows missing up to `text_len` count as zero; they are attended to, as
                the model was trained); or what `text_states` made of it.
            trunk: runs the blocks and the head; replaced by sequence sharding, block streaming, step caches.

        Returns:
            [B, C, T, H, W] float32.

        Raises:
            ValueError: for shapes that do not fit.
        """
        if latent.ndim != 5 or latent.shape[1] != self.config.in_dim or latent.shape[3] % 2 or latent.shape[4] % 2:
            raise ValueError(f"latent is {list(latent.shape)}, not [B, {self.config.in_dim}, T, even H, even W]")
        if timestep.ndim not in (1, 2):
            raise ValueError(f"timestep is {list(timestep.shape)}, not [B] or [B, L]")
        rows = {len(latent), len(timestep), len(text) if isinstance(text, Tensor) else len(text[0][0])}
        if len(rows) > 1:
            raise ValueError(f"latent {list(latent.shape)}, timestep {list(timestep.shape)} and text are of {sorted(rows)} samples")
        patches = self.patch_embedding(latent)
        grid = cast(tuple[int, int, int], tuple(patches.shape[2:]))
        tokens = patches.flatten(2).transpose(1, 2).float()
        states = self.text_states(text) if isinstance(text, Tensor) else text
        time, modulation, index = self._time(timestep, tokens)
        head_dim = self.config.dim // self.config.num_heads
        conditioning = Conditioning(time, modulation, index, rope_table(grid, head_dim, latent.device), states)
        return self._unpatch(trunk(self.blocks, self.head, tokens, conditioning), grid)

    def text_states(self, text: Tensor) -> TextStates:
        """Every block's keys and values of a text [B, S, D]: once per prompt and expert, not once per step."""
        missing = self.config.text_len - text.shape[1]
        if missing < 0 or text.shape[2] != self.config.text_dim:
            raise ValueError(f"text is {list(text.shape)}, not [B, at most {self.config.text_len}, {self.config.text_dim}]")
        embedded = self.text_embedding(F.pad(text, (0, 0, 0, missing)))
        return tuple(block.text_kv(embedded) for block in self.blocks)

    def _time(self, timestep: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        index = None
        if timestep.ndim == 2:
            if timestep.shape != tokens.shape[:2]:
                raise ValueError(f"timestep is {list(timestep.shape)}, not [B] or [B, L] = {list(tokens.shape[:2])}")
            # A table of the distinct timesteps and an index, instead of a row per token (9 GB at 720p).
            timestep, index = torch.unique(timestep, return_inverse=True)
            timestep = timestep.expand(tokens.shape[0], -1)
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
