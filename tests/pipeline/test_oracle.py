"""A second, independent oracle: diffusers and transformers at small random shapes, their weights
named by `weights.names`.

Tolerance: everything runs in float32, where outputs of order 1 carry a few 1e-6 of rounding (the
    golden numbers tell 1e-6 to 7e-6 between float32 and float64 at such sizes), so 2e-5 is rounding
    and nothing else. It would not hold for diffusers' time features, whose float32 angles are off
    by up to 3e-5 at t = 1000 (up to 8e-5 in the output): there its features are replaced by ones
    from float64 angles. Below t = 1, where float32 angles do, it runs untouched.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.oracle import ExactFeatures, close, copy_weights, dit_inputs, dit_pair
from helpers.tiny import randomise
from torch import Tensor, nn

from wanflow.checkpoint.key_maps import Dialect, Kind, detect, from_official, strip, to_official
from wanflow.config import RequestError, TextConfig, VAEConfig
from wanflow.models.umt5 import UMT5Encoder
from wanflow.models.vae import WanVAE

try:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel
except ImportError as error:
    raise ImportError(
        "the second oracle needs diffusers and transformers, which are development dependencies"
        f" (pip install 'wanflow[dev]'): {error}"
    ) from error

SEEDS = range(5)
GOLDEN = Path(os.environ.get("WANFLOW_GOLDEN") or Path(__file__).parents[1] / "golden")
Shapes = dict[str, tuple[int, ...]]


# --- the transformer ---


@pytest.mark.parametrize("seed", SEEDS)
def test_transformer(seed: int) -> None:
    ours, theirs, rng = dit_pair(seed)
    theirs.condition_embedder.timesteps_proj = ExactFeatures(ours.config.freq_dim)
    batch = rng.randint(1, 3)
    latent, text = dit_inputs(ours.config, rng, batch)
    t = torch.tensor([rng.randint(1, 1000) for _ in range(batch)])
    close(ours(latent, t, text), theirs(latent, t, text).sample)


@pytest.mark.parametrize("seed", SEEDS)
def test_transformer_untouched(seed: int) -> None:
    ours, theirs, rng = dit_pair(seed)
    latent, text = dit_inputs(ours.config, rng, 2)
    t = torch.tensor([rng.random(), rng.random()])
    close(ours(latent, t, text), theirs(latent, t, text).sample)


@pytest.mark.parametrize("seed", SEEDS)
def test_transformer_timestep_per_token(seed: int) -> None:
    ours, theirs, rng = dit_pair(seed)
    theirs.condition_embedder.timesteps_proj = ExactFeatures(ours.config.freq_dim)
    latent, text = dit_inputs(ours.config, rng, 2)
    tokens = latent[0, 0].numel() // 4
    t = torch.tensor([[rng.choice([0, 300, 871]) for _ in range(tokens)] for _ in range(2)])
    close(ours(latent, t, text), theirs(latent, t, text).sample)


# --- the text encoder ---


@pytest.mark.parametrize("seed", SEEDS)
def test_text_encoder(seed: int) -> None:
    rng = random.Random(seed)
    config = TextConfig(
        vocab=rng.randint(20, 90),
        dim=rng.randint(8, 48),
        num_heads=(heads := rng.randint(1, 5)),
        dim_attn=heads * rng.randint(3, 12),
        dim_ffn=rng.randint(8, 80),
        num_layers=rng.randint(1, 4),
        num_buckets=8 * rng.randint(1, 4),
        max_dist=rng.choice([32, 64, 128]),
        eps=rng.choice([1e-6, 1e-5]),
    )
    ours = UMT5Encoder(config).eval().requires_grad_(False)
    randomise(ours, seed)
    theirs = UMT5EncoderModel(
        UMT5Config(
            vocab_size=config.vocab,
            d_model=config.dim,
            d_kv=config.dim_attn // heads,
            d_ff=config.dim_ffn,
            num_heads=heads,
            num_layers=config.num_layers,
            relative_attention_num_buckets=config.num_buckets,
            relative_attention_max_distance=config.max_dist,
            layer_norm_epsilon=config.eps,
            feed_forward_proj="gated-gelu",
        )
    )
    copy_weights("t5", "huggingface", ours, theirs)
    length = rng.choice([1, 17, 150])
    ids = torch.tensor([[rng.randrange(config.vocab) for _ in range(length)] for _ in range(3)])
    mask = torch.arange(length) < torch.tensor(
        [rng.randint(1, length) for _ in range(3)]
    ).unsqueeze(1)
    expected = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    close(ours(ids, mask.long()), expected)


# --- the autoencoder ---

VAE_SHAPES = {
    "wan2.1": ((1, 2, 4, 4), (False, True, True), 2),
    "nano": ((1, 2, 4, 4), (False, True, True), 1),
    "early_time": ((1, 2, 2), (True, False), 1),
    "time_twice": ((2, 3, 4), (True, True), 2),
    "no_time": ((1, 3), (False,), 3),
    "one_level": ((2,), (), 1),
}


def vae_pair(name: str, seed: int) -> tuple[WanVAE, Any]:
    mult, temporal, blocks = VAE_SHAPES[name]
    rng = random.Random(seed)
    dim, z = 2 * rng.randint(2, 4), rng.randint(2, 16)
    mean, std = (
        tuple(rng.gauss(0, 1) for _ in range(z)),
        tuple(rng.uniform(0.5, 3) for _ in range(z)),
    )
    ours = (
        WanVAE(VAEConfig(dim, z, mult, blocks, temporal, latent_mean=mean, latent_std=std))
        .eval()
        .requires_grad_(False)
    )
    randomise(ours, seed)
    theirs = AutoencoderKLWan(
        base_dim=dim,
        z_dim=z,
        dim_mult=list(mult),
        num_res_blocks=blocks,
        temperal_downsample=list(temporal),
        latents_mean=list(mean),
        latents_std=list(std),
    )
    copy_weights("vae", "diffusers", ours, theirs)
    return ours, theirs


def statistics(config: VAEConfig) -> tuple[Tensor, Tensor]:
    shift, scale = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (config.latent_mean, config.latent_std)
    )
    return shift, scale


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "name", [name for name, (_, temporal, _) in VAE_SHAPES.items() if any(temporal)]
)
def test_autoencoder_encodes(name: str, seed: int) -> None:
    ours, theirs = vae_pair(name, seed)
    rng, side = random.Random(seed), ours.config.spatial_stride
    frames = 4 * rng.randint(0, 3) + 1  # diffusers always reads four at a time
    size = (2, 3, frames, side * rng.randint(2, 4), side * rng.randint(2, 4))
    video = torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    posterior = theirs.encode(video).latent_dist
    mean, log_variance = ours.moments(video)
    close(mean, posterior.mean)
    close(log_variance, posterior.logvar)
    shift, scale = statistics(ours.config)
    close(ours.encode(video), (posterior.mean - shift) / scale)


def test_autoencoder_without_time_encodes() -> None:
    ours, theirs = vae_pair("no_time", 0)
    video = torch.rand(1, 3, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    close(ours.moments(video)[0], theirs.encode(video).latent_dist.mean)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", VAE_SHAPES)
def test_autoencoder_decodes(name: str, seed: int) -> None:
    ours, theirs = vae_pair(name, seed)
    rng = random.Random(seed)
    size = (2, ours.config.z_dim, rng.randint(1, 4), rng.randint(2, 5), rng.randint(2, 5))
    latent = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    shift, scale = statistics(ours.config)
    close(ours.decode(latent).clamp(-1, 1), theirs.decode(latent * scale + shift).sample)


# --- names ---


def real_dit(config: dict[str, Any]) -> nn.Module:
    return WanTransformer3DModel(  # type: ignore[no-any-return]
        num_attention_heads=config["num_heads"],
        attention_head_dim=config["dim"] // config["num_heads"],
        in_channels=config["in_dim"],
        out_channels=config["out_dim"],
        text_dim=config["text_dim"],
        freq_dim=config["freq_dim"],
        ffn_dim=config["ffn_dim"],
        num_layers=config["num_layers"],
    )


def real_t5(config: dict[str, Any]) -> nn.Module:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=config["vocab"],
            d_model=config["dim"],
            d_kv=config["dim_attn"] // config["num_heads"],
            d_ff=config["dim_ffn"],
            num_heads=config["num_heads"],
            num_layers=config["num_layers"],
            relative_attention_num_buckets=config["num_buckets"],
        )
    )


def real_vae(config: dict[str, Any]) -> nn.Module:
    return AutoencoderKLWan(  # type: ignore[no-any-return]
        base_dim=config["dim"],
        z_dim=config["z_dim"],
        dim_mult=config["dim_mult"],
        num_res_blocks=config["num_res_blocks"],
        temperal_downsample=config["temperal_downsample"],
    )


KINDS: dict[str, tuple[Kind, Dialect, Callable[[dict[str, Any]], nn.Module]]] = {
    "dit": ("dit", "diffusers", real_dit),
    "t5 encoder": ("t5", "huggingface", real_t5),
    "wan2.1 vae": ("vae", "diffusers", real_vae),
}


def full_sizes() -> list[Any]:
    """The full-size modules of the golden folder, where it has them."""
    file = GOLDEN / "sizes.json"
    modules = json.loads(file.read_text(encoding="utf-8"))["modules"] if file.exists() else {}
    return [
        pytest.param(entry, id=name) for name, entry in modules.items() if entry["module"] in KINDS
    ]


def shapes(module: nn.Module) -> Shapes:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def both_ways(kind: Kind, dialect: Dialect, official: Shapes, foreign: Shapes) -> None:
    """Every name of each side becomes a name of the other, with its shape, and comes back."""
    assert detect(kind, official) == "official" and detect(kind, foreign) == dialect
    out = from_official(kind, dialect, official)
    assert {new: official[name] for name, new in out.items()} == foreign
    assert len(set(out.values())) == len(official)
    assert to_official(kind, foreign) == {new: name for name, new in out.items()}
    assert (
        to_official(kind, official)
        == from_official(kind, "official", official)
        == {name: name for name in official}
    )
    assert detect(kind, foreign.keys() - official.keys()) == dialect


@pytest.mark.parametrize("entry", full_sizes())
def test_names_at_full_size(entry: dict[str, Any]) -> None:
    kind, dialect, build = KINDS[entry["module"]]
    official = {name: tuple(value["shape"]) for name, value in entry["state"].items()}
    with torch.device("meta"):
        foreign = shapes(build(entry["config"]))
    if kind == "t5":
        assert foreign.pop("encoder.embed_tokens.weight") == foreign["shared.weight"]
    both_ways(kind, dialect, official, foreign)


@pytest.mark.parametrize("name", VAE_SHAPES)
def test_names_of_other_autoencoders(name: str) -> None:
    mult, temporal, blocks = VAE_SHAPES[name]
    with torch.device("meta"):
        official = shapes(
            WanVAE(VAEConfig(4, dim_mult=mult, num_res_blocks=blocks, temperal_downsample=temporal))
        )
        theirs = AutoencoderKLWan(
            base_dim=4,
            dim_mult=list(mult),
            num_res_blocks=blocks,
            temperal_downsample=list(temporal),
        )
    both_ways("vae", "diffusers", official, shapes(theirs))


def test_norms_change_places() -> None:
    """The official norm3 is diffusers' norm2, and it is the only block norm with weights."""
    found = to_official(
        "dit",
        [
            "blocks.0.attn1.to_q.weight",
            "blocks.0.norm2.weight",
            "blocks.11.norm2.bias",
            "proj_out.bias",
        ],
    )
    assert (
        found["blocks.0.norm2.weight"] == "blocks.0.norm3.weight"
        and found["blocks.11.norm2.bias"] == "blocks.11.norm3.bias"
    )
    assert from_official("dit", "diffusers", ["blocks.0.norm3.weight"]) == {
        "blocks.0.norm3.weight": "blocks.0.norm2.weight"
    }


