"""Record what wanflow makes (bits), offers (api) and accepts (flags), or compare with the record.

    python tests/snapshots/record.py            write bits.json, api.json and flags.json
    python tests/snapshots/record.py --check    print what differs; exit code 1 if anything does

Names `bits`, `api` or `flags` limit either to those. `refusals.json` is not written here: it holds,
for each test function of the old suite, the exceptions that its `pytest.raises` caught and the exit
codes of the wanflow commands that it ran (a negative one is the signal that ended it).

What is recorded must stay; what is new is allowed. An intended change is named in `INTENDED`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import inspect
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import av
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import wanflow

HERE = Path(__file__).parent

# {"api/models/WanDiT/forward": "why it is another one"}: paths as `differences` prints them.
# What lies below a path is allowed with it.
INTENDED: dict[str, str] = {
    "api/classes/Pipeline/__init__": "takes an `Engine` of callables; `wanflow.load` makes it",
    "api/classes/Pipeline/noise": "`TextToVideo.start` of conditioning.py",
    "api/classes/Pipeline/take_loras": "`Pipeline.check`",
    "api/classes/Pipeline/velocity": "`Engine.velocity`, and `make_velocity` of loaders",
    "api/classes/Run/recipe": "a field: a typed `Recipe`, whose `to_json` is what it was",
    "api/fields/Run/request": "a property, out of the recipe",
    "api/fields/Run/made_by": "the recipe has it, typed",
    "api/load": "also takes `progress`; keywords have types",
    "api/classes/Pipeline/generate": "also takes requests, lists and `progress`",
    "api/classes/Pipeline/finish": "also takes `on_part`",
    "api/fields/Request/seed/type": "None draws one, as -1 does",
    "api/models/WanDiT/forward": "also takes rotary positions, and which time a token has",
    "api/presets/TI2V_5B": "a `ModelSpec`; the shape that it was is its `dit`",
    "api/classes/Video/save": "also takes codec, crf and pixel_format",
    "api/classes/Request/complete": "`ModelSpec` replaces `Preset`",
    "api/classes/CompleteRequest/guidance": "the names of experts come from the model",
    **{
        f"flags/wanflow {command}/--timeout/type": "`number` of the parser reads it, with a range"
        for command in ("generate", "replay", "decode", "plan")
    },
    **{
        f"flags/wanflow {command}/--{name}/type": "read as UTF-8 in every locale"
        for command in ("generate", "plan")
        for name in ("prompt", "negative_prompt")
    },
    **{
        f"flags/wanflow {command}/--image": "a setting of its own, in place of an unused flag"
        for command in ("generate", "plan")
    },
    **{
        f"flags/wanflow {command}/--task/default": "None: the weights decide, as t2v-A14B's do"
        for command in ("generate", "plan")
    },
    "flags/wanflow download/--only/choices": "also `dit`, the one network of TI2V-5B",
    "flags/wanflow convert/--parts/default": "also `dit`, the one network of TI2V-5B",
    "flags/wanflow plan/--figures": "its tables are the page docs/explain/figures.md",
}

# Readers of flags that only add words to what they refuse.
TYPES = {"file_path": "Path"}

# Where classes live that wanflow itself does not name.
MODELS = {
    "WanDiT": "wanflow.models.dit",
    "WanVAE": "wanflow.models.vae",
    "UMT5Encoder": "wanflow.models.umt5",
}

PROMPTS = (
    "a red circle moves left on a blue background",
    "a large green square moves right on a black background",
    "a small yellow triangle rises on a gray background",
    "a purple star spins on a white background",
    "a cyan cross falls quickly on a red background",
    "an orange ball grows on a green background",
    "a white box shrinks slowly on a purple background",
    "a huge blue five-pointed star stays still on a yellow background",
    "on a black background, a tiny red plus sign goes up",
    "a turquoise triangle drifts right on a grey background",
    "a violet disc sinks downwards on a white background",
    "a yellow star gets bigger on a blue background",
    "a green cross rotates quickly on a black background",
    "a little white circle slides left on a red background",
    "an orange square does not move on a gray background",
    "a big cyan star floats upwards on a purple background",
    "a red triangle contracts on a green background",
    "a blue circle drops rapidly on a yellow background",
    "红色的圆 / a:b*c? moves left",
    "  A <b>dragon</b> &amp; a castle,\n breathing “fire”  ",
)

TINY = {"frame_num": 5, "sample_steps": 4}
SHORT = {"frame_num": 9, "sample_steps": 6}
PAIR = ("style_high_noise.safetensors", "style_low_noise.safetensors")

# Name -> (what `load` is told, what `generate` is told); `stop` is a step after which the run is
# saved, read again and continued. Prompts and seeds go by the order: add new ones at the end.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "dpm++": ({}, {"sample_solver": "dpm++", "sample_steps": 12}),
    "euler": ({}, {"sample_solver": "euler", "sample_steps": 10, "sample_shift": 3.0}),
    "one frame, wide": ({}, {"size": "128*64", "frame_num": 1, "sample_steps": 8}),
    "tall, dpm++": ({}, {**SHORT, "size": (48, 96), "sample_solver": "dpm++"}),
    "smallest, one step": ({}, {"size": "16*16", "frame_num": 1, "sample_steps": 1}),
    "odd grid, two steps": ({}, {"size": "80*112", "frame_num": 13, "sample_steps": 2}),
    "guidance of each expert": ({}, {**SHORT, "cfg_high": 6.0, "cfg_low": 1.5}),
    "guidance at the start": ({}, {**SHORT, "cfg_start": 2.0, "cfg_start_steps": 2}),
    "no guidance": ({}, {**SHORT, "cfg_high": 1.0, "cfg_low": 1.0}),
    "guidance of one expert": ({}, {**SHORT, "cfg_low": 1.0, "sample_solver": "dpm++"}),
    "negative prompt": ({}, {**SHORT, "negative_prompt": "a blurred, gray picture"}),
    "boundary": ({}, {**SHORT, "boundary": 0.5, "sample_shift": 12.0, "fps": 12.5}),
    "low expert only": ({}, {**TINY, "boundary": 0.0, "sample_solver": "euler"}),
    "lightning4": ({}, {"preset": "lightning4", "frame_num": 9, "lora": PAIR}),
    "lightning8": ({}, {"preset": "lightning8", "frame_num": 9, "cfg_low": 2.0}),
    "lightning-motion": ({}, {"preset": "lightning-motion", "frame_num": 9, "lora": PAIR}),
    "LoRA": ({}, {**SHORT, "lora": ("style.safetensors@high=1,low=0.6",)}),
    "LoRA in some steps": ({}, {**SHORT, "lora": ("style.safetensors@0.8,steps=2-4",)}),
    "two LoRAs": ({}, {**SHORT, "lora": ("style.safetensors@0.5", PAIR[1]), "lora_from": 3}),
    "fused LoRA": ({"lora": "fused"}, {**SHORT, "lora": ("style.safetensors@high=1,low=0.6",)}),
    "fused LoRA in some steps": (
        {"lora": "fused"},
        {**SHORT, "lora": ("style.safetensors@-0.5,steps=3-",)},
    ),
    "tokens in chunks": ({"chunk_tokens": 100}, {**SHORT, "size": "96*96"}),
    "tiles": ({"vae_tile": 64}, {**SHORT, "size": "112*96"}),
    "int8": ({"quantize": "int8"}, SHORT),
    "int8, all layers": ({"quantize": "int8", "quantize_layers": "all"}, TINY),
    "fp8": ({"quantize": "fp8", "quantize_layers": "all"}, SHORT),
    "nf4": ({"quantize": "nf4"}, {**SHORT, "lora": ("style.safetensors",)}),
    "nf4, all layers": ({"quantize": "nf4", "quantize_layers": "all"}, TINY),
    "one batch": ({"cfg_batch": True}, SHORT),
    "two passes": ({"cfg_batch": False}, {**SHORT, "sample_solver": "euler"}),
    "one expert at a time": ({"keep_experts": False, "prefetch": True}, SHORT),
    "streamed from disk": ({"resident_blocks": 2, "stream_from": "disk"}, SHORT),
    "streamed from RAM": (
        {"resident_blocks": 0, "stream_from": "ram", "keep_experts": False},
        {**TINY, "lora": ("style.safetensors@0.7",)},
    ),
    "bfloat16": ({"dtype": "bfloat16"}, SHORT),
    "bfloat16, int8, streamed": (
        {"dtype": "bfloat16", "quantize": "int8", "resident_blocks": 1, "stream_from": "disk"},
        TINY,
    ),
    "float16": ({"dtype": "float16", "t5_cpu": True}, TINY),
    "float32, named": ({"dtype": "float32", "attention": "math"}, TINY),
    "stopped": ({}, {**SHORT, "stop": 3}),
    "stopped, dpm++": ({}, {**SHORT, "stop": 2, "sample_solver": "dpm++"}),
}


# Bits


def bits() -> dict[str, Any]:
    """Make every case, and return what its bits come to and where that was."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder), one_thread():
        write_loras()
        made = {
            name: make(load, {"seed": 1000 + n, **request}, PROMPTS[n % len(PROMPTS)])
            for n, (name, (load, request)) in enumerate(CASES.items())
        }
    return {
        "note": "Hashes hold at this place (of files, with as many processors). Elsewhere shapes, "
        "recipes and, up to rounding, numbers must be the same.",
        "place": place(),
        "processors": os.cpu_count(),  # x264 writes into a file on how many threads it was made
        "cases": made,
    }


