"""Guidance on two groups of processes: each computes one branch, and both have both."""

from __future__ import annotations

from torch import Tensor

from wanflow.parallel.groups import ParallelContext


def local_branch(team: ParallelContext, pair: Tensor) -> Tensor:
    """Of texts [2, S, D], the conditional one first, those whose branch this process computes: [1,
    S, D], or both where it is not split.
    """
    if team.layout.cfg == 1:
        return pair
    return pair[team.cfg.rank : team.cfg.rank + 1]


def gather_branches(team: ParallelContext, velocity: Tensor) -> tuple[Tensor, Tensor]:
    """The conditional and the unconditional velocity, from this group's own: the same bits as two
    passes on one group.

    Every process must call it. Only for layouts with cfg 2; each [B, C, T, H, W].
    """
    conditional, unconditional = team.cfg.all_gather("velocity", velocity)
    return conditional, unconditional