# llama.cpp's list of tensors for a T5 encoder, written out for one block.
GGUF_T5 = {
    "token_embd": "token_embedding",
    "enc.output_norm": "norm",
    "enc.blk.3.attn_norm": "blocks.3.norm1",
    "enc.blk.3.attn_q": "blocks.3.attn.q",
    "enc.blk.3.attn_k": "blocks.3.attn.k",
    "enc.blk.3.attn_v": "blocks.3.attn.v",
    "enc.blk.3.attn_o": "blocks.3.attn.o",
    "enc.blk.3.attn_rel_b": "blocks.3.pos_embedding.embedding",
    "enc.blk.3.ffn_norm": "blocks.3.norm2",
    "enc.blk.3.ffn_gate": "blocks.3.ffn.gate.0",
    "enc.blk.3.ffn_up": "blocks.3.ffn.fc1",
    "enc.blk.3.ffn_down": "blocks.3.ffn.fc2",
}


def test_names_in_gguf() -> None:
    expected = {f"{foreign}.weight": f"{official}.weight" for foreign, official in GGUF_T5.items()}
    assert detect("t5", expected) == "gguf"
    assert to_official("t5", expected) == expected
    with torch.device("meta"):
        ours = list(UMT5Encoder(TextConfig(8, 4, 4, 4, 2, num_layers=11)).state_dict())
    out = from_official("t5", "gguf", ours)
    assert len(set(out.values())) == len(ours)
    assert to_official("t5", out.values()) == {new: name for name, new in out.items()}