def place() -> dict[str, str]:
    """Return what bits depend on beside the code."""
    return {
        "torch": torch.__version__,
        "av": av.__version__,
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cpu": processor(),
    }


def processor() -> str:
    """Name the CPU, as far as the system tells."""
    file = Path("/proc/cpuinfo")
    text = file.read_text(errors="replace") if file.exists() else ""
    found = [re.search(rf"^{key}\s*:\s*(.*)$", text, re.M) for key in ("model name", "model")]
    return " / ".join(part[1] for part in found if part) or platform.processor()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread: sums in another order have other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_loras() -> None:
    """Write the LoRA files of the cases into the current folder, always the same bytes."""
    shapes = {"self_attn.q": (160, 160), "cross_attn.v": (160, 160), "ffn.0": (640, 160)}
    for seed, name in enumerate(("style.safetensors", *PAIR)):
        generator = torch.Generator().manual_seed(seed)
        tensors: dict[str, Tensor] = {}
        for block in range(6):
            for module, (out, into) in shapes.items():
                key = f"diffusion_model.blocks.{block}.{module}"
                tensors[f"{key}.lora_down.weight"] = torch.randn(4, into, generator=generator)
                up = torch.randn(out, 4, generator=generator) * 0.03
                tensors[f"{key}.lora_up.weight"] = up
                tensors[f"{key}.alpha"] = torch.tensor(2.0 + seed)
        save_file(tensors, name)


