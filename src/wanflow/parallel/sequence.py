"""One forward on several ranks, each with some of the tokens: exact, without a change to the model.

The trunk gets a rank's tokens and the data that belongs to them, and its patches are gathered. All
but self-attention computes token by token; there the ranks communicate, in the `attend` slot. This
is for sampling: no gradient goes through it.

Shapes: B batch, L tokens of the video, l of this rank, N heads of size K; C numbers of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

import torch
from torch import Tensor, nn

from wanflow.config import RequestError
from wanflow.models.dit import Attend, Block, Conditioning, Head, SelfAttention, Trunk, run_blocks
from wanflow.parallel.groups import ParallelContext, sizes

AttendWithLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def sharded(ctx: ParallelContext, trunk: Trunk = run_blocks) -> Trunk:
    """Return a trunk in which each rank runs `trunk` on its tokens and gets all patches."""
    if ctx.layout.size == 1:
        return trunk
    whole = ctx.layout.sequence == 1

    # A function and no object: a call of an object would hold the tokens of the video in memory
    # until it returns.
    def run(
        blocks: Iterable[Block], head: Head, tokens: Tensor, conditioning: Conditioning
    ) -> Tensor:
        blocks, ctx.tokens = _marked(blocks, ctx), tokens.shape[1]
        if whole:
            return trunk(blocks, head, tokens, conditioning)
        own = [tokens[:, ctx.shard].clone()]
        # Out of the list below, too: a name keeps its tensor in memory until the last block.
        del tokens
        return _gather(trunk(blocks, head, own.pop(), conditioning.part(ctx.shard)), ctx)

    return run


def _marked(blocks: Iterable[Block], ctx: ParallelContext) -> Iterator[Block]:
    """Yield the blocks, and mark when the device comes to each."""
    for block in blocks:
        ctx.stats.mark()
        yield block


def _gather(patches: Tensor, ctx: ParallelContext) -> Tensor:
    """Gather [B, l, C] of each rank to [B, L, C].

    all_gather needs equal lengths, so shorter ranks pad; the padding is dropped afterwards.
    """
    batch, own, width = patches.shape
    padded = patches.new_zeros(batch, max(ctx.lengths), width)
    padded[:, :own] = patches
    gathered = ctx.sequence.all_gather("patches", padded)
    shards = [shard[:, :own] for shard, own in zip(gathered, ctx.lengths, strict=True)]
    return torch.cat(shards, 1)


def connect(
    model: nn.Module, ctx: ParallelContext, attend: Attend, with_lse: AttendWithLse | None = None
) -> None:
    """Let the self-attentions of a model reach all ranks' tokens; cross-attention stays as it is.

    Args:
        model: a `WanDiT`, or a module with one inside; call it with `trunk=sharded(ctx)`.
        ctx: this rank.
        attend: the kernel for complete sequences.
        with_lse: the same, returning the log-sum-exp too.

    Raises:
        RequestError: for a ring without `with_lse`.
    """
    if ctx.layout.ring > 1:
        if with_lse is None:
            raise RequestError(
                f"ring {ctx.layout.ring}: ring attention needs the log-sum-exp, which this kernel"
                " does not return; use --attention flash or --ring_size 1"
            )
        attend = Ring(with_lse, ctx)
    if ctx.layout.ulysses > 1:
        attend = Ulysses(attend, ctx)
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.attend = attend


class Ulysses:
    """Attention in which each rank computes some heads for all tokens: [B, l, N, K] on each.

    Queries, keys and values travel together. A rank may have no head; it takes part all the same.

    Source: DeepSpeed-Ulysses (arXiv:2309.14509).
    """

    def __init__(self, attend: Attend, ctx: ParallelContext) -> None:
        self.attend, self.ctx = attend, ctx

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = self.ctx.ulysses
        lengths = self.ctx.lengths[self.ctx.ring.rank * group.size :][: group.size]
        _check(q, lengths[group.rank])
        heads = sizes(q.shape[2], group.size)
        attended = self._attend(*self._to_heads(q, k, v, heads, lengths))
        return self._to_tokens(attended, heads, lengths)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Asks for heads and not for tokens: without tokens here, the rest of the ring still waits.
        return self.attend(q, k, v) if q.shape[2] else torch.empty_like(q)

    def _to_heads(
        self, q: Tensor, k: Tensor, v: Tensor, heads: list[int], lengths: list[int]
    ) -> list[Tensor]:
        """Trade q, k, v [B, l, N, K] for [B, tokens of the group, heads of this rank, K]."""
        batch, own, _, width = q.shape
        counts = [own * batch * 3 * count * width for count in heads]
        packed = q.new_empty(sum(counts))
        for chunk, count, end in zip(packed.split(counts), heads, accumulate(heads), strict=True):
            # Tokens come first, so what arrives is in order without another copy.
            target = chunk.view(own, batch, 3, count, width)
            for index, x in enumerate((q, k, v)):
                target[:, :, index] = x[:, :, end - count : end].transpose(0, 1)
        group = self.ctx.ulysses
        local = heads[group.rank]
        received = [length * batch * 3 * local * width for length in lengths]
        arrived = group.all_to_all("qkv", packed, counts, received)
        stacked = arrived.view(sum(lengths), batch, 3, local, width)
        return [x.transpose(0, 1) for x in stacked.unbind(2)]

    def _to_tokens(self, attended: Tensor, heads: list[int], lengths: list[int]) -> Tensor:
        """Trade [B, tokens of the group, heads of this rank, K] for [B, l, N, K]."""
        batch, _, local, width = attended.shape
        group = self.ctx.ulysses
        own = lengths[group.rank]
        counts = [own * batch * count * width for count in heads]
        packed = attended.transpose(0, 1).contiguous().flatten()
        sent = [length * batch * local * width for length in lengths]
        arrived = group.all_to_all("out", packed, sent, counts)
        out = attended.new_empty(batch, own, sum(heads), width)
        for chunk, count, end in zip(arrived.split(counts), heads, accumulate(heads), strict=True):
            out[:, :, end - count : end] = chunk.view(own, batch, count, width).transpose(0, 1)
        return out


class Ring:
    """Attention in which keys and values go round: q, k, v [B, l, N, K] of this place in the ring.

    Each rank passes on the block that it has used. The outputs of the blocks are joined exactly, by
    their log-sum-exp, in float32. The next block travels while the current one is used.

    Source: ring attention (arXiv:2310.01889).
    """

    def __init__(self, with_lse: AttendWithLse, ctx: ParallelContext) -> None:
        self.with_lse, self.ctx = with_lse, ctx

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = self.ctx.ring
        lengths = sizes(self.ctx.tokens, group.size)
        _check(q, lengths[group.rank])
        block = torch.stack((k, v))
        batch, _, heads, width = k.shape
        joined: tuple[Tensor, Tensor] | None = None
        for step in range(group.size):
            works, arriving = [], block
            if step + 1 < group.size:
                length = lengths[(group.rank - step - 1) % group.size]
                arriving = block.new_empty(2, batch, length, heads, width)
                works = group.shift("ring", block, arriving)
            if q.numel() and block.numel():
                joined = join(joined, *self.with_lse(q, block[0], block[1]))
            for work in works:
                work.wait()
            block = arriving
        return torch.empty_like(q) if joined is None else joined[0].to(q.dtype)


def join(before: tuple[Tensor, Tensor] | None, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention to two parts of the keys into attention to both.

    Args:
        before: output and log-sum-exp as this returns them; None at first. Overwritten.
        out: [B, L, N, K].
        lse: [B, N, L] float32.

    Returns:
        Output [B, L, N, K] and log-sum-exp [B, L, N, 1], float32.
    """
    out, lse = out.float(), lse.transpose(1, 2).unsqueeze(-1)
    if before is None:
        return out, lse
    return before[0].lerp_(out, torch.sigmoid(lse - before[1])), torch.logaddexp(before[1], lse)


def _check(q: Tensor, length: int) -> None:
    if q.shape[1] != length:
        raise ValueError(
            f"attention got {q.shape[1]} tokens, expected this rank's {length}: call the model with"
            " trunk=sharded(ctx)"
        )
