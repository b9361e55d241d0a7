"""Every feature of a run: its settings, and how far it may move the final latent."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import wanflow
from helpers.common import PROMPT
from helpers.compiled import without_inductor
from helpers.scaled_forms import FORMS, rewrite
from helpers.tiny import FAMILY, tiny_family
from wanflow.api import Pipeline
from wanflow.config import DiTConfig
from wanflow.convert.convert import convert, open_model
from wanflow.convert.formats import options
from wanflow.pictures import open_picture
from wanflow.pipeline import Cancelled
from wanflow.presets import NANO, NANO_FOLDER
from wanflow.request import Picture, Request

# Each kind of run: a model, and which pictures it is given.
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "nano": ("nano", ()),
    "i2v": ("i2v", ("image",)),
    "i2v, last picture": ("i2v", ("last_image",)),
    "i2v, both pictures": ("i2v", ("image", "last_image")),
    "ti2v": ("ti2v", ()),
    "ti2v, picture": ("ti2v", ("image",)),
}


def write_loras(root: Path, dit: DiTConfig) -> Path:
    """A LoRA for both experts, and one that only the low-noise expert gets, from the second step
    on.
    """
    generator = torch.Generator().manual_seed(0)
    for name, modules in (("both", ("self_attn.q", "cross_attn.v")), ("low_noise", ("ffn.2",))):
        tensors = {}
        for path in (
            f"diffusion_model.blocks.{n}.{module}"
            for n in range(dit.num_layers)
            for module in modules
        ):
            tensors[f"{path}.lora_A.weight"] = torch.randn(
                4, dit.ffn_dim if "ffn" in path else dit.dim, generator=generator
            )
            tensors[f"{path}.lora_B.weight"] = torch.randn(dit.dim, 4, generator=generator) * 0.02
        save_file(tensors, root / f"{name}.safetensors")
    return root


@functools.cache
def made(name: str = "nano") -> Path:
    """Files that features need: LoRAs, and where nano is not meant, the model itself."""
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    if name != "nano":
        tiny_family(root / name, name)
    return write_loras(root, NANO.dit if name == "nano" else FAMILY[name].dit)


@functools.cache
def packed(name: str, form: str) -> Path:
    """A model in a packed form, by `wanflow convert`, or as ComfyUI and LightX2V have it."""
    root, source = made(name), NANO_FOLDER if name == "nano" else made(name) / name
    target = "bf16" if form in FORMS else form
    convert(open_model(source, {}), root / form, options(target), lambda line: None)
    for folder in ("diffusion_models", "text_encoders") if form in FORMS else ():
        for file in (root / form / folder).glob("*.safetensors"):
            rewrite(form, file)
    return root / form


# Each feature: what it adds to load() and to the request, and how far the final latent may then be
# from the plain run's. Bit-equal where only residency changes, rounding where a batch or a dtype
# does (stated, not fitted: float32 rounding over six evaluations with guidance 4 stays below 1e-3
# of latents of size 1; bfloat16 has 8 bits).
BIT, ROUNDING, BF16, QUANTISED = 0.0, 1e-3, 0.35, 0.35
FEATURES: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "one expert at a time": ({"keep_experts": False}, {}, BIT),
    "text encoder on the CPU": ({"t5_cpu": True}, {}, BIT),
    "two passes": ({"cfg_batch": False}, {}, ROUNDING),
    "one batch": ({"cfg_batch": True}, {}, ROUNDING),
    "bfloat16": ({"dtype": "bfloat16"}, {}, BF16),
    "stop and resume": ({}, {"stop": 2}, BIT),
    "dpm++": ({}, {"sample_solver": "dpm++"}, BIT),
    "euler": ({}, {"sample_solver": "euler"}, BIT),
    "no guidance": ({}, {"cfg_high": 1.0, "cfg_low": 1.0}, BIT),
    "guidance for one expert": ({}, {"cfg_low": 1.0}, BIT),
    "no negative prompt": ({}, {"negative_prompt": ""}, BIT),
    "one expert only": ({}, {"boundary": 0.0}, BIT),
    "another size": ({}, {"size": (48, 80)}, BIT),
    "one frame": ({}, {"frame_num": 1}, BIT),
    "guidance at the start": ({}, {"cfg_start": 2.0, "cfg_start_steps": 2}, BIT),
    "LoRA": ({}, {"lora": ("both.safetensors@high=1,low=0.5",)}, BIT),
    "two LoRAs, by steps": (
        {},
        {"lora": ("both.safetensors@steps=2", "low_noise.safetensors")},
        BIT,
    ),
    "fused LoRAs": ({"lora": "fused"}, {}, ROUNDING),
    "blocks streamed from disk": ({"resident_blocks": 1, "stream_from": "disk"}, {}, BIT),
    "blocks streamed from RAM": ({"resident_blocks": 0, "stream_from": "ram"}, {}, BIT),
    "the next expert read ahead": ({"prefetch": True, "keep_experts": False}, {}, BIT),
    "tokens in chunks": ({"chunk_tokens": 100}, {}, ROUNDING),
    "tiles": ({"vae_tile": 64}, {}, BIT),
    "quantised": ({"quantize": "fp8"}, {}, QUANTISED),
    "all quantised": ({"quantize": "int8", "quantize_layers": "all"}, {}, QUANTISED),
    "another attention": ({"attention": "math"}, {}, ROUNDING),
    "compiled": ({"compile": "on"}, {}, ROUNDING),
    "fp8 weights": ({}, {"model": "fp8"}, BIT),
    "GGUF weights": ({}, {"model": "gguf-q8_0"}, BIT),
    "nvfp4 weights": ({}, {"model": "nvfp4"}, BIT),
    "rotated int8 weights": ({}, {"model": "convrot"}, BIT),
}


# What the small models of the family need in place of it.
INSTEAD: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "i2v": {"tokens in chunks": ({"chunk_tokens": 3}, {})},
    "ti2v": {
        "tokens in chunks": ({"chunk_tokens": 3}, {}),
        "another size": ({}, {"size": (96, 64)}),
        "LoRA": ({}, {"lora": ("both.safetensors@0.5",)}),
        "two LoRAs, by steps": (
            {},
            {"lora": ("both.safetensors@steps=2", "both.safetensors@0.3,steps=2-")},
        ),
    },
}


def feature(kind: str, name: str) -> tuple[dict[str, Any], dict[str, Any], float]:
    """A feature's settings, as a kind of run takes them."""
    runtime, request, limit = FEATURES[name]
    return (*INSTEAD.get(KINDS[kind][0], {}).get(name, (runtime, request)), limit)


