"""Every feature of a run: its settings, and how far it may move the final latent."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import wanflow
from helpers.common import PROMPT
from helpers.compiled import without_inductor
from wanflow.api import Pipeline
from wanflow.convert.convert import convert, open_model
from wanflow.convert.formats import options
from wanflow.opening import NANO_FOLDER
from wanflow.pipeline import Cancelled
from wanflow.request import Request


def write_loras(root: Path) -> Path:
    """A LoRA for both experts, and one that only the low-noise expert gets, from the second step
    on.
    """
    generator = torch.Generator().manual_seed(0)
    for name, modules in (("both", ("self_attn.q", "cross_attn.v")), ("low_noise", ("ffn.2",))):
        tensors = {}
        for path in (
            f"diffusion_model.blocks.{n}.{module}" for n in range(6) for module in modules
        ):
            tensors[f"{path}.lora_A.weight"] = torch.randn(
                4, 640 if "ffn" in path else 160, generator=generator
            )
            tensors[f"{path}.lora_B.weight"] = torch.randn(160, 4, generator=generator) * 0.02
        save_file(tensors, root / f"{name}.safetensors")
    return root


@functools.cache
def made() -> Path:
    """Files that features need: LoRAs, and nano in packed forms, by `wanflow convert`."""
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    for form in ("fp8", "gguf-q8_0"):
        convert(open_model(NANO_FOLDER, {}), root / form, options(form), lambda line: None)
    return write_loras(root)


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
}


@functools.cache
def pipeline(model: str, runtime: tuple[tuple[str, Any], ...]) -> Pipeline:
    return wanflow.load(
        "nano" if model == "nano" else made() / model, device="cpu", **dict(runtime)
    )


@functools.cache
def plain_latent(request: tuple[tuple[str, Any], ...]) -> torch.Tensor:
    return latent({}, dict(request))


def latent(runtime: dict[str, Any], request: dict[str, Any]) -> torch.Tensor:
    """The final latent of a run, stopped, saved as tensors and resumed where the request says
    so.
    """
    request = {"frame_num": 5, "sample_steps": 3, "seed": 3, **request}
    stop = request.pop("stop", None)
    request["lora"] = tuple(str(made() / lora) for lora in request.get("lora", ()))
    pipe = pipeline(request.pop("model", "nano"), tuple(sorted(runtime.items())))
    run = pipe.begin(Request(PROMPT, **request))
    # inductor has tests of its own
    with without_inductor() if "compile" in runtime else nullcontext():
        if stop is not None:
            with pytest.raises(Cancelled) as cancelled:
                pipe.resume(run, lambda told: told.step < stop)
            run = cancelled.value.run
        return pipe.resume(run).state.x
