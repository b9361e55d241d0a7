"""Text states as the prompt cache stores them, for tests and the processes they start."""

from __future__ import annotations

import torch
from torch import Tensor

PROMPT = "a red circle moves left"


def states(
    tokens: int = 5, rows: int = 12, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """[1, rows, 8], zero from `tokens` on."""
    x = torch.randn(1, rows, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[:, tokens:] = 0
    return x
