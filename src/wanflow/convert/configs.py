"""Write the small files next to weights: configs for the official code, Diffusers, transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from wanflow.checkpoint.checkpoint import DEFAULTS
from wanflow.config import TRAIN_STEPS, DiTConfig, TextConfig, VAE22Config, VAEConfig
from wanflow.presets import FAMILY, ModelSpec

DIFFUSERS_VERSION = "0.35.0"  # the first with two transformers
OFFICIAL_KEYS = (
    "model_type",
    "text_len",
    "in_dim",
    "dim",
    "ffn_dim",
    "freq_dim",
    "out_dim",
    "num_heads",
    "num_layers",
    "eps",
)
ROPE_LENGTH = 1024  # positions on each axis in diffusers' tables


def as_json(value: Mapping[str, Any]) -> bytes:
    """Return the text of a JSON file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def model_card(preset: ModelSpec, vocabulary: Sequence[str] = ()) -> dict[str, Any] | None:
    """Return the contents of `wanflow.json`; None for a published model, which needs none."""
    if preset in FAMILY and not vocabulary:
        return None
    # What an expert's tensors, or its official config.json, do not show.
    hidden = ("num_heads", "text_dim", "text_len", "eps")
    card: dict[str, Any] = {
        "name": preset.name,
        "task": preset.task,
        "dit": {name: getattr(preset.dit, name) for name in hidden},
        "text": asdict(preset.text),
        "vae": asdict(preset.vae),
        "defaults": {
            field.name: getattr(preset, field.name)
            for field in fields(ModelSpec)
            if field.name in DEFAULTS
        },
    }
    return {**card, "vocabulary": list(vocabulary)} if vocabulary else card


def official(dit: DiTConfig) -> dict[str, Any]:
    """Return `config.json` of an expert, for the official code."""
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        **{key: getattr(dit, key) for key in OFFICIAL_KEYS},
    }


def comfy(dit: DiTConfig) -> dict[str, str]:
    """Return header metadata of an expert: ComfyUI 0.33 takes its sizes from there.

    By default it takes heads of 128 and Wan's text width, whatever the model.
    """
    sizes = {key: getattr(dit, key) for key in (*OFFICIAL_KEYS, "text_dim") if key != "model_type"}
    return {"config": json.dumps({"transformer": sizes})}


# diffusers and transformers


def _class(name: str, **values: Any) -> dict[str, Any]:
    return {"_class_name": name, "_diffusers_version": DIFFUSERS_VERSION, **values}


def model_index(preset: ModelSpec, tokenizer: str) -> dict[str, Any]:
    """Return `model_index.json`; `tokenizer` is the name of transformers' class."""
    network, nothing = ["diffusers", "WanTransformer3DModel"], [None, None]
    two = len(preset.expert_names) == 2
    parts = {
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", tokenizer],
        "transformer": network,
        "transformer_2": network if two else nothing,
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    pipeline = "WanPipeline"
    if preset.conditioning == "channels":
        pipeline = "WanImageToVideoPipeline"
        parts |= {"image_encoder": nothing, "image_processor": nothing}
    return _class(
        pipeline,
        boundary_ratio=preset.boundary if two else None,
        expand_timesteps=preset.conditioning == "first_frame",
        **parts,
    )


def transformer(dit: DiTConfig) -> dict[str, Any]:
    """Return `config.json` of an expert, for diffusers."""
    return _class(
        "WanTransformer3DModel",
        patch_size=dit.patch_size,
        num_attention_heads=dit.num_heads,
        attention_head_dim=dit.dim // dit.num_heads,
        in_channels=dit.in_dim,
        out_channels=dit.out_dim,
        text_dim=dit.text_dim,
        freq_dim=dit.freq_dim,
        ffn_dim=dit.ffn_dim,
        num_layers=dit.num_layers,
        cross_attn_norm=dit.cross_attn_norm,
        qk_norm="rms_norm_across_heads",
        eps=dit.eps,
        image_dim=None,
        added_kv_proj_dim=None,
        rope_max_seq_len=ROPE_LENGTH,
        pos_embed_seq_len=None,
    )


def autoencoder(vae: VAEConfig) -> dict[str, Any]:
    """Return `config.json` of the VAE, for diffusers."""
    folded: dict[str, Any] = {}
    if isinstance(vae, VAE22Config):
        channels = 3 * vae.patch**2
        folded = {"is_residual": True, "patch_size": vae.patch, "decoder_base_dim": vae.dec_dim}
        folded |= {"in_channels": channels, "out_channels": channels}
    return _class(
        "AutoencoderKLWan",
        **folded,
        base_dim=vae.dim,
        z_dim=vae.z_dim,
        dim_mult=vae.dim_mult,
        num_res_blocks=vae.num_res_blocks,
        attn_scales=vae.attn_scales,
        temperal_downsample=vae.temperal_downsample,
        dropout=vae.dropout,
        latents_mean=vae.latent_mean,
        latents_std=vae.latent_std,
        scale_factor_temporal=vae.temporal_stride,
        scale_factor_spatial=vae.spatial_stride,
    )


def text_encoder(text: TextConfig) -> dict[str, Any]:
    """Return `config.json` of the text encoder, for transformers."""
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": text.vocab,
        "d_model": text.dim,
        "d_kv": text.dim_attn // text.num_heads,
        "d_ff": text.dim_ffn,
        "num_layers": text.num_layers,
        "num_decoder_layers": text.num_layers,
        "num_heads": text.num_heads,
        "relative_attention_num_buckets": text.num_buckets,
        "relative_attention_max_distance": text.max_dist,
        "layer_norm_epsilon": text.eps,
        "dropout_rate": 0.1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def scheduler(shift: float) -> dict[str, Any]:
    """Return `scheduler_config.json`: UniPC of the second order over the flow's sigmas."""
    return _class(
        "UniPCMultistepScheduler",
        num_train_timesteps=TRAIN_STEPS,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        solver_order=2,
        solver_type="bh2",
        predict_x0=True,
        lower_order_final=True,
        final_sigmas_type="zero",
    )


def ending(text: bytes) -> bytes:
    """Return a `tokenizer.json` by which prompts end in `</s>`; the same bytes if they do.

    wanflow adds the mark itself. The official program and transformers rely on this file.
    """
    parsed = json.loads(text)
    ids = {token["content"]: token["id"] for token in parsed.get("added_tokens", ())}
    end = ids.get("</s>")
    if parsed.get("post_processor") is not None or end is None:
        return text
    mark = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    parsed["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, mark],
        "pair": [first, mark, second, mark],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [end], "tokens": ["</s>"]}},
    }
    return json.dumps(parsed, ensure_ascii=False).encode()


def tokenizer_config() -> dict[str, Any]:
    """Return `tokenizer_config.json`, for transformers: a `tokenizer.json` of any kind."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
