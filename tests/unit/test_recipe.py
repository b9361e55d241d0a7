"""Recipes: what any version wrote is read, and what is written is what every version reads."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from wanflow.config import RequestError
from wanflow.presets import NANO
from wanflow.recipe import Recipe
from wanflow.request import Request
from wanflow.runtime import runtime_of

# As version 0.1.0 wrote it.
RECIPE: dict[str, Any] = {
    "request": {
        "prompt": "a red circle",
        "negative_prompt": "",
        "size": [64, 64],
        "frame_num": 5,
        "sample_solver": "unipc",
        "sample_steps": 2,
        "sample_shift": 5.0,
        "cfg_high": 4.0,
        "cfg_low": 3.0,
        "boundary": 0.875,
        "fps": 8,
        "seed": 7,
        "lora": ["a.safetensors@high=1.0,low=0.6"],
        "cfg_start": 1.0,
        "cfg_start_steps": 0,
    },
    "model": {
        "name": "nano",
        "folder": "/somewhere/nano",
        "fingerprint": "0123456789abcdef",
        "parts": {"high": "/elsewhere/high.safetensors"},
    },
    "runtime": {
        "device": "cpu",
        "dtype": "float32",
        "t5_cpu": False,
        "lora": "fused",
        "chunk_tokens": 0,
        "vae_tile": 64,
        "quantize": "fp8",
        "quantize_layers": "all",
        "attention": "math",
        "compile": "off",
        "layout": "1",
    },
    "versions": {"wanflow": "0.1.0", "torch": "2.10", "python": "3.12", "machine": "x86_64"},
    "noise_device": "cpu",
    "cfg_batch": None,
    "loras": {"a.safetensors": "fedcba9876543210"},
}


def changed(path: str, value: object) -> dict[str, Any]:
    """Return RECIPE with one value replaced; `...` removes it."""
    recipe = copy.deepcopy(RECIPE)
    *above, last = path.split(".")
    holder = recipe
    for name in above:
        holder = holder[name]
    if value is ...:
        del holder[last]
    else:
        holder[last] = value
    return recipe


def test_it_is_written_as_it_was_read() -> None:
    written = json.dumps(Recipe.from_json(RECIPE, "old.mp4").to_json())
    assert written == json.dumps(RECIPE)  # the order of the keys too


def test_the_settings_of_a_recipe() -> None:
    runtime = runtime_of(Recipe.from_json(RECIPE, "old.mp4"))
    assert (runtime.device, runtime.dtype, runtime.attention) == ("cpu", "float32", "math")
    assert (runtime.lora, runtime.quantize, runtime.quantize_layers) == ("fused", "fp8", "all")
    assert (runtime.t5_cpu, runtime.chunk_tokens, runtime.vae_tile) == (None, None, 64)
    assert (runtime.noise_device, runtime.cfg_batch, runtime.resident_blocks) == ("cpu", None, None)


@pytest.mark.parametrize(
    "path",
    [
        "request.lora",
        "request.cfg_start",
        "request.cfg_start_steps",
        "model.parts",
        "loras",
        *(f"runtime.{name}" for name in RECIPE["runtime"] if name not in ("device", "dtype")),
    ],
)
def test_older_recipes_lack_some_keys(path: str) -> None:
    recipe = Recipe.from_json(changed(path, ...), "old.mp4")
    assert Recipe.from_json(recipe.to_json(), "again.mp4") == recipe
    settings = runtime_of(recipe)
    assert settings.lora in ("fused", "live") and settings.quantize in ("fp8", "")


@pytest.mark.parametrize(
    "path",
    [
        "request",
        "request.prompt",
        "request.boundary",
        "model",
        "model.fingerprint",
        "runtime",
        "runtime.device",
        "runtime.dtype",
        "versions",
        "noise_device",
        "cfg_batch",
    ],
)
def test_what_is_missing_is_named(path: str) -> None:
    with pytest.raises(RequestError, match=f"old.mp4.*{path.split('.')[-1]}"):
        Recipe.from_json(changed(path, ...), "old.mp4")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("request", []),
        ("request.size", [64]),
        ("request.size", [65, 64]),
        ("request.negative_prompt", 3),
        ("request.sample_steps", 2.5),
        ("request.sample_solver", "heun"),
        ("request.sample_shift", float("nan")),
        ("request.lora", "a.safetensors"),
        ("request.lora", None),
        ("request.lora", [1]),
        ("request.unknown", 1),
        ("model", "nano"),
        ("model.name", 1),
        ("model.parts", ["high"]),
        ("model.parts", {"high": 1}),
        ("runtime", None),
        ("runtime.device", 1),
        ("runtime.t5_cpu", "yes"),
        ("runtime.lora", "both"),
        ("runtime.chunk_tokens", -1),
        ("runtime.vae_tile", "64"),
        ("runtime.quantize", "fp4"),
        ("runtime.attention", 3),
        ("versions", "0.1.0"),
        ("versions", {"torch": 2}),
        ("noise_device", "tpu"),
        ("cfg_batch", "yes"),
        ("loras", ["a"]),
        ("loras", {"a": 1}),
        ("loras", {str(number): "0" for number in range(200)}),
        ("model.folder", "x" * 5000),
        ("model.parts", {"x" * 5000: "high"}),
        ("request.prompt", "x" * 20_001),
        ("request.negative_prompt", ["x"]),
        ("request.size", [float("inf"), 16]),
        ("request.size", [64.5, 64]),
        ("request.size", [2**63, 2**63]),
        ("request.frame_num", 2**63 + 1),
        ("request.seed", True),
        pytest.param("request.seed", 10**5000, id="digits"),
        ("request.lora", ["a"] * 65),
        ("request.lora", ["a" * 5000]),
        ("runtime.device", None),
        ("runtime.device", {}),
        ("runtime.attention", ["x"]),
        ("runtime.layout", [[]]),
    ],
)
def test_what_is_of_another_type_or_range_is_refused(path: str, value: object) -> None:
    with pytest.raises(RequestError, match=r"old\.mp4") as refused:
        runtime_of(Recipe.from_json(changed(path, value), "old.mp4"), "old.mp4")
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("value", [None, [], "recipe", 3, {}])
def test_what_is_no_recipe_is_refused(value: object) -> None:
    with pytest.raises(RequestError, match=r"old\.mp4"):
        Recipe.from_json(value, "old.mp4")


def test_a_drawn_seed_can_be_typed_and_a_longer_one_given() -> None:
    assert all(Request("x").complete(NANO).seed < 2**32 for _ in range(20))
    assert Request("x", seed=2**63 - 1).complete(NANO).seed == 2**63 - 1