def make(load: dict[str, Any], request: dict[str, Any], prompt: str) -> dict[str, Any]:
    """Make one video, and return its hashes, its recipe and numbers that other machines give too.

    Works in the current folder, where the LoRA files are.
    """
    pipe = wanflow.load("nano", device="cpu", **load)
    stop, latents = request.pop("stop", None), []

    def on_step(told: wanflow.Progress) -> bool:
        latents.append(told.latents.clone())
        return told.step != stop

    try:
        video = pipe.generate(prompt, on_step, **request)
    except wanflow.Cancelled as cancelled:
        cancelled.run.save("run.latent.safetensors")
        video = pipe.finish(pipe.resume(wanflow.Run.load("run.latent.safetensors"), on_step))
    latent = latents[-1].float().contiguous().numpy()
    file = Path("video.png" if len(video.frames) == 1 else "video.mp4")
    # Its own recipe names a folder of this machine.
    wanflow.Video(video.frames, video.fps, {"request": {"prompt": prompt}}).save(file, True)
    return {
        "latent": sha256(latent),
        "frames": sha256(np.ascontiguousarray(video.frames)),
        "file": hashlib.sha256(file.read_bytes()).hexdigest(),
        "shapes": [list(latent.shape), list(video.frames.shape)],
        "numbers": {
            "latent mean": round(float(latent.mean()), 4),
            "latent deviation": round(float(latent.std()), 4),
            "frames mean": round(float(video.frames.mean() / 255), 4),
            "frames deviation": round(float(video.frames.std() / 255), 4),
        },
        "recipe": portable(video.recipe),
    }