@pytest.mark.parametrize(
    ("kind", "prefix", "name", "official"),
    [
        (
            "dit",
            "model.diffusion_model.",
            "blocks.0.self_attn.q.weight",
            "blocks.0.self_attn.q.weight",
        ),
        ("dit", "diffusion_model.", "head.modulation", "head.modulation"),
        ("dit", "model.", "blocks.0.attn2.to_out.0.bias", "blocks.0.cross_attn.o.bias"),
        ("dit", "", "blocks.0.attn1.to_q.lora_A.weight", "blocks.0.self_attn.q.lora_A.weight"),
        ("dit", "", "condition_embedder.time_proj.scale_weight", "time_projection.1.scale_weight"),
        (
            "t5",
            "text_encoders.umt5xxl.transformer.",
            "encoder.block.0.layer.1.DenseReluDense.wo.weight",
            "blocks.0.ffn.fc2.weight",
        ),
        (
            "vae",
            "first_stage_model.",
            "encoder.downsamples.0.residual.0.gamma",
            "encoder.downsamples.0.residual.0.gamma",
        ),
        ("vae", "vae.", "quant_conv.bias", "conv1.bias"),
        ("vae", "model.", "conv2.weight", "conv2.weight"),
    ],
)
def test_prefixes_and_suffixes(kind: Kind, prefix: str, name: str, official: str) -> None:
    assert strip(kind, prefix + name) == name
    assert to_official(kind, [prefix + name]) == {prefix + name: official}


