"""Combine the two branches of classifier-free guidance, and choose how both are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

# For each block, keys and values of the text: [B, S, N, K] each, the conditional branch first.
States = Sequence[tuple[Tensor, Tensor]]
Predict = Callable[[Tensor, Tensor, States], Tensor]  # latent, time, text states -> velocity


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Return unconditional + scale * (conditional - unconditional)."""
    return unconditional + scale * (conditional - unconditional)


@dataclass(frozen=True)
class Guidance:
    """One way to compute both branches.

    select: from texts [2, S, D], conditional first, those whose states `branches` takes.
    branches: returns the conditional and the unconditional velocity.
    """

    select: Callable[[Tensor], Tensor]
    branches: Callable[[Predict, Tensor, Tensor, States], tuple[Tensor, Tensor]]


def _one_batch(
    predict: Predict, latent: Tensor, time: Tensor, states: States
) -> tuple[Tensor, Tensor]:
    latents, times = (value.expand(2, *value.shape[1:]) for value in (latent, time))
    conditional, unconditional = predict(latents, times, states).split(1)
    return conditional, unconditional


def _two_passes(
    predict: Predict, latent: Tensor, time: Tensor, states: States
) -> tuple[Tensor, Tensor]:
    conditional, unconditional = (
        predict(latent, time, tuple((k[row : row + 1], v[row : row + 1]) for k, v in states))
        for row in range(2)
    )
    return conditional, unconditional


ONE_BATCH = Guidance(lambda texts: texts, _one_batch)
TWO_PASSES = Guidance(lambda texts: texts, _two_passes)
