"""The bytes that a rank sends by each layout, computed apart from the code that counts them."""

from __future__ import annotations

import math

from torch import nn

from wanflow.config import DiTConfig
from wanflow.models.vae import AttentionBlock, Upsample, WanVAE, growth, receptive_margin
from wanflow.parallel.groups import Layout, sizes
from wanflow.parallel.vae_parallel import Strips

FLOAT32 = 4  # bytes


def forward_bytes(
    layout: Layout,
    config: DiTConfig,
    tokens: int,
    rank: int = 0,
    batch: int = 1,
    itemsize: int = 2,
    guided: bool = True,
) -> dict[str, int]:
    """Return what one rank sends in a forward; the keys are those of `CommStats`.

    Args:
        layout: of the ranks.
        config: of the model.
        tokens: of the complete video.
        rank: that sends.
        batch: samples in the forward; two where one cfg group computes both branches at once.
        itemsize: bytes of a number of queries, keys and values.
        guided: whether the branches are exchanged after it.
    """
    _, ring, place = layout.place(rank)
    lengths, blocks = sizes(tokens, layout.sequence), sizes(tokens, layout.ring)
    own = lengths[ring * layout.ulysses + place]
    heads = sizes(config.num_heads, layout.ulysses)[place]
    row = batch * config.dim // config.num_heads * itemsize  # one head of one token
    passed = sum(blocks[(ring - step) % layout.ring] for step in range(layout.ring - 1))
    patch = batch * math.prod(config.patch_size) * config.out_dim * FLOAT32
    found = {
        "qkv": config.num_layers * 3 * own * (config.num_heads - heads) * row,
        "out": config.num_layers * (blocks[ring] - own) * heads * row,
        "ring": config.num_layers * 2 * passed * heads * row,
        "patches": (layout.sequence - 1) * max(lengths) * patch,
        "velocity": (layout.cfg - 1) * tokens * patch if guided else 0,
    }
    return {key: value for key, value in found.items() if value}


def decode_bytes(vae: WanVAE, frames: int, strips: Strips, rank: int = 0) -> dict[str, int]:
    """Return what one rank sends in a decode; the keys are those of `CommStats`.

    Args:
        vae: its weights may have no memory (meta).
        frames: of the latent.
        strips: how its frames are cut.
        rank: that sends.
    """
    if rank >= len(strips.sizes) or len(strips.sizes) == 1:
        return {}
    own, scale, halo, keys_values = strips.sizes[rank], 1, 0, 0
    for layer in vae.decoder.layers():
        convolutions = [part for part in layer.modules() if isinstance(part, nn.Conv2d | nn.Conv3d)]
        channels = convolutions[0].in_channels if convolutions else 0
        column = channels * frames * strips.across * scale * vae.dtype.itemsize
        if isinstance(layer, AttentionBlock):
            keys_values += 2 * (len(strips.sizes) - 1) * own * column
        else:
            halo += len(strips.neighbours(rank)) * receptive_margin(layer) * column
        scale *= growth(layer)
        if isinstance(layer, Upsample):
            frames = frames if layer.time_conv is None else 2 * frames - 1
    shown = 3 * frames * own * strips.across * scale**2 if rank else 0  # rank 0 keeps its own
    found = {"halo": halo, "kv": keys_values, "frames": shown}
    return {key: value for key, value in found.items() if value}
