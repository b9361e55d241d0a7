"""Recipes of strangers: by the schema of a request and a runtime, and as JSON of any kind."""

from __future__ import annotations

import copy
import json
import math
import struct
import zlib
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from helpers.mutations import (
    NAMES,
    NUMBERS,
    VALUES,
    dump,
    nested,
    of_bytes,
    of_safetensors,
    of_value,
    text,
)
from helpers.strangers import Attempt, command
from wanflow.request import Request
from wanflow.runtime import Runtime
from wanflow.settings import Setting, settings_of

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
        "compile": "off",
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
    if rng.random() < 0.1:
        held[rng.choice(("image", "last_image"))] = of_picture(rng)
    elif name in ("prompt", "negative_prompt"):
        held[name] = rng.choice((*PROMPTS, *VALUES))
    elif name == "lora":
        held[name] = rng.choice((loras, loras * 65, loras * 1000, [text(rng, loras[0])]))
        recipe["loras"] = rng.choice(({}, dict.fromkeys(held[name], "0" * 16)))
    elif name == "size":
        sides = (16, 64, 0, -16, 17, 1 << 20, 2**63, 1e999, 64.5, "64", None, True, [])
        held[name] = [rng.choice(sides) for _ in range(rng.choice((1, 2, 2, 2, 3)))]
    else:
        held[name] = values_of(rng, settings_of(Request)[name])


def of_picture(rng: Random) -> Any:
    """What a recipe keeps of a picture, or something else in its place."""
    record: dict[str, Any] = {"sha256": "0f" * 32, "width": 64, "height": 48, "file": "x.png"}
    changes = (
        ("file", (*PATHS, *VALUES)),
        ("sha256", ("0F" * 32, "0" * 63, "x" * 64, "0" * 64 + "\n", *VALUES)),
        (rng.choice(("width", "height")), (0, -1, 1 << 20, 2**63, 1.5, True, "64", *VALUES)),
        ("extra", VALUES),
    )
    name, values = rng.choice(changes)
    record[name] = rng.choice(values)
    if rng.random() < 0.2:
        del record[rng.choice(list(record))]
    return rng.choice((record, record, record, record, [record], str(record), rng.choice(VALUES)))


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


def fingerprinted() -> dict[str, Any]:
    """A good recipe of the miniature as it is here."""
    from wanflow.assemble import model_record
    from wanflow.opening import resolve

    here = model_record(resolve("nano"))
    return {**GOOD, "model": {**GOOD["model"], **asdict(here)}}


def up_to_the_weights() -> None:
    """Let commands end where a run would begin: its LoRAs are read, its first step is not taken."""
    from wanflow.cli import generate

    def check(pipe: Any, run: Any, *_: Any) -> None:
        pipe.check(run)

    generate.run_and_save = check


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(rng: Random, good: bytes, text: bytes) -> bytes:
    """A PNG with a text in one of the four ways that PNG knows, or with too much of it."""
    key = b"wanflow\0"
    bomb = zlib.compress(b" " * (64 << 20)) if rng.random() < 0.02 else zlib.compress(text)
    made = rng.choice(
        (
            chunk(b"iTXt", key + b"\0\0\0\0" + text),
            chunk(b"iTXt", key + b"\0\0\0\0" + text),
            chunk(b"iTXt", key + b"\0\0\0\0" + text)
            * rng.choice((1, 2, 300 if len(text) < 10_000 else 3)),
            chunk(b"iTXt", key + b"\1\0\0\0" + bomb),
            chunk(b"zTXt", key + b"\0" + bomb),
            chunk(b"tEXt", key + text),
        )
    )
    head = bytearray(good[:33])
    if rng.random() < 0.1:  # other sides
        sides = (rng.choice((0, 1, 16, 30_000, 2**31 - 1, 2**32 - 1)) for _ in range(2))
        head[16:24] = struct.pack(">II", *sides)
        head[29:33] = struct.pack(">I", zlib.crc32(head[12:29]))
    return bytes(head) + made + good[33:]


def clips(folder: Path, good: dict[str, Any]) -> dict[str, bytes]:
    """A good file of every kind that holds a recipe, by suffix."""
    from wanflow import Video

    frames = np.random.default_rng(0).integers(0, 255, (1, 16, 16, 3), np.uint8)
    files = {}
    for suffix in (".png", ".mp4", ".webm", ".mkv", ".gif", ".apng"):
        place = folder / f"good{suffix}"
        Video(frames, 8, good).save(place)
        files[suffix] = place.read_bytes()
    return files


