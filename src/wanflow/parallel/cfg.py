"""Compute each branch of guidance on one half of the ranks."""

from __future__ import annotations

from torch import Tensor

from wanflow.parallel.groups import ParallelContext
from wanflow.sampling.guidance import Guidance, Predict, States


def split_guidance(ctx: ParallelContext) -> Guidance | None:
    """Return guidance whose branches go to two groups of ranks; None for a layout of one group.

    Every rank must use it. Velocities have the same bits as two passes on one group.
    """
    if ctx.layout.cfg == 1:
        return None

    def select(texts: Tensor) -> Tensor:
        return texts[ctx.cfg.rank : ctx.cfg.rank + 1]

    def branches(
        predict: Predict, latent: Tensor, time: Tensor, states: States
    ) -> tuple[Tensor, Tensor]:
        conditional, unconditional = ctx.cfg.all_gather("velocity", predict(latent, time, states))
        return conditional, unconditional

    return Guidance(select, branches)
