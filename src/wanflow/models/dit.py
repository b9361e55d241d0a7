"""Define the diffusion transformer of Wan2.2 (one expert): latent, time, text -> velocity.

Shapes: B batch, C latent channels, T/H/W latent frames, rows, columns; L = T * H/2 * W/2 tokens,
    ordered frame, row, column; d model width, N heads of size K (d = N K), S text tokens, D text
    width; U distinct timesteps (1 unless they differ per token).

Precision: matmuls run in the dtype of their weight. Everything else is float32, by a written cast:
    the residual stream, the norms, modulation, rotary embedding, the time embedding and the head.
    There is no autocast.

Sampling, parallelism and offloading attach from outside: `attend` is a slot on every attention,
`trunk` replaces the loop over the blocks, and everything that depends on the request
(`Conditioning`) is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanflow.config import DiTConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# For each block, keys and values of the text: [B, S, N, K] each.
TextStates = tuple[tuple[Tensor, Tensor], ...]
Runs = tuple[tuple[int, int], ...]  # (which row, how many tokens use it), in order


@dataclass(frozen=True)
class Conditioning:
    """The inputs of blocks and head next to the tokens; sharding tokens slices them."""

    time: Tensor  # [B, U, d] float32
    modulation: Tensor  # [B, U, 6, d] float32
    index: Tensor | None  # [B, L]: which of the U rows a token uses; None where U = 1
    rope: Tensor  # [L, K/2, 2] float32
    text: TextStates
    runs: Runs = ()  # the same for each sample, in order; () where only the index says it

    def by_row(
        self, work: Callable[..., Tensor], tokens: tuple[Tensor, ...], *tables: Tensor
    ) -> Tensor:
        """Return `work` of tokens [B, n, d] and of the rows of tables [B, U, d] that they use.

        A compiler reads the rows where it uses them. Without one they would be written out for
        every token; so all tokens get the row of the longest run, and then the others their own.
        """
        if self.index is None:
            return work(*tokens, *tables)
        if torch.compiler.is_compiling() or not self.runs:
            where = self.index.unsqueeze(-1).expand(-1, -1, tables[0].shape[-1])
            return work(*tokens, *(table.gather(1, where) for table in tables))
        most, _ = max(self.runs, key=itemgetter(1))
        out = work(*tokens, *(table[:, most : most + 1] for table in tables))
        for row, part in _parts(self.runs):
            if row != most:
                own = [table[:, row : row + 1] for table in tables]
                out[:, part] = work(*(each[:, part] for each in tokens), *own)
        return out

    def part(self, tokens: slice) -> Conditioning:
        """Return the conditioning of some of the tokens."""
        if self.index is None:
            return replace(self, rope=self.rope[tokens])
        start, stop, _ = tokens.indices(self.index.shape[1])
        own = [(row, min(run.stop, stop) - max(run.start, start)) for row, run in _parts(self.runs)]
        runs = tuple((row, count) for row, count in own if count > 0)
        return replace(self, index=self.index[:, tokens], rope=self.rope[tokens], runs=runs)


def _parts(runs: Runs) -> Iterator[tuple[int, slice]]:
    """Yield the row of each run, and its tokens."""
    start = 0
    for row, count in runs:
        yield row, slice(start, start + count)
        start += count


Trunk = Callable[[Iterable["Block"], "Head", Tensor, Conditioning], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute full attention with PyTorch's own kernel: [B, L, N, K] each -> [B, L, N, K]."""
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    ).transpose(1, 2)