def sha256(values: np.ndarray[Any, Any]) -> str:
    """Hash the bytes of an array."""
    return hashlib.sha256(values.tobytes()).hexdigest()


def portable(recipe: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a recipe what belongs to this machine: the model's folder, and versions."""
    kept = {key: value for key, value in recipe.items() if key != "versions"}
    kept["model"] = {key: value for key, value in kept["model"].items() if key != "folder"}
    return plain(kept)


# The public API


def api() -> dict[str, Any]:
    """Return names, signatures, fields with their defaults, and published numbers."""
    nano = wanflow.presets.NANO
    # By the names of the time of the record, whatever a class is called today.
    values: dict[str, Any] = {
        "Pipeline": wanflow.Pipeline,
        "Run": wanflow.Run,
        "Progress": wanflow.Progress,
        "Video": wanflow.Video,
        "Request": wanflow.Request,
        "CompleteRequest": type(wanflow.Request("x").complete(nano)),
        "Runtime": wanflow.Runtime,
        "Preset": type(nano),
        "DiTConfig": type(nano.dit),
        "TextConfig": type(nano.text),
        "VAEConfig": type(nano.vae),
    }
    models = {name: getattr(import_module(module), name) for name, module in MODELS.items()}
    errors = (wanflow.RequestError, wanflow.Cancelled, wanflow.OutputError)
    solvers = get_type_hints(values["CompleteRequest"])["sample_solver"]
    return {
        "wanflow": {name: kind(getattr(wanflow, name)) for name in wanflow.__all__},
        "dir": dict.fromkeys(dir(wanflow), True),
        "load": signature(wanflow.load),
        "classes": {name: methods(cls) for name, cls in values.items()},
        "fields": {n: fields(cls) for n, cls in values.items() if dataclasses.is_dataclass(cls)},
        "errors": {cls.__name__: [base.__name__ for base in cls.__mro__] for cls in errors},
        "models": {name: methods(cls) for name, cls in models.items()},
        "solvers": list(get_args(solvers)),
        "presets": {
            name: plain(dataclasses.asdict(getattr(wanflow.presets, name)))
            for name in ("T2V_A14B", "NANO", "TI2V_5B")
        },
        "settings": plain(wanflow.presets.SETTINGS),
    }


def kind(value: object) -> str:
    """Say what sort of thing a public name is."""
    if inspect.isclass(value):
        return "class"
    return "module" if inspect.ismodule(value) else type(value).__name__


def signature(function: Callable[..., Any]) -> str:
    """Return a signature as text, with functions that are defaults by their names."""
    return re.sub(r"<function (\S+) at 0x[0-9a-f]+>", r"\1", str(inspect.signature(function)))


def methods(cls: type) -> dict[str, str]:
    """Return the signatures of a class' public methods, as far as wanflow defines them.

    What a dataclass is made of is the matter of `fields`.
    """
    made_by = [] if dataclasses.is_dataclass(cls) else ["__init__"]
    found = {}
    for name in [*made_by, *(name for name in dir(cls) if not name.startswith("_"))]:
        owner = next(base for base in cls.__mro__ if name in vars(base))
        value = vars(owner)[name]
        if not owner.__module__.startswith("wanflow"):
            continue
        if isinstance(value, property):
            found[name] = "property"
        elif inspect.isfunction(value) or isinstance(value, classmethod | staticmethod):
            found[name] = signature(getattr(cls, name))
    return found


def fields(cls: Any) -> dict[str, Any]:
    """Return the fields of a dataclass with types and defaults, as text."""
    return {
        field.name: {
            "type": field.type if isinstance(field.type, str) else repr(field.type),
            "default": "required" if field.default is dataclasses.MISSING else repr(field.default),
        }
        for field in dataclasses.fields(cls)
    }


# The command line


def flags() -> dict[str, Any]:
    """Return every command's flags and positionals."""
    from wanflow.cli import build_parser

    return dict(commands(build_parser(), "wanflow"))


def commands(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, Any]]:
    """Give what a parser takes, then the same of its commands."""
    found, below = {}, []
    for action in parser._actions:
        found[action.option_strings[0] if action.option_strings else action.dest] = taken(action)
        if isinstance(action, argparse._SubParsersAction):
            below = [(f"{name} {command}", sub) for command, sub in action.choices.items()]
    yield name, found
    for command, sub in below:
        yield from commands(sub, command)


