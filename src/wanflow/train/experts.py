"""Train the two experts of the miniature: rectified flow, each on its own range of sigma."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanflow.config import TRAIN_STEPS
from wanflow.models.dit import WanDiT
from wanflow.models.tokenizer import Tokenizer
from wanflow.models.umt5 import UMT5Encoder
from wanflow.models.vae import WanVAE
from wanflow.presets import Expert, ModelSpec
from wanflow.screen import Screen
from wanflow.train import toy

WORDINGS = 3  # captions of each clip; the first is the plain form


@dataclass(frozen=True)
class Cache:
    """Clips as the experts see them."""

    latents: Tensor  # [clips, z, t, h, w] bfloat16, normalised
    texts: Tensor  # [clips, WORDINGS, S, D] bfloat16, zero past each caption's end
    empty: Tensor  # [S, D] bfloat16: the text of an empty prompt
    # [clips, channels, t, h, w] bfloat16: what the model sees beside the latent
    given: Tensor | None = None


@torch.no_grad()
def encode_texts(encoder: UMT5Encoder, tokenizer: Tokenizer, prompts: list[str]) -> Tensor:
    """Return text states [B, S, D] as the experts take them: zero past each prompt's end."""
    ids, mask = tokenizer(prompts)
    return encoder(ids, mask) * mask.unsqueeze(-1).to(encoder.norm.weight.dtype)


@torch.no_grad()
def precompute(
    vae: WanVAE,
    encoder: UMT5Encoder,
    tokenizer: Tokenizer,
    seed: int,
    count: int,
    frames: int,
    side: int,
    screen: Screen,
) -> Cache:
    """Render, caption and encode `count` clips that training may see; clip n is of (seed, n)."""
    latents, texts = [], []
    for start in range(0, count, 16):
        videos, captions = [], []
        for clip in range(start, min(start + 16, count)):
            rng = random.Random(f"{seed}/clip/{clip}")
            scene = toy.sample_scene(rng)
            videos.append(toy.render(scene, rng, frames, side))
            captions += [
                toy.caption(scene),
                *(toy.caption(scene, rng) for _ in range(WORDINGS - 1)),
            ]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latents.append(vae.encode(torch.stack(videos), groups=4).bfloat16().contiguous())
        texts.append(
            encode_texts(encoder, tokenizer, captions).bfloat16().unflatten(0, (-1, WORDINGS))
        )
        screen.progress("encoding", min(start + 16, count), count, "clip")
    return Cache(
        torch.cat(latents),
        torch.cat(texts).contiguous(),
        encode_texts(encoder, tokenizer, [""])[0].bfloat16(),
    )


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by two matmuls, [B, L, N, K] each -> [B, L, N, K].

    On under a hundred tokens this trains faster than fused kernels.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v).transpose(1, 2)


def attend_plainly(model: WanDiT) -> WanDiT:
    """Give a model the attention that trains fastest on few tokens."""
    for module in model.modules():
        if hasattr(module, "attend"):
            cast(Any, module).attend = plain_attention
    return model


@torch.no_grad()
def initialise(model: WanDiT) -> None:
    """Start with quiet blocks, a head that gives zero, and time that modulates nothing yet."""
    layers = model.config.num_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            quieter = (2 * layers) ** -0.5 if name.endswith((".o", "ffn.2")) else 1.0
            nn.init.normal_(module.weight, std=module.in_features**-0.5 * quieter)
            nn.init.zeros_(module.bias)
    attend_plainly(model)
    nn.init.normal_(model.patch_embedding.weight, std=(model.config.in_dim * 4) ** -0.5)
    nn.init.zeros_(model.head.head.weight)
    model.get_parameter("time_projection.1.weight").mul_(0.02)
    for block in model.blocks:
        block.modulation[:, [2, 5]] = 1.0  # the gates


def sigma_range(spec: ModelSpec, which: Expert) -> tuple[float, float]:
    """Return the lowest and the highest sigma that an expert denoises."""
    bounds = [1.0, *(expert.from_timestep / TRAIN_STEPS for expert in spec.experts)]
    place = spec.expert_names.index(which)
    return bounds[place + 1], bounds[place]


def sigmas(count: int, low: float, high: float, shift: float, generator: torch.Generator) -> Tensor:
    """Return [count] sigmas in [low, high], one from each of `count` equal shares of the range.

    `shift` crowds them upwards, as sampling does.
    """

    def unshift(s: float) -> float:
        return s / (shift - (shift - 1) * s)

    share = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    u = unshift(low) + share * (unshift(high) - unshift(low))
    return shift * u / (1 + (shift - 1) * u)


def flow_loss(
    model: WanDiT,
    latents: Tensor,
    texts: Tensor,
    sigma: Tensor,
    noise: Tensor,
    given: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Return the mean squared error of the velocity, noise minus data; a scalar.

    latents, noise: [B, z, t, h, w]. sigma: [B]. given: further channels of the input. weight: of
    the squared errors, broadcast over them.
    """
    s = sigma.view(-1, 1, 1, 1, 1)
    mixed = (1 - s) * latents + s * noise
    seen = mixed if given is None else torch.cat((mixed, given), 1)
    velocity, wanted = model(seen, sigma * TRAIN_STEPS, texts), noise - latents
    if weight is None:
        return F.mse_loss(velocity, wanted)
    return (weight * (velocity - wanted).square()).mean()


def batch(
    cache: Cache, size: int, dropout: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Draw latents, one wording of each (or the empty prompt, for guidance), noise, and `given`."""
    rows = torch.randint(len(cache.latents), (size,), generator=generator)
    wording = torch.randint(WORDINGS, (size,), generator=generator)
    texts = cache.texts[rows, wording].float()
    latents = cache.latents[rows].float()
    texts[torch.rand(size, generator=generator) < dropout] = cache.empty.float()
    noise = torch.randn(latents.shape, generator=generator)
    return latents, texts, noise, None if cache.given is None else cache.given[rows].float()
