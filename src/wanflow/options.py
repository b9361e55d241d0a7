"""Keywords of `load`, `generate` and `save` for type checkers and editors; never imported to run.

A test compares them with the fields that they name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    import torch

    from wanflow.config import Solver
    from wanflow.runtime import Quantization

LoraFiles = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


# A file, an opened `Picture`, a PIL image, or uint8 [H, W, 3].
AnyPicture = Any


class Encoding(TypedDict, total=False):
    """How `Video.save` stores a video; what is left out is usual for the file."""

    codec: str | None
    crf: int | None
    pixel_format: str | None


class RequestOptions(TypedDict, total=False):
    """The fields of `wanflow.Request` without prompt and seed, and the name of a step preset."""

    negative_prompt: str | None
    image: AnyPicture | None
    last_image: AnyPicture | None
    size: str | tuple[int, int] | None
    exact_size: bool
    frame_num: int | None
    sample_solver: Solver | None
    sample_steps: int | None
    sample_shift: float | None
    cfg_high: float | None
    cfg_low: float | None
    boundary: float | None
    fps: float | None
    lora: LoraFiles | None
    lora_from: int | None
    cfg_start: float | None
    cfg_start_steps: int | None
    preset: str | None


class LoadOptions(TypedDict, total=False):
    """The files of single parts, and the fields of `wanflow.Runtime`."""

    high: str | Path | None
    low: str | Path | None
    dit: str | Path | None
    t5: str | Path | None
    vae: str | Path | None
    tokenizer: str | Path | None
    device: str | torch.device
    dtype: str | torch.dtype
    t5_cpu: bool | None
    keep_experts: bool | None
    cfg_batch: bool | None
    noise_device: Literal["cpu", "cuda"]
    lora: Literal["live", "fused"]
    prefetch: bool | None
    resident_blocks: int | None
    stream_from: Literal["ram", "disk"] | None
    chunk_tokens: int | None
    vae_tile: int | None
    quantize: Quantization | Literal[""]
    quantize_layers: Literal["ffn", "all"]
    attention: str
    compile: Literal["auto", "on", "off"]
    text_cache: str | os.PathLike[str] | None
    machine_cache: str | os.PathLike[str] | None
    calibration: str | os.PathLike[str] | None
    cfg_parallel: bool | None
    ring_size: int | None
    ulysses_size: int | None
    dit_fsdp: bool | None
