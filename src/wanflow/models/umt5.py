"""Define the UMT5 encoder: token ids -> text states.

Shapes: B batch, S tokens, D width, N heads, K head size.

T5's habits: RMS norms without centring, no biases, scores not divided by sqrt(K), a learnt bias per
bucket of relative position. UMT5's own: every layer has its own table of biases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanflow.config import TextConfig


class T5Norm(nn.Module):
    """RMS norm in float32, without a bias."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """float32 inside, rounded to the weight's dtype before the weight."""
        return (
            F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(self.weight.dtype)
            * self.weight
        )


class T5Attention(nn.Module):
    """Self-attention without scaling of the scores."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.q, self.k, self.v = (
            nn.Linear(config.dim, config.dim_attn, bias=False) for _ in range(3)
        )
        self.o = nn.Linear(config.dim_attn, config.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Map x [B, S, D], bias [B, N, S, S] -> [B, S, D]."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        out: Tensor = self.o(
            F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
            .transpose(1, 2)
            .flatten(2)
        )
        return out


class T5FeedForward(nn.Module):
    """Gated feed-forward: gelu(gate) * fc1, then fc2."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.Linear(config.dim, config.dim_ffn, bias=False), nn.GELU("tanh")
        )
        self.fc1 = nn.Linear(config.dim, config.dim_ffn, bias=False)
        self.fc2 = nn.Linear(config.dim_ffn, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(x) * self.gate(x))
        return out


class RelativePositions(nn.Module):
    """A bias of each head for each bucket of distance."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.num_buckets, config.num_heads)

    def forward(self, buckets: Tensor) -> Tensor:
        """Map buckets [S, S] -> bias [1, N, S, S]."""
        out: Tensor = self.embedding(buckets).permute(2, 0, 1).unsqueeze(0)
        return out


class T5Block(nn.Module):
    """Self-attention and feed-forward, each with its norm and residual."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.norm1 = T5Norm(config.dim, config.eps)
        self.attn = T5Attention(config)
        self.norm2 = T5Norm(config.dim, config.eps)
        self.ffn = T5FeedForward(config)
        self.pos_embedding = RelativePositions(config)

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor) -> Tensor:
        """Map x [B, S, D], mask [B, 1, 1, S] True at tokens -> [B, S, D]."""
        bias = self.pos_embedding(buckets)
        x = x + self.attn(self.norm1(x), bias.masked_fill(~mask, torch.finfo(bias.dtype).min))
        out: Tensor = x + self.ffn(self.norm2(x))
        return out


def position_buckets(relative: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Return the bucket of each relative position (key index minus query index).

    Half of the buckets for each direction: exact near zero, logarithmic beyond.

    Source: the T5 paper's bidirectional scheme; checked against `buckets.*` of the reference
        numbers.
    """
    half = buckets // 2
    exact = half // 2
    away = relative.abs()
    far = (
        exact
        + (
            torch.log(away.float().clamp_min(1) / exact)
            / math.log(max_distance / exact)
            * (half - exact)
        ).long()
    )
    return torch.where(relative > 0, half, 0) + torch.where(
        away < exact, away, far.clamp_max(half - 1)
    )


TextTrunk = Callable[[Iterable[T5Block], Tensor, Tensor, Tensor], Tensor]


def run_blocks(blocks: Iterable[T5Block], x: Tensor, buckets: Tensor, keys: Tensor) -> Tensor:
    """Run every block in turn: x [B, S, D], buckets [S, S], keys [B, 1, 1, S] -> [B, S, D].

    `keys` is True at tokens.
    """
    for block in blocks:
        x = block(x, buckets, keys)
    return x


class UMT5Encoder(nn.Module):
    """The encoder, with the parameter names of the official checkpoint."""

    blocks: Iterable[T5Block]

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab, config.dim)
        self.blocks = cast(
            Iterable[T5Block], nn.ModuleList(T5Block(config) for _ in range(config.num_layers))
        )
        self.norm = T5Norm(config.dim, config.eps)

    def forward(self, ids: Tensor, mask: Tensor, trunk: TextTrunk | None = None) -> Tensor:
        """Encode.

        Args:
            ids: [B, S] token ids.
            mask: [B, S], non-zero at tokens and 0 at padding, which attention skips.
            trunk: runs the blocks, where they are not in memory.

        Returns:
            [B, S, D] in the weights' dtype; the caller zeroes the rows at padding.
        """
        place = torch.arange(ids.shape[1], device=ids.device)
        buckets = position_buckets(
            place[None, :] - place[:, None], self.config.num_buckets, self.config.max_dist
        )
        keys = mask.bool()[:, None, None, :]
        out: Tensor = self.norm(
            (trunk or run_blocks)(self.blocks, self.token_embedding(ids), buckets, keys)
        )
        return out