def test_tied_embedding() -> None:
    rest = "encoder.final_layer_norm.weight"
    only = to_official("t5", ["encoder.embed_tokens.weight", rest])
    assert only == {"encoder.embed_tokens.weight": "token_embedding.weight", rest: "norm.weight"}
    assert to_official("t5", ["encoder.embed_tokens.weight", "shared.weight", rest]) == {
        "shared.weight": "token_embedding.weight",
        rest: "norm.weight",
    }


def test_unknown_names_stay_for_the_loader_to_report() -> None:
    found = to_official("dit", ["proj_out.weight", "scaled_fp8", "blocks.0.attn1.to_qkv.weight"])
    assert (
        found["scaled_fp8"] == "scaled_fp8"
        and found["blocks.0.attn1.to_qkv.weight"] == "blocks.0.attn1.to_qkv.weight"
    )


def test_refusals() -> None:
    with pytest.raises(RequestError, match="weights of a Wan vae.*lm_head"):
        to_official("vae", ["lm_head.weight"])
    with pytest.raises(RequestError, match="nothing"):
        detect("dit", [])
    with pytest.raises(RequestError, match="both the parameter 'head.modulation'"):
        to_official("dit", ["model.head.modulation", "head.modulation"])
    with pytest.raises(RequestError, match="no diffusers name for blocks.0.unheard"):
        from_official("dit", "diffusers", ["blocks.0.unheard.weight"])
    with pytest.raises(RequestError, match="a vae has no gguf names"):
        from_official("vae", "gguf", ["conv1.bias"])
