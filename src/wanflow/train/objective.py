"""Compute the loss of fine-tuning: rectified flow's, on clips that are drawn by the step alone."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wanflow.conditioning import TextToVideo
from wanflow.models.dit import Block, Conditioning, Head, WanDiT, run_blocks
from wanflow.train.clips import Sample
from wanflow.train.experts import sigmas
from wanflow.train.tuning import FineTune
from wanflow.train.views import Views, flow_loss


def checkpointed(
    blocks: Iterable[Block], head: Head, tokens: Tensor, conditioning: Conditioning
) -> Tensor:
    """Run the trunk with activation checkpointing: each block is computed again for gradients."""
    for block, text in zip(blocks, conditioning.text, strict=True):
        tokens = cast(Tensor, checkpoint(block, tokens, conditioning, text, use_reentrant=False))
    return cast(Tensor, head(tokens, conditioning))


@dataclass(frozen=True)
class Objective:
    """The loss of a step, in `accumulate` parts that add up to the mean over the batch.

    The clips drawn depend on the step alone, not on the parts or on the number of processes.

    range: of sigma.
    share: this process, and how many there are.
    """

    model: nn.Module
    samples: list[Sample]
    empty: Path
    range: tuple[float, float]
    settings: FineTune
    views: Views
    share: tuple[int, int] = (0, 1)

    def __call__(
        self, step: int, rng: random.Random, generator: torch.Generator
    ) -> Iterator[Tensor]:
        settings, device = self.settings, self.settings.device
        rows = torch.randint(len(self.samples), (settings.batch,), generator=generator).tolist()
        sigma = sigmas(settings.batch, *self.range, settings.shift, generator)
        silent = (torch.rand(settings.batch, generator=generator) < settings.dropout).tolist()
        seeds = torch.randint(2**62, (settings.batch,), generator=generator).tolist()
        pictured = torch.rand(settings.batch, generator=generator) < self.views.share
        model = cast(WanDiT, self.model)
        trunk = checkpointed if settings.checkpointing else run_blocks

        def noise_of(n: int, like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=torch.Generator().manual_seed(seeds[n]))

        def text_of(n: int) -> Tensor:
            sample = self.samples[rows[n]]
            return (replace(sample, text_file=self.empty) if silent[n] else sample).text(
                model.config.text_len
            )

        def seen_of(n: int) -> TextToVideo:
            encoded = self.samples[rows[n]].picture().to(device) if pictured[n] else None
            return self.views.of(encoded)

        rank, size = self.share
        own = range(rank, settings.batch, size)
        part = len(own) // settings.accumulate
        for first in range(0, len(own), part):
            chosen = own[first : first + part]
            latents = torch.stack([self.samples[rows[n]].latent() for n in chosen]).to(device)
            noise = torch.stack([noise_of(n, latents[0]) for n in chosen]).to(device)
            texts = torch.stack([text_of(n) for n in chosen]).to(device, torch.float32)
            seen, levels = [seen_of(n) for n in chosen], sigma[list(chosen)].tolist()
            loss = flow_loss(model, seen, latents, noise, levels, texts, trunk)
            yield loss * (len(chosen) / len(own))
