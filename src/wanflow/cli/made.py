"""Show how a video, a picture or a saved run was made: its recipe, how far it is, what goes on."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wanflow.cli.trust import named_files
from wanflow.recipe import Recipe
from wanflow.request import PICTURES
from wanflow.runtime import runtime_of
from wanflow.untrusted import open_regular, printable

# How files that can hold a recipe begin, from the given byte on.
MAGICS = (
    (0, b"\x89PNG\r\n\x1a\n"),
    (0, b"GIF8"),
    (4, b"ftyp"),
    (0, b"\x1aE\xdf\xa3"),  # Matroska, WebM
    (0, b"RIFF"),
    (0, b"\xff\xd8\xff"),
)
RUN = b'"wanflow":"{\\"recipe\\"'  # in the header of a saved run
LONGEST_PROMPT = 2000


def is_made(path: Path) -> bool:
    """Return whether a path is a video, a picture, a folder of frames or a saved run."""
    if path.is_dir():
        return (path / "recipe.json").exists()
    return _is_run(path) or any(_head(path)[at:].startswith(magic) for at, magic in MAGICS)


def show_made(args: argparse.Namespace, path: Path) -> None:
    """Print the recipe of a file.

    Raises:
        RequestError: if it holds none, or it is damaged.
    """
    step = None
    if _is_run(path):
        from wanflow.pipeline import Run

        recipe, step, _ = Run.header(path)
    else:
        from wanflow.clipfiles import read_recipe

        recipe = Recipe.from_json(read_recipe(path), path)
    runtime_of(recipe, path)  # checks its settings
    files = named_files(recipe, saved=step is not None)
    command = _command(path, recipe, step)
    document: dict[str, Any] = {
        "path": str(path),
        "kind": "video" if step is None else "saved run",
        "recipe": recipe.to_json(),
        "files": [{"what": what, "path": file} for what, file in files],
        "command": command,
    }
    if step is not None:
        steps = recipe.request.sample_steps
        document |= {"step": step, "steps": steps, "finished": step == steps}
    rows = [*_rows(recipe), *_ending(recipe, step, command, bool(files))]
    width = max(len(name) for name, _ in rows)
    lines = [("", printable(path)), *(("", f"  {name:<{width}}  {text}") for name, text in rows)]
    args.output.page(lines, **document)


def _head(path: Path, size: int = 16) -> bytes:
    with open_regular(path) as file:
        return file.read(size)


def _is_run(path: Path) -> bool:
    return path.suffix == ".safetensors" and RUN in _head(path, 1 << 16)


def _rows(recipe: Recipe) -> Iterator[tuple[str, str]]:
    request, model, runtime = recipe.request, recipe.model, recipe.runtime
    yield "prompt", printable(request.prompt, LONGEST_PROMPT)
    yield "negative prompt", printable(request.negative_prompt, LONGEST_PROMPT) or "none"
    for name in PICTURES:
        if (record := getattr(request, name)) is not None:
            file = f", from {printable(record.file)}" if record.file else ""
            yield name.replace("_", " "), f"{record}{file}"
    yield "size", f"{'*'.join(map(str, request.size))}, {request.frame_num} frames"
    yield "frame rate", f"{request.fps:g} a second"
    solver = f"{request.sample_steps}, {request.sample_solver}, shift {request.sample_shift:g}"
    yield "steps", solver + (f", boundary {request.boundary:g}" if request.boundary else "")
    guidance = f"{request.cfg_high:g} high, {request.cfg_low:g} low"
    if request.cfg_high == request.cfg_low:
        guidance = f"{request.cfg_low:g}"
    if request.cfg_start_steps:
        guidance += f", {request.cfg_start:g} in the first {request.cfg_start_steps} steps"
    yield "guidance", guidance
    yield "seed", f"{request.seed}, noise from {recipe.noise_device}"
    name, folder = printable(model.name), printable(model.folder)
    yield "model", f"{name}, {printable(model.fingerprint)}, from {folder}"
    for part, file in model.parts.items():
        yield printable(part), printable(file)
    for lora in request.lora:
        yield "LoRA", printable(lora)
    computed = (f"{key} {value}" for key, value in runtime.items() if value not in ("", None))
    yield "computed with", printable(", ".join(computed))
    made = (f"{program} {version}" for program, version in recipe.versions.items())
    yield "versions", printable(", ".join(made))


def _ending(
    recipe: Recipe, step: int | None, command: str, names_files: bool
) -> Iterator[tuple[str, str]]:
    steps = recipe.request.sample_steps
    if step is not None:
        yield "done", f"step {step} of {steps}" + (", finished" if step == steps else "")
    yield "again" if step is None else "decode" if step == steps else "go on", command
    if names_files:
        yield "", "--trust_paths lets it read the files that are named here"


def _command(path: Path, recipe: Recipe, step: int | None) -> str:
    name = str(path) if not str(path).startswith("-") else f"./{path}"
    if step is None:
        words = ["replay", name]
    elif step == recipe.request.sample_steps:
        words = ["decode", name]
    else:
        words = ["generate", "--resume", name]
    trust = ["--trust_paths"] if named_files(recipe, saved=step is not None) else []
    return printable(shlex.join(["wanflow", *words, *trust]), LONGEST_PROMPT)
