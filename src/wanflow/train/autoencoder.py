"""Train the VAE of the miniature: images first, then clips.

The latent is mean + fixed noise, with a small pull of the mean towards zero: every channel then
carries about the same signal-to-noise ratio, and the decoder tolerates errors of the size that a
diffusion model makes.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanflow.models.vae import CausalConv3d, WanVAE
from wanflow.train import toy

NOISE = 0.15
PULL = 5e-4


@torch.no_grad()
def initialise(vae: WanVAE) -> None:
    """Start as an image autoencoder: only the newest frame's taps are non-zero."""
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv3d):
            newest = torch.zeros_like(module.weight)
            if name.endswith("time_conv"):
                channels = torch.arange(module.out_channels)
                newest[channels, channels % module.in_channels, -1] = 1
            else:
                nn.init.kaiming_normal_(newest[:, :, -1], nonlinearity="linear")
            module.weight.copy_(newest)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        if isinstance(module, nn.Conv2d | nn.Conv3d) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if (
            isinstance(module, nn.Sequential)
            and len(module) == 7
            and isinstance(module[6], CausalConv3d)
        ):
            module[6].weight.mul_(0.3)  # residual branches start small


def clips(
    rng: random.Random, count: int, frames: int, side: int, crop: int
) -> tuple[Tensor, Tensor]:
    """Return random clips [count, 3, frames, crop, crop] and the weight of each pixel's error.

    The weight is larger at and around the object. A crop smaller than `side` is cut around the
    object, where there is something to learn.
    """
    videos, covers = [], []
    for _ in range(count):
        scene = toy.sample_scene(rng)
        course = toy.draw(scene, rng, 17)
        start = rng.randrange(17 - frames + 1)
        course = course[start : start + frames]
        middle = course[frames // 2, :2].tolist()
        top, left = (
            min(max(round(at * side) - crop // 2 + rng.randint(-8, 8), 0), side - crop)
            for at in reversed(middle)
        )
        cover = toy.coverage(scene.shape, course, side)[:, top : top + crop, left : left + crop]
        if rng.random() < 0.6:
            colour, background = toy.COLOURS[scene.colour], toy.BACKGROUNDS[scene.background]
        else:
            colour, background = (
                (rng.randrange(256), rng.randrange(256), rng.randrange(256)) for _ in range(2)
            )
        videos.append(toy.paint(cover, colour, background))
        covers.append(cover)
    cover = torch.stack(covers)
    near = F.max_pool2d(cover, 7, stride=1, padding=3)
    # 1 where inside and outside are both near
    edge = near + F.max_pool2d(-cover, 7, stride=1, padding=3)
    return torch.stack(videos), (1 + 2 * near + 4 * edge).unsqueeze(1)


def curriculum(step: int, steps: int) -> tuple[int, int, int]:
    """Return (clips, frames, crop) of a step: cropped images, cropped short clips, full clips."""
    if step < 0.505 * steps:
        return 48, 1, 32
    return (12, 9, 32) if step < 0.876 * steps else (4, 17, 64)


def loss(vae: WanVAE, videos: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Return the weighted L1 of a clip decoded from a noisy latent, plus the pull; a scalar."""
    groups = max(1, (videos.shape[2] - 1) // vae.config.temporal_stride)
    mean, _ = vae.moments(videos, groups)
    noisy = mean + NOISE * torch.randn(mean.shape, generator=generator)
    decoded = vae.decode(noisy, groups).float()
    error = ((decoded - videos).abs() * weight).sum() / (weight.sum() * 3)
    return error + PULL * mean.float().square().mean()


@torch.no_grad()
def statistics(
    vae: WanVAE, rng: random.Random, side: int, count: int = 96
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each latent channel, which the config stores."""
    videos = torch.stack([toy.render(toy.sample_scene(rng), rng, 17, side) for _ in range(count)])
    latents = torch.cat([vae.moments(part, 4)[0] for part in videos.split(16)])
    means = latents.float().transpose(0, 1).flatten(1)
    return tuple(means.mean(1).tolist()), tuple(means.std(1).tolist())
