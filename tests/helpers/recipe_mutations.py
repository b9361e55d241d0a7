"""Recipes of strangers: by the schema of a request and a runtime, and as JSON of any kind."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from random import Random
from typing import Any

from helpers.mutations import NAMES, NUMBERS, VALUES, dump, nested, of_value, text
from helpers.strangers import Attempt
from wanflow.recipe import Recipe
from wanflow.request import Request
from wanflow.runtime import Runtime
from wanflow.settings import Setting, settings_of
from wanflow.untrusted import parse_json

GOOD: dict[str, Any] = {
    "request": {
        "prompt": "a red circle moves left on a blue background",
        "negative_prompt": "",
        "size": [64, 64],
        "frame_num": 1,
        "sample_solver": "unipc",
        "sample_steps": 2,
        "sample_shift": 5.0,
        "cfg_high": 4.0,
        "cfg_low": 3.0,
        "boundary": 0.875,
        "fps": 8,
        "seed": 7,
        "lora": [],
        "cfg_start": 1.0,
        "cfg_start_steps": 0,
    },
    "model": {"name": "nano", "folder": "nano", "fingerprint": "0123456789abcdef", "parts": {}},
    "runtime": {
        "device": "cpu",
        "dtype": "float32",
        "t5_cpu": False,
        "lora": "live",
        "chunk_tokens": 0,
        "vae_tile": 0,
        "quantize": "",
        "quantize_layers": "ffn",
        "attention": "auto",
        "layout": "one process",
    },
    "versions": {"wanflow": "0.1.0", "torch": "2.10", "python": "3.12", "machine": "x86_64"},
    "noise_device": "cpu",
    "cfg_batch": None,
    "loras": {},
}
# What a stranger's recipe would like to have read.
PATHS = (
    "/dev/zero",
    "/dev/stdin",
    "/etc/passwd",
    "/proc/self/mem",
    "/",
    "~nosuchuser/x",
    "~/x.safetensors",
    "../../x.safetensors",
    "\\\\host\\share\\x.safetensors",
    "http://127.0.0.1:9/x.safetensors",
    "x\0.safetensors",
    "x\nwanflow: saved /tmp/y.mp4",
    "\x1b]0;title\x07.safetensors",
    "a" * 5000,
    "/" * 3000,
    "-",
    "@",
    "",
)
PROMPTS = (
    "",
    " \n",
    "&" + "amp;" * 4000,
    "&" + "amp;" * 300_000,
    "x" * 2_000_000,
    "红" * 30_000,
    "\ud800",
    "\x1b[2J",
    "Ã©" * 5000,
    "\u0301" * 15_000,
    "\u202e" * 300,
)


def values_of(rng: Random, one: Setting) -> Any:
    """A value at, beyond or next to what a setting takes, or of another type."""
    found: list[Any] = [*VALUES, *NUMBERS]
    if one.range is not None:
        low, high = (-(2**63) if end == -math.inf else end for end in one.range)
        high = 2**31 if high == math.inf else high
        found += [low, low - 1, high, high + 1, (low + high) // 2, float(high), str(low)] * 4
    if one.choices:
        found += [*one.choices, *(choice.upper() for choice in one.choices), ""] * 4
    if bool in one.types:
        found += [True, False, 0, 1, "true"] * 4
    if str in one.types:
        found += [*NAMES, *PATHS]
    return rng.choice(found)


def of_request(rng: Random, recipe: dict[str, Any]) -> None:
    held = recipe["request"]
    name = rng.choice([*held, "prompt", "lora", "lora", "size"])
    loras = [f"{rng.choice(PATHS)}{rng.choice(('', '@0.5', '@high=1', '@nan', '@1,steps=3-'))}"]
    if name in ("prompt", "negative_prompt"):
        held[name] = rng.choice((*PROMPTS, *VALUES))
    elif name == "lora":
        held[name] = rng.choice((loras, loras * 65, loras * 1000, [text(rng, loras[0])]))
        recipe["loras"] = rng.choice(({}, dict.fromkeys(held[name], "0" * 16)))
    elif name == "size":
        sides = (16, 64, 0, -16, 17, 1 << 20, 2**63, 1e999, 64.5, "64", None, True, [])
        held[name] = [rng.choice(sides) for _ in range(rng.choice((1, 2, 2, 2, 3)))]
    else:
        held[name] = values_of(rng, settings_of(Request)[name])


def of_model(rng: Random, recipe: dict[str, Any]) -> None:
    held = recipe["model"]
    name = rng.choice(("name", "folder", "folder", "fingerprint", "parts", "parts"))
    if name == "parts":
        part = rng.choice(("high", "low", "t5", "vae", "tokenizer", "", "__class__", 5))
        held[name] = rng.choice(({str(part): rng.choice((*PATHS, *VALUES))}, rng.choice(VALUES)))
    else:
        held[name] = rng.choice((*PATHS, *NAMES, *VALUES))
    if rng.random() < 0.3:
        held["name"] = rng.choice(("t2v-A14B", "x", "nano"))


def of_runtime(rng: Random, recipe: dict[str, Any]) -> None:
    held = recipe["runtime"]
    name = rng.choice([*held, *(one.name for one in settings_of(Runtime).values())])
    known = settings_of(Runtime)
    held[name] = values_of(rng, known[name]) if name in known else rng.choice(VALUES)


def of_rest(rng: Random, recipe: dict[str, Any]) -> None:
    name = rng.choice(("versions", "loras", "noise_device", "cfg_batch"))
    words: dict[str, Any] = {rng.choice(NAMES): rng.choice((*NAMES, *VALUES)) for _ in range(3)}
    many = {f"{n}.safetensors": "0" * 16 for n in range(rng.choice((2, 300, 30_000)))}
    recipe[name] = rng.choice((words, many, *VALUES))


def recipe_value(rng: Random, good: dict[str, Any] = GOOD) -> dict[str, Any]:
    """A recipe in which one to four things are otherwise."""
    recipe = copy.deepcopy(good)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        change = rng.choice((of_request, of_request, of_model, of_runtime, of_rest, None))
        try:
            if change is not None:
                change(rng, recipe)
            elif rng.random() < 0.2:
                recipe[rng.choice(list(recipe))] = nested(rng.choice((60, 70, 900)))
            else:
                recipe = of_value(rng, recipe)
        except (TypeError, KeyError, IndexError, AttributeError):  # bent before
            break
    return recipe


def recipe_text(rng: Random, good: dict[str, Any] = GOOD) -> bytes:
    """A recipe as a file holds it; one in five is odd as JSON too."""
    value = recipe_value(rng, good)
    return dump(rng, value) if rng.random() < 0.2 else json.dumps(value).encode()


def recipe(folder: Path) -> Attempt:
    """What `replay` reads out of a video."""

    def attempt(rng: Random) -> None:
        source = folder / "x.png"
        Recipe.from_json(parse_json(recipe_text(rng), source), source).settings()

    return attempt
