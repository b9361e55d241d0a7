"""Say what is denoised, and what the model sees of it at each step.

With text alone the latent begins as noise, has no further channels, and one time for all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wanflow.geometry import geometry_of
from wanflow.presets import ModelSpec
from wanflow.request import CompleteRequest
from wanflow.sampling.schedule import Step


@dataclass(frozen=True)
class TextToVideo:
    """A video of a prompt; `shape` is the latent's (C, T, H, W)."""

    shape: tuple[int, int, int, int]

    def start(self, seed: int, device: str) -> Tensor:
        """Return the noise of a seed, [1, C, T, H, W] float32, drawn on `device`."""
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(self.shape, generator=generator, device=device).unsqueeze(0)

    def time(self, step: Step) -> Tensor:
        """Return the time of a step, [B], on the CPU: the device would have to be waited for."""
        return torch.tensor([step.timestep])

    def latent(self, x: Tensor) -> Tensor:
        """Return what the model sees of a sample, [B, C, T, H, W]."""
        return x


def conditioning_of(spec: ModelSpec, request: CompleteRequest) -> TextToVideo:
    """Return what is denoised for a request."""
    return TextToVideo(geometry_of(spec).latent_shape(request.size, request.frame_num))
