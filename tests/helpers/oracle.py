"""The second oracle: diffusers, with our weights under their names."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from helpers.tiny import randomise
from wanflow.checkpoint.key_maps import Dialect, Kind, from_official, to_official
from wanflow.config import DiTConfig
from wanflow.models.dit import WanDiT

try:
    from diffusers import WanTransformer3DModel
except ImportError as error:
    raise ImportError(
        "the second oracle needs diffusers and transformers, which are development dependencies"
        f" (pip install 'wanflow[dev]'): {error}"
    ) from error

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


def copy_weights(kind: Kind, dialect: Dialect, ours: nn.Module, theirs: nn.Module) -> None:
    """Fill their module with our weights under their names; both ways of renaming must agree on
    every one.
    """
    state = ours.state_dict()
    renamed = from_official(kind, dialect, state)
    back = to_official(kind, theirs.state_dict())
    assert {official: foreign for foreign, official in back.items()} == renamed
    missing, unexpected = theirs.load_state_dict(
        {renamed[name]: value for name, value in state.items()}, strict=False
    )
    assert not unexpected
    assert set(missing) <= {"encoder.embed_tokens.weight"}  # tied to `shared`, so filled with it
    theirs.eval().requires_grad_(False)


def close(actual: Tensor, expected: Tensor) -> None:
    assert expected.abs().mean() > 1e-2  # an output of nothing would prove nothing
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def dit_pair(
    seed: int, channels: tuple[int, int] | None = None
) -> tuple[WanDiT, Any, random.Random]:
    """Our transformer and theirs, of random sides; `channels`: in and out."""
    rng = random.Random(seed)
    heads, size = rng.randint(1, 3), 2 * rng.randint(3, 12)
    config = DiTConfig(
        dim=heads * size,
        ffn_dim=8 * rng.randint(2, 9),
        num_heads=heads,
        num_layers=rng.randint(1, 4),
        in_dim=rng.randint(2, 17) if channels is None else channels[0],
        out_dim=rng.randint(2, 17) if channels is None else channels[1],
        text_dim=rng.randint(5, 40),
        text_len=rng.randint(3, 20),
        freq_dim=2 * rng.randint(2, 20),
        eps=rng.choice([1e-6, 1e-5]),
    )
    ours = WanDiT(config).eval().requires_grad_(False)
    randomise(ours, seed)
    return ours, their_dit(ours), rng


def their_dit(ours: WanDiT) -> Any:
    """diffusers' transformer, with our weights."""
    config = ours.config
    theirs = WanTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.dim // config.num_heads,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        eps=config.eps,
    )
    copy_weights("dit", "diffusers", ours, theirs)
    return theirs


class ExactFeatures(nn.Module):
    """Cosines, then sines, of t / 10000^(k / half), in float64 up to the last rounding."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.slowness = 1e4 ** (torch.arange(size // 2, dtype=torch.float64) / (size // 2))

    def forward(self, t: Tensor) -> Tensor:
        angle = t.double().unsqueeze(-1) / self.slowness
        return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def dit_inputs(config: DiTConfig, rng: random.Random, batch: int) -> tuple[Tensor, Tensor]:
    """A latent of odd size, and text that is zero past each prompt's end."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    grid = (rng.randint(1, 4), 2 * rng.randint(1, 5), 2 * rng.randint(1, 5))
    latent = torch.randn(batch, config.in_dim, *grid, generator=generator)
    text = torch.randn(batch, config.text_len, config.text_dim, generator=generator)
    for row in text:
        row[rng.randint(1, config.text_len) :] = 0
    return latent, text