def rope_table(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Tensor:
    """Return cosines and sines of angles by frame, row and column: [L, K/2, 2] float32.

    Angles are float64.
    """
    pairs = head_dim // 2
    side = pairs // 3
    parts = []
    for axis, (length, count) in enumerate(zip(grid, (pairs - 2 * side, side, side), strict=True)):
        frequency = torch.pow(10000.0, -torch.arange(count, dtype=torch.float64) / count)
        angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
        shape = [1, 1, 1, count]
        shape[axis] = length
        turn = torch.stack((angle.cos(), angle.sin()), -1).float()
        parts.append(turn.view(*shape, 2).expand(*grid, count, 2))
    return torch.cat(parts, dim=-2).reshape(math.prod(grid), pairs, 2).to(device)


def rotate(x: Tensor, rope: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn the pairs (a, b) of x [B, L, N, K] by rope [L, K/2, 2], in float32; round to `dtype`.

    Both ways give the same bits. Uncompiled, only complex numbers do it in one kernel; inductor
    fuses all but complex numbers.
    """
    pairs, rope = x.float().unflatten(-1, (-1, 2)), rope.unsqueeze(1)
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        halves = (a * cos - b * sin).to(dtype), (a * sin + b * cos).to(dtype)
        return torch.stack(halves, -1).flatten(-2)
    turned = torch.view_as_complex(pairs) * torch.view_as_complex(rope)
    return torch.view_as_real(turned).flatten(-2).to(dtype)


def time_features(timestep: Tensor, size: int) -> Tensor:
    """Return cosines, then sines, of t * 10000^(-k / half): [*t.shape, size] float32, on the CPU.

    Angles are float64, since float32 changes the output.
    """
    half = size // 2
    frequency = torch.pow(10000.0, -torch.arange(half, dtype=torch.float64) / half)
    # Converted on the CPU: MPS has no float64.
    angle = timestep.detach().cpu().double().unsqueeze(-1) * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


class Linear(nn.Linear):
    """A matmul in the weight's dtype; a quantised replacement has `compute_dtype` too."""

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return F.linear(x.to(self.weight.dtype), self.weight, bias)


class Linear32(nn.Linear):
    """A matmul in float32, whatever the weight's dtype: for the time embedding and the head."""

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
    """Layer norm in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """In and out float32."""
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """RMS norm over the full width, before the split into heads.

    It computes in float32, and rounds to x's dtype before it multiplies by the weight.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), None, self.eps) * self.weight


class Attention(nn.Module):
    """Projections and norms that self- and cross-attention share."""

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
    """Attention of all tokens to each other, with rotary positions."""

    chunk = 0  # as in Block

    def forward(
        self, project: Callable[[slice], tuple[Tensor, Tensor, Tensor]], length: int
    ) -> Tensor:
        """Attend `length` tokens: [B, L, d]. `project` returns q, k, v of a range of them."""
        q, k, v = by_chunks(project, length, self.chunk)
        mixed = self.attend(q, k, v).flatten(2)
        del q, k, v  # three of the largest tensors there are
        return cast(Tensor, self.o(mixed))

    def qkv(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map x [B, L, d], rope [L, K/2, 2] -> queries, keys and values [B, L, N, K] each."""
        v = self.split(self.v(x))
        q = rotate(self.split(self.norm_q(self.q(x))), rope, v.dtype)
        k = rotate(self.split(self.norm_k(self.k(x))), rope, v.dtype)
        return q, k, v


class CrossAttention(Attention):
    """Attention of the tokens to the text."""

    def text_kv(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded text [B, S, d] -> keys and values [B, S, N, K], the same at every step."""
        v = self.split(self.v(text))
        return self.split(self.norm_k(self.k(text))).to(v.dtype), v

    def forward(self, x: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """Map x [B, L, d] -> [B, L, d]."""
        k, v = text
        q = self.split(self.norm_q(self.q(x))).to(v.dtype)
        return cast(Tensor, self.o(self.attend(q, k, v).flatten(2)))


def modulated(norm: LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return norm(x) * (1 + scale) + shift, float32: in one kernel where all tokens share a row."""
    weight = 1 + scale
    if weight.numel() == weight.shape[-1]:
        return F.layer_norm(x.float(), weight.shape[-1:], weight[0, 0], shift[0, 0], norm.eps)
    return torch.addcmul(shift, norm(x), weight)


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; time modulates first and last.

    Only self-attention mixes tokens. The rest runs in chunks of `chunk` tokens (0: all at once).
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
        """Map x [B, L, d] float32 -> [B, L, d] float32."""
        mixed = self.self_attn(
            lambda part: self.before(x[:, part], conditioning.part(part)), x.shape[1]
        )
        (y,) = by_chunks(
            lambda part: (self.after(x[:, part], mixed[:, part], conditioning.part(part), text),),
            x.shape[1],
            self.chunk,
        )
        return y

    def before(self, x: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, n, d] -> queries, keys and values of self-attention, [B, n, N, K] each."""
        shift, scale = (conditioning.modulation + self.modulation.float()).unbind(2)[:2]
        h = conditioning.by_row(partial(modulated, self.norm1), (x,), shift, scale)
        return self.self_attn.qkv(h.to(self.self_attn.q.compute_dtype), conditioning.rope)

    def after(
        self, x: Tensor, mixed: Tensor, conditioning: Conditioning, text: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Tokens [B, n, d] and what self-attention made of them -> the block's output [B, n, d]."""
        table = conditioning.modulation + self.modulation.float()
        gate1, shift2, scale2, gate2 = table.unbind(2)[2:]
        y = conditioning.by_row(torch.addcmul, (x, mixed), gate1)
        y = y + self.cross_attn(self.norm3(y), text)
        h = conditioning.by_row(partial(modulated, self.norm2), (y,), shift2, scale2)
        return conditioning.by_row(torch.addcmul, (y, self.ffn(h)), gate2)


def by_chunks(
    work: Callable[[slice], tuple[Tensor, ...]], length: int, chunk: int
) -> tuple[Tensor, ...]:
    """Return the results of `work` for `length` tokens, `chunk` at a time (0: all at once).

    Args:
        work: takes a range of tokens, and returns tensors [B, n, ...].
        length: the number of tokens.
        chunk: how many of them form a range.
    """
    if not chunk or chunk >= length:
        return work(slice(None))
    results: tuple[Tensor, ...] = ()
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        values = work(part)
        # Written into place: joining parts at the end would take as much memory again.
        results = results or tuple(
            value.new_empty(value.shape[0], length, *value.shape[2:]) for value in values
        )
        for target, value in zip(results, values, strict=True):
            target[:, part] = value
    return results


class Head(nn.Module):
    """The last norm and projection: tokens to patches."""

    chunk = 0  # as in Block

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = Linear32(config.dim, math.prod(config.patch_size) * config.out_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        """Map x [B, L, d] -> patches [B, L, 4 C] float32."""
        shift, scale = (conditioning.time + row.float() for row in self.modulation.unbind(1))

        def project(part: slice) -> tuple[Tensor]:
            own = conditioning.part(part)
            return (
                self.head(own.by_row(partial(modulated, self.norm), (x[:, part],), shift, scale)),
            )

        (patches,) = by_chunks(project, x.shape[1], self.chunk)
        return patches


def run_blocks(
    blocks: Iterable[Block], head: Head, tokens: Tensor, conditioning: Conditioning
) -> Tensor:
    """Run every block in turn, then the head: tokens [B, L, d] -> patches [B, L, 4 C]."""
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
        self,
        latent: Tensor,
        timestep: Tensor,
        text: Tensor | TextStates,
        trunk: Trunk = run_blocks,
        rope: Tensor | None = None,
        runs: Runs = (),
    ) -> Tensor:
        """Predict the velocity (noise minus data).

        Args:
            latent: [B, C, T, H, W]; H and W even.
            timestep: [B] in 0..1000, integers or floats; or [B, L], one per token; or the
                `time_features` of [B, U], on the latent's device.
            text: [B, S, D], zero past each prompt's end; or its `text_states`. Rows that are
                missing up to `text_len` count as zero; attention sees them, as in training.
            trunk: runs the blocks and the head; sequence sharding replaces it.
            rope: the `rope_table` of the latent's grid, on its device; None: made for this call.
            runs: which of U time features each token has, in order; () where U is 1.

        Returns:
            [B, C, T, H, W] float32.

        Raises:
            ValueError: for shapes that do not match.
        """
        channels, shape = self.config.in_dim, list(latent.shape)
        if latent.ndim != 5 or shape[1] != channels or any(side % 2 for side in shape[3:]):
            raise ValueError(f"latent is {shape}, not [B, {channels}, T, even H, even W]")
        if timestep.ndim not in (1, 2) and timestep.shape[2:] != (self.config.freq_dim,):
            raise ValueError(f"timestep is {list(timestep.shape)}, not [B] or [B, L]")
        rows = {len(latent), len(timestep), len(text if isinstance(text, Tensor) else text[0][0])}
        if len(rows) > 1:
            raise ValueError(
                f"latent {list(latent.shape)}, timestep {list(timestep.shape)} and text are of"
                f" {sorted(rows)} samples"
            )
        states = self.text_states(text) if isinstance(text, Tensor) else text
        grid = self.config.grid(latent.shape[2:])
        time, modulation, index = self._time(timestep, len(latent), math.prod(grid), runs)
        if rope is None:
            rope = rope_table(grid, self.config.dim // self.config.num_heads, latent.device)
        conditioning = Conditioning(time, modulation, index, rope, states, runs)
        # No name for the tokens here: it would hold 1.5 GB at 720p until the last block is done.
        return self._unpatch(
            trunk(self.blocks, self.head, self._tokens(latent), conditioning), grid
        )

    def _tokens(self, latent: Tensor) -> Tensor:
        return cast(Tensor, self.patch_embedding(latent).flatten(2).transpose(1, 2).float())

    def text_states(self, text: Tensor, blocks: Iterable[Block] | None = None) -> TextStates:
        """Return every block's keys and values of a text [B, S, D], which all steps share.

        Args:
            text: as `forward` takes it.
            blocks: replace the model's own, where these are not in memory.
        """
        missing = self.config.text_len - text.shape[1]
        if missing < 0 or text.shape[2] != self.config.text_dim:
            raise ValueError(
                f"text is {list(text.shape)}, not [B, at most {self.config.text_len},"
                f" {self.config.text_dim}]"
            )
        embedded = self.text_embedding(F.pad(text, (0, 0, 0, missing)))
        blocks = self.blocks if blocks is None else blocks
        return tuple(block.text_kv(embedded) for block in blocks)

    def _time(
        self, timestep: Tensor, batch: int, length: int, runs: Runs = ()
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        device = self.patch_embedding.weight.device
        index = None
        if runs:  # made on the device: a copy would wait for all that it computes
            filled = [torch.full((count,), row, device=device) for row, count in runs]
            index = torch.cat(filled).expand(batch, length)
        if timestep.ndim == 2:
            if timestep.shape != (batch, length):
                raise ValueError(
                    f"timestep is {list(timestep.shape)}, not [B] or [B, L] = {[batch, length]}"
                )
            # A table of the distinct timesteps and an index, instead of a row per token (9 GB at
            # 720p).
            timestep, index = torch.unique(timestep, return_inverse=True)
            timestep, index = timestep.expand(batch, -1), index.to(device)
        elif timestep.ndim == 1:
            timestep = timestep.view(-1, 1)
        if timestep.ndim == 2:
            timestep = time_features(timestep, self.config.freq_dim).to(device)
        time = self.time_embedding(timestep.contiguous())  # expanded rows round differently
        return time, self.time_projection(time).unflatten(-1, (6, -1)), index

    def _unpatch(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        frames, rows, columns = grid
        pt, ph, pw = self.config.patch_size
        x = patches.view(-1, frames, rows, columns, pt, ph, pw, self.config.out_dim)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.reshape(-1, self.config.out_dim, frames * pt, rows * ph, columns * pw)