def recipe(folder: Path) -> Attempt:
    """A video or a picture of a stranger: what `inspect`, `replay` and `--recipe` make of it."""
    good = fingerprinted()
    files = clips(folder, good)
    up_to_the_weights()

    def attempt(rng: Random) -> tuple[int, str, str]:
        suffix = rng.choice((".png", ".png", ".png", *files))
        path = folder / f"x{suffix}"
        if suffix == ".png" and rng.random() < 0.85:
            path.write_bytes(png_with(rng, files[suffix], recipe_text(rng, good)))
        else:
            raw = json.dumps(good).encode()
            odd = files[suffix].replace(raw, recipe_text(rng, good)[: len(raw)].ljust(len(raw)))
            path.write_bytes(odd if rng.random() < 0.5 else of_bytes(rng, files[suffix]))
        return hand_in(rng, path, ["replay", str(path)])

    return attempt


def hand_in(rng: Random, path: Path, make: list[str]) -> tuple[int, str, str]:
    """Inspect a file, or make the video of its recipe, with flags that a person may add."""
    if rng.random() < 0.3:
        return command(["inspect", str(path), *(["--json"] if rng.random() < 0.5 else [])])
    if rng.random() < 0.1:
        make = ["generate", "--recipe", str(path)]
    flags = [flag for flag in ("--force", "--trust_paths") if rng.random() < 0.3]
    flags += ["--lora_dir", str(path.parent)] if rng.random() < 0.2 else []
    flags += ["--ckpt_dir", "nano"] if rng.random() < 0.3 else []
    # Without a name of ours the target would lie beside files of other seeds.
    return command([*make, *flags, "--overwrite", "--save_file", str(path.parent / "out.mp4")])


def of_state(rng: Random, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state with one of another shape, kind or content, or too many or few."""
    found = dict(tensors)
    name = rng.choice(list(found))
    x = found[name]
    odd: tuple[Tensor | None, ...] = (
        None,
        x[:, :8],
        x[..., :1],
        x.repeat(1, 1, 1, 1, 2),
        x.flatten(),
        torch.zeros(()),
        torch.zeros(0),
        x.bool(),
        x.to(torch.float8_e4m3fn),
        x.to(torch.int8),
        x.half(),
        x.double(),
        x * float("nan"),
        x * 1e38 * 1e10,
        x * 1e30,
        torch.zeros_like(x),
        x.to(torch.complex64),
    )
    value = rng.choice(odd)
    if value is None:
        del found[name]
    else:
        found[rng.choice((name, name, name, text(rng, name)))] = value
    return found


def saved_run(folder: Path) -> Attempt:
    """A saved run of a stranger: what `inspect`, `--resume` and `decode` make of it."""
    good = fingerprinted()
    up_to_the_weights()
    shape, path = (1, 16, 1, 8, 8), folder / "x.latent.safetensors"
    state = {name: torch.randn(shape) for name in ("x", "data.0", "origin")}

    def attempt(rng: Random) -> tuple[int, str, str]:
        finished = rng.random() < 0.4
        recipe = recipe_value(rng, good) if rng.random() < 0.6 else good
        stored: dict[str, Any] = {"recipe": recipe, "index": 2 if finished else 1, "id": "0" * 16}
        if rng.random() < 0.4:
            stored[rng.choice(("index", "id"))] = rng.choice((*VALUES, *NAMES, -1, 3, 1.0))
        tensors = of_state(rng, state) if rng.random() < 0.5 else state
        said = dump(rng, stored) if rng.random() < 0.1 else json.dumps(stored).encode()
        metadata = {"wanflow": said.decode("utf-8", "replace")}
        tensors = {name.encode("utf-8", "replace").decode(): x for name, x in tensors.items()}
        data = save({key: value.contiguous().clone() for key, value in tensors.items()}, metadata)
        path.write_bytes(of_safetensors(rng, data) if rng.random() < 0.2 else data)
        make = ["decode", str(path)] if finished else ["generate", "--resume", str(path)]
        return hand_in(rng, path, make)

    return attempt
