"""A folder of weights becomes modules: find every file first, check every name and shape, then place one tensor at a time.

The official layout: `high_noise_model/` and `low_noise_model/` (config.json and safetensors), the T5 and VAE files, the
tokenizer. What it cannot say about a model that is not the published one stands beside it in `wanflow.json`. Shapes are
taken from the tensors; configs that say otherwise are refused, so what is built never exceeds what the files hold.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from wanflow.config import DiTConfig, Preset, Request, RequestError, TextConfig, VAEConfig, from_mapping, parse_size
from wanflow.models.dit import WanDiT
from wanflow.models.tokenizer import Tokenizer
from wanflow.models.umt5 import UMT5Encoder
from wanflow.models.vae import WanVAE
from wanflow.presets import T2V_A14B
from wanflow.sampling.experts import Expert
from wanflow.weights.formats import TensorInfo, TensorSource, open_source, read_json, weight_files

EXPERTS: dict[Expert, str] = {"high": "high_noise_model", "low": "low_noise_model"}
T5_STEM, VAE_STEM = "models_t5_umt5-xxl-enc-bf16", "Wan2.1_VAE"
TOKENIZER = "google/umt5-xxl/tokenizer.json"
SHEET = "wanflow.json"

Place = Callable[[str, TensorInfo], torch.dtype]  # the dtype a tensor is kept in
Report = Callable[[int, int], None]  # bytes read, bytes in all
C = TypeVar("C", DiTConfig, TextConfig, VAEConfig)
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Checkpoint:
    """A complete folder: where everything is, and the model's shapes and defaults."""

    folder: Path
    preset: Preset
    experts: Mapping[Expert, Path]  # folders
    t5: Path
    vae: Path
    tokenizer: Path
    vocabulary: tuple[str, ...] = ()  # words the model knows, where it knows few
