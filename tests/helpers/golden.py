"""The reference numbers: manifests, tensors, comparison. WANFLOW_GOLDEN names another folder."""

from __future__ import annotations

import json
import math
import os
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from wanflow.config import DiTConfig, from_mapping
from wanflow.models.dit import WanDiT
from wanflow.sampling.schedule import Schedule, make_schedule

FOLDER = Path(os.environ.get("WANFLOW_GOLDEN") or Path(__file__).parents[1] / "golden")
KINDS = ("dit", "vae", "t5", "solvers", "pipeline", "sizes")
Json = dict[str, Any]
M = TypeVar("M", bound=nn.Module)


def read_manifests(folder: Path = FOLDER, kinds: tuple[str, ...] = KINDS) -> dict[str, Json]:
    """The folder's manifests by their `kind`."""
    found = (json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json")))
    return {
        manifest["kind"]: manifest
        for manifest in found
        if isinstance(manifest, dict) and manifest.get("kind") in kinds
    }


MANIFESTS = read_manifests()
DIT: Json = MANIFESTS.get("dit", {"models": {}})
VAE: Json = MANIFESTS.get("vae", {"cases": []})
T5: Json = MANIFESTS.get("t5", {"cases": []})
SOLVERS: Json = MANIFESTS.get("solvers", {"runs": [], "expert_rule": {}})
PIPELINE: Json = MANIFESTS.get("pipeline", {"runs": []})
SIZES: Json = MANIFESTS.get("sizes", {"modules": {}})


@cache
def tensors(file: str) -> dict[str, Tensor]:
    return load_file(FOLDER / file)  # a whole path leads to another folder


def stored(file: str, key: str, entry: Json) -> Tensor:
    """A stored tensor, checked against what its manifest says of it."""
    tensor = tensors(file)[key]
    assert (
        list(tensor.shape) == entry["shape"] and str(tensor.dtype) == f"torch.{entry['dtype']}"
    ), f"{file}: {key} is not as its manifest says"
    return tensor


def case_tensors(file: str, case: Json, entries: str = "tensors") -> dict[str, Tensor]:
    """A case's tensors, without its name in front."""
    return {
        key.removeprefix(f"{case['name']}."): stored(file, key, entry)
        for key, entry in case.get(entries, {}).items()
    }


def close(actual: Tensor, expected: Tensor, tolerance: Json, what: str) -> None:
    """|a - b| <= atol + rtol |b|, b being the stored value."""
    assert actual.shape == expected.shape, (
        f"{what}: shape {list(actual.shape)}, stored {list(expected.shape)}"
    )
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, stored {expected.dtype}"
    far = (actual.double() - expected.double()).abs()
    allowed = tolerance["atol"] + tolerance["rtol"] * expected.double().abs()
    worst = int((far / allowed.clamp_min(1e-300)).argmax())
    # written so that NaN fails
    assert bool((far <= allowed).all()), (
        f"{what}: off by {far.flatten()[worst]:.3g} where {allowed.flatten()[worst]:.3g} is allowed"
    )


def filled(module: M, file: str, manifest: Json) -> M:
    """A module with the weights of a file, every one of them and no other."""
    weights = {key: stored(file, key, entry) for key, entry in manifest["weights"].items()}
    assert weights.keys() == tensors(file).keys()
    module.load_state_dict(weights, strict=True)
    assert sum(p.numel() for p in module.parameters()) == manifest.get(
        "parameters", sum(w.numel() for w in weights.values())
    )
    return module.eval().requires_grad_(False)


def schedule_of(run: Json) -> Schedule:
    return make_schedule(run["solver"], run["steps"], run["shift"])


@cache
def expert(name: str) -> WanDiT:
    network = WanDiT(from_mapping(DiTConfig, PIPELINE["config"], "pipeline.json"))
    return filled(network, PIPELINE[f"{name}_weights_file"], {"weights": PIPELINE["weights"]})


def check_full_size(entry: Json, build: Any, config: Any) -> None:
    """Compare names, shapes, dtypes, order and bytes of a full-size module, built on meta."""
    with torch.device("meta"):
        state = build(from_mapping(config, entry["config"], entry["module"])).state_dict()
    described = {
        key: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        for key, value in state.items()
    }
    assert described == entry["state"]
    count = sum(math.prod(value.shape) for value in state.values())
    assert len(state) == entry["tensors"]
    assert (count, count * 4, count * 2) == (
        entry["parameters"],
        entry["bytes_fp32"],
        entry["bytes_bf16"],
    )
