"""Tiny models: one expert and what it makes of one input; whole folders of the family."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Engine
from tokenizers import pre_tokenizers
from tokenizers.models import Unigram
from torch import Tensor, nn

from helpers.common import M, official_config
from wanflow.checkpoint.structure import module_of
from wanflow.config import DiTConfig, TextConfig, VAE22Config, VAEConfig
from wanflow.models.dit import WanDiT
from wanflow.presets import I2V_A14B, TI2V_5B, ModelSpec

TINY = DiTConfig(
    dim=32, ffn_dim=64, num_heads=2, num_layers=2, text_dim=24, text_len=8, freq_dim=16
)
# Sides that every packing divides, and heads that four ranks share.
SIDES = {"dim": 64, "ffn_dim": 128, "num_heads": 4, "num_layers": 3}
SIDES |= {"text_dim": 64, "text_len": 8, "freq_dim": 32}
TEXT = TextConfig(vocab=16, dim=64, dim_attn=64, dim_ffn=96, num_heads=4, num_layers=1)
WORDS = [
    "<pad>",
    "</s>",
    "<unk>",
    "\u2581a",
    "\u2581red",
    "\u2581circle",
    "\u2581moves",
    "\u2581left",
]
# The official names.
VAE_FILES = {VAEConfig: "Wan2.1_VAE.pth", VAE22Config: "Wan2.2_VAE.pth"}
T5_FILE, TOKENIZER = "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl"
# A video small enough that a run takes a fraction of a second; the sides take any model's stride.
SMALL = {"size": "64*32", "frame_num": 5, "sample_steps": 3, "negative_prompt": ""}


def _tiny(spec: ModelSpec, vae: dict[str, int]) -> ModelSpec:
    return replace(
        spec,
        dit=replace(spec.dit, **SIDES),
        text=TEXT,
        vae=replace(spec.vae, num_res_blocks=1, **vae),
    )


FAMILY = {"i2v": _tiny(I2V_A14B, {"dim": 4}), "ti2v": _tiny(TI2V_5B, {"dim": 4, "dec_dim": 4})}


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


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> None:
    """Weights that let every part be seen in the output: none zero, none one, none drowning the
    rest.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gamma") or (parameter.ndim == 1 and name.endswith("weight")):
            parameter.copy_(1 + 0.2 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.1 * noise)
        elif "modulation" in name or "embedding.weight" in name:
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)


def randomised(module: M, seed: int) -> M:
    """Return a module on meta with random weights."""
    module = module.to_empty(device="cpu").eval().requires_grad_(False)
    randomise(module, seed)
    return module


def tiny_family(folder: Path, kind: str) -> Path:
    """Write a small random model in the official layout, and return its folder.

    Args:
        folder: becomes the model's.
        kind: "i2v" is I2V-A14B in small, "ti2v" TI2V-5B.
    """
    spec = FAMILY[kind]
    parts = {**dict.fromkeys(spec.expert_names, spec.dit), "t5": spec.text, "vae": spec.vae}
    states = {
        part: randomised(module_of(config), seed).state_dict()
        for seed, (part, config) in enumerate(parts.items())
    }
    return write_official(folder, spec, states, {"name": f"tiny-{kind}", "defaults": SMALL})


def write_official(
    folder: Path, spec: ModelSpec, states: dict[str, dict[str, Tensor]], sheet: dict[str, Any]
) -> Path:
    """Write a model in the official layout; `sheet` is its wanflow.json."""
    for expert in spec.experts:
        place, state = folder / expert.folder, states[expert.name]
        place.mkdir(parents=True, exist_ok=True)
        name = "diffusion_pytorch_model-00001-of-00001.safetensors"
        save_file(state, place / name)
        index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(state, name)})
        (place / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
        config = {"_class_name": "WanModel"} | official_config(spec.dit)
        (place / "config.json").write_text(json.dumps(config))
    torch.save(dict(states["vae"]), folder / VAE_FILES[type(spec.vae)])
    torch.save(dict(states["t5"]), folder / T5_FILE)
    tokenizer = folder / TOKENIZER / "tokenizer.json"
    tokenizer.parent.mkdir(parents=True)
    engine = Engine(Unigram([(word, -float(n)) for n, word in enumerate(WORDS)], unk_id=2))
    engine.pre_tokenizer = pre_tokenizers.Metaspace()
    engine.save(str(tokenizer))
    (folder / "wanflow.json").write_text(json.dumps(sheet))
    return folder
