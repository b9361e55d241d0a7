"""A tiny expert and what it makes of one input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wanflow.config import DiTConfig
from wanflow.models.dit import WanDiT

TINY = DiTConfig(
    dim=32, ffn_dim=64, num_heads=2, num_layers=2, text_dim=24, text_len=8, freq_dim=16
)


def random_expert() -> WanDiT:
    """Return an expert with all parameters random, also those that start at one or zero."""
    torch.manual_seed(0)
    model = WanDiT(TINY).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.1)
    return model


def run(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latent, text = (
        torch.randn(1, 16, 2, 4, 4, generator=generator),
        torch.randn(1, 5, 24, generator=generator),
    )
    return model(latent, torch.tensor([500.0]), text)