def taken(action: argparse.Action) -> dict[str, Any]:
    """Return what one flag or positional takes, and what stands where it is left out."""
    several = isinstance(action, argparse._SubParsersAction)  # its commands are recorded one by one
    return {
        "options": list(action.option_strings),
        "dest": action.dest,
        "kind": type(action).__name__,
        "type": TYPES.get(kind := getattr(action.type, "__name__", None), kind),
        "default": simple(action.default),
        "const": simple(action.const),
        "choices": None if several or action.choices is None else [*map(simple, action.choices)],
        "nargs": action.nargs,
        "required": action.required,
        "hidden": action.help == argparse.SUPPRESS,
    }


def simple(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


# Comparing


def plain(value: Any) -> Any:
    """Return a value as it comes back from JSON: tuples as lists."""
    return json.loads(json.dumps(value))


def differences(recorded: Any, found: Any, path: str) -> list[str]:
    """Say what was recorded and is gone or another; what is new, and what `INTENDED` names, is not.

    Args:
        path: names what is compared, parts between slashes; an empty list means no difference.
    """
    if path in INTENDED:
        return []
    if not isinstance(recorded, dict) or not isinstance(found, dict):
        return [] if recorded == found else [f"{path}: was {recorded!r}, is {found!r}"]
    lines = []
    for key, value in recorded.items():
        below = f"{path}/{key}"
        if key in found:
            lines += differences(value, found[key], below)
        elif below not in INTENDED:
            lines.append(f"{below}: is gone")
    return lines


def bits_differences(recorded: dict[str, Any], found: dict[str, Any], path: str) -> list[str]:
    """Compare bits: all of them at the place where they were recorded, elsewhere what holds there.

    Numbers, which differ by rounding elsewhere, may be off by 0.03.
    """
    here = recorded["place"] == found["place"]
    file = ["file"] if here and recorded["processors"] == found["processors"] else []
    exact = ["shapes", "recipe", *(["latent", "frames", "numbers"] if here else []), *file]
    before = {name: {key: case[key] for key in exact} for name, case in recorded["cases"].items()}
    lines = differences(before, found["cases"], path)
    for name, case in () if here else recorded["cases"].items():
        for key, value in case["numbers"].items():
            is_now = found["cases"].get(name, case)["numbers"][key]
            if not abs(is_now - value) <= 0.03 and f"{path}/{name}" not in INTENDED:
                lines.append(f"{path}/{name}/numbers/{key}: was {value}, is {is_now}")
    return lines


RECORDS: dict[str, Callable[[], dict[str, Any]]] = {"flags": flags, "api": api, "bits": bits}


def recorded(name: str) -> dict[str, Any]:
    """Read what was recorded under a name."""
    return dict(json.loads((HERE / f"{name}.json").read_text(encoding="utf-8")))


def check(name: str) -> list[str]:
    """Compare what is with what was recorded under a name; an empty list means the same."""
    before, now = recorded(name), plain(RECORDS[name]())
    return (bits_differences if name == "bits" else differences)(before, now, name)


def write(name: str) -> None:
    """Record what is."""
    text = json.dumps(RECORDS[name](), indent=1, ensure_ascii=False)
    (HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def main() -> int:
    """Write, or compare and return 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECORDS)}")
    args = parser.parse_args()
    print(f"wanflow is {Path(wanflow.__file__).parent}")
    different = 0
    for name in args.names or RECORDS:
        if not args.check:
            write(name)
            continue
        lines = check(name)
        different += len(lines)
        print("\n".join([f"{name}: {len(lines)} differences", *lines]))
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
