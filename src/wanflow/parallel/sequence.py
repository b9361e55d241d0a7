"""One forward on several processes, each with some of the tokens: exact, with no change to the
model.

The trunk is given a process' tokens and what belongs to them, and its patches are gathered. All but
self-attention works token by token; there the processes meet, in the `attend` slot. This is for
sampling: no gradient goes through it.

Shapes: B batch, L tokens of the whole video, l of this process, N heads of size K; C numbers of a
    patch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate

import torch
from torch import Tensor, nn

from wanflow.config import RequestError
from wanflow.models.dit import Attend, Block, Conditioning, Head, SelfAttention, Trunk, run_blocks
from wanflow.parallel.groups import ParallelContext, sizes

AttendWithLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def sharded(team: ParallelContext, trunk: Trunk = run_blocks) -> Trunk:
    """A trunk in which each process runs `trunk` on its tokens, and has the patches of all of them
    in the end.
    """
    if team.layout.sequence == 1:
        return trunk

    # A function and no object: a call of an object would keep the whole video's tokens in memory
    # until it returns.
    def shared(
        blocks: Iterable[Block], head: Head, tokens: Tensor, conditioning: Conditioning
    ) -> Tensor:
        team.tokens = tokens.shape[1]
        own = [tokens[:, team.part].clone()]
        del (
            tokens
        )  # and out of the list below: what this names stays in memory until the last block is done
        return _gathered(trunk(blocks, head, own.pop(), conditioning.part(team.part)), team)

    return shared


def _gathered(patches: Tensor, team: ParallelContext) -> Tensor:
    """[B, l, C] of each process -> [B, L, C]. What is gathered is of one length: a last token that
    is missing is sent as anything.
    """
    batch, own, width = patches.shape
    padded = patches.new_zeros(batch, max(team.lengths), width)
    padded[:, :own] = patches
    return torch.cat(
        [
            got[:, :length]
            for got, length in zip(
                team.sequence.all_gather("patches", padded), team.lengths, strict=True
            )
        ],
        1,
    )


def connect(
    model: nn.Module, team: ParallelContext, attend: Attend, with_lse: AttendWithLse | None = None
) -> None:
    """Let the self-attentions of a model reach all processes' tokens. Attention to the text stays
    as it is.

    Args:
        model: a `WanDiT`, or what has one inside; to be called with `trunk=sharded(team)` from now
            on.
        attend: the kernel that works on whole sequences.
        with_lse: the same, that says the log-sum-exp too.

    Raises:
        RequestError: for a ring without `with_lse`.
    """
    if team.layout.ring > 1:
        if with_lse is None:
            raise RequestError(
                f"ring {team.layout.ring}: this attention kernel does not say the log-sum-exp,"
                " which a ring needs",
                "  share the heads instead (ulysses), or take another kernel; `wanflow doctor`"
                " lists them",
            )
        attend = Ring(with_lse, team)
    if team.layout.ulysses > 1:
        attend = Ulysses(attend, team)
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.attend = attend


class Ulysses:
    """Attention in which each process computes some heads, for the tokens of all. [B, l, N, K] each
    -> [B, l, N, K].

    Source: DeepSpeed-Ulysses (arXiv:2309.14509). Queries, keys and values travel together. A
        process may have no head; it takes part all the same.
    """

    def __init__(self, attend: Attend, team: ParallelContext) -> None:
        self.attend, self.team = attend, team

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = self.team.ulysses
        lengths = self.team.lengths[self.team.ring.rank * group.size :][: group.size]
        _check(q, lengths[group.rank])
        shares = sizes(q.shape[2], group.size)
        mixed = self._apply(*self._to_heads(q, k, v, shares, lengths))
        return self._to_tokens(mixed, shares, lengths)

    def _apply(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Asks for heads and not for tokens: where there are none in this place of a ring, the
        # others still wait for it.
        return self.attend(q, k, v) if q.shape[2] else torch.empty_like(q)

    def _to_heads(
        self, q: Tensor, k: Tensor, v: Tensor, shares: list[int], lengths: list[int]
    ) -> list[Tensor]:
        """q, k, v [B, l, N, K] -> [B, tokens of the group, this process' heads, K] each."""
        batch, own, _, width = q.shape
        counts = [own * batch * 3 * share * width for share in shares]
        packed = q.new_empty(sum(counts))
        for chunk, share, end in zip(packed.split(counts), shares, accumulate(shares), strict=True):
            place = chunk.view(
                own, batch, 3, share, width
            )  # tokens first: what arrives is then in order, without another copy
            for index, x in enumerate((q, k, v)):
                place[:, :, index] = x[:, :, end - share : end].transpose(0, 1)
        mine, group = shares[self.team.ulysses.rank], self.team.ulysses
        got = group.all_to_all(
            "qkv", packed, counts, [length * batch * 3 * mine * width for length in lengths]
        )
        return [x.transpose(0, 1) for x in got.view(sum(lengths), batch, 3, mine, width).unbind(2)]

    def _to_tokens(self, mixed: Tensor, shares: list[int], lengths: list[int]) -> Tensor:
        """[B, tokens of the group, this process' heads, K] -> [B, l, N, K]."""
        batch, _, mine, width = mixed.shape
        group = self.team.ulysses
        own = lengths[group.rank]
        counts = [own * batch * share * width for share in shares]
        packed = mixed.transpose(0, 1).contiguous().flatten()
        got = group.all_to_all(
            "out", packed, [length * batch * mine * width for length in lengths], counts
        )
        out = mixed.new_empty(batch, own, sum(shares), width)
        for chunk, share, end in zip(got.split(counts), shares, accumulate(shares), strict=True):
            out[:, :, end - share : end] = chunk.view(own, batch, share, width).transpose(0, 1)
        return out


class Ring:
    """Attention to keys and values that go round: each process holds those of its tokens, and
    passes on what it has used.

    Source: ring attention (arXiv:2310.01889). q, k, v [B, l, N, K] -> [B, l, N, K], where l are the
        tokens of this place in the ring. What each block gives is joined exactly, by its
        log-sum-exp, in float32. The next block travels while the current one is used.
    """

    def __init__(self, with_lse: AttendWithLse, team: ParallelContext) -> None:
        self.with_lse, self.team = with_lse, team

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = self.team.ring
        lengths = sizes(self.team.tokens, group.size)
        _check(q, lengths[group.rank])
        block = torch.stack((k, v))
        batch, _, heads, width = k.shape
        joined: tuple[Tensor, Tensor] | None = None
        for step in range(group.size):
            works, arriving = [], block
            if step + 1 < group.size:
                arriving = block.new_empty(
                    2, batch, lengths[(group.rank - step - 1) % group.size], heads, width
                )
                works = group.pass_on("ring", block, arriving)
            if q.numel() and block.numel():
                joined = join(joined, *self.with_lse(q, block[0], block[1]))
            for work in works:
                work.wait()
            block = arriving
        return torch.empty_like(q) if joined is None else joined[0].to(q.dtype)


def join(before: tuple[Tensor, Tensor] | None, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to more keys, from attention to two parts of them.

    Args:
        before: output and log-sum-exp as this returns them; None at first. Overwritten.
        out: [B, L, N, K]; lse: [B, N, L] float32.

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
            f"attention was given {q.shape[1]} tokens, and this process holds {length}: call the"
            " model with trunk=sharded(team)"
        )