@functools.cache
def picture(which: str) -> Picture:
    generator = np.random.default_rng(len(which))
    return open_picture(generator.integers(0, 256, (50, 70, 3), dtype=np.uint8))


@functools.cache
def pipeline(form: str, runtime: tuple[tuple[str, Any], ...], name: str = "nano") -> Pipeline:
    """A model as it is ("nano", whichever it is), or in a packed form."""
    own = name if name == "nano" else made(name) / name
    model = own if form == "nano" else packed(name, form)
    return wanflow.load(model, device="cpu", **dict(runtime))


@functools.cache
def plain_latent(request: tuple[tuple[str, Any], ...], kind: str = "nano") -> torch.Tensor:
    return latent({}, dict(request), kind)


def latent(runtime: dict[str, Any], request: dict[str, Any], kind: str = "nano") -> torch.Tensor:
    """The final latent of a run, stopped, saved as tensors and resumed where the request says
    so.
    """
    name, pictures = KINDS[kind]
    request = {"frame_num": 5, "sample_steps": 3, "seed": 3, **request}
    request |= {which: picture(which) for which in pictures}
    stop = request.pop("stop", None)
    request["lora"] = tuple(str(made(name) / lora) for lora in request.get("lora", ()))
    pipe = pipeline(request.pop("model", "nano"), tuple(sorted(runtime.items())), name)
    run = pipe.begin(Request(PROMPT, **request))
    # inductor has tests of its own
    with without_inductor() if "compile" in runtime else nullcontext():
        if stop is not None:
            with pytest.raises(Cancelled) as cancelled:
                pipe.resume(run, lambda told: told.step < stop)
            run = cancelled.value.run
        return pipe.resume(run).state.x
