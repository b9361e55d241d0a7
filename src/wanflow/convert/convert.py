"""Convert weights from any layout to any other, one piece of a tensor at a time.

A conversion is planned to the byte from headers alone and checked against the disk. It is written
under a temporary name and renamed at the end. Memory does not depend on the model's size:
megabytes, and the packed data of one packed weight.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from wanflow.checkpoint.checkpoint import Checkpoint, open_checkpoint
from wanflow.checkpoint.containers import Report, reading
from wanflow.checkpoint.folders import weight_files
from wanflow.checkpoint.infer_config import config_of, model_of, refuse_relatives
from wanflow.checkpoint.layouts import T5_STEM, VAE_STEMS, has_experts
from wanflow.checkpoint.parts import Part
from wanflow.checkpoint.source import is_lora, kinds_in, official, open_source
from wanflow.checkpoint.structure import check, module_of
from wanflow.config import RequestError
from wanflow.convert.formats import Options
from wanflow.convert.taken import refuse_folder
from wanflow.convert.targets import SINGLE, Plan, plan, single_kind, source_paths
from wanflow.files import atomic_path, remove
from wanflow.outputs import Claims, leftovers, refuse_without_room
from wanflow.presets import T2V_A14B


def open_model(path: Path, given: Mapping[Part, Path]) -> Checkpoint:
    """Open a model in any layout, or a part in a file or a folder of shards.

    Raises:
        RequestError: for a path that cannot be read, holds no model, or a relative of ours.
    """
    with reading(path):
        if not given and (path.is_file() or _is_part(path)):
            return _open_part(path)
    return open_checkpoint(path, given)


def _is_part(folder: Path) -> bool:
    """Return whether a folder is that of one part: its config and its weights."""
    if not (folder / "config.json").exists() or (folder / "model_index.json").exists():
        return False
    others = [
        f"{stem}{end}"
        for stem in (T5_STEM, *VAE_STEMS.values())
        for end in (".pth", ".safetensors")
    ]
    if has_experts(folder) or any((folder / name).exists() for name in others):
        return False
    return all(file.exists() for file in weight_files(folder))


def _open_part(path: Path) -> Checkpoint:
    source = open_source(path)
    if is_lora(source):
        raise RequestError(
            f"{path} is a LoRA, which needs no conversion; use it with --lora, in any naming"
        )
    kinds = kinds_in(source)
    if len(kinds) != 1:
        what = "several parts of a model in one file" if kinds else "no known part of a model"
        raise RequestError(
            f"{path} holds {what}; convert takes a model's folder, an expert, a text encoder or"
            " a VAE"
        )
    part = official(kinds[0], source)
    if kinds[0] == "dit":
        refuse_relatives(part, {})
    check(module_of(config_of(kinds[0], part)), part)
    spec = (model_of(part) if kinds[0] == "dit" else None) or T2V_A14B
    name = spec.expert_names[0] if kinds[0] == "dit" else kinds[0]
    return Checkpoint(spec, {name: part}, path, {name: path}, layout=SINGLE)


def convert(
    model: Checkpoint,
    out: Path,
    options: Options,
    say: Callable[[str], None],
    report: Report | None = None,
) -> Path:
    """Write a model in another form, and return its path.

    `out` is a folder; for a single part also a file, or a folder for that file. It is claimed from
    the start. `say` gets notes on what a user might not expect.

    Raises:
        RequestError: at first, for a path that exists, lies inside the source, has no room or is
            being made by another conversion; later, for weights that are not finite, or too large
            for the requested dtype.
        FileExistsError: if the path appeared meanwhile; it is kept, and the result is next to it.
        OSError: when the disk refuses.
    """
    out = _place(model, out, options)
    refuse_taken(model, out, options.overwrite)
    made = plan(model, options, out.name)
    refuse_without_room(out, made.nbytes, "the conversion")
    for note in made.notes:
        say(note)
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if report is not None:
            report(done, made.nbytes)

    with Claims() as claims:
        claims.take(out)
        replaced = options.overwrite and os.path.lexists(out)  # what appears later is kept
        for part in leftovers(out):
            if not options.overwrite:
                raise RequestError(
                    f"{part} is left over from an interrupted conversion; remove it, or give"
                    " --overwrite"
                )
            remove(part)
        spare = claims.take_free(
            (out.with_name(f"{out.stem}-{n}{out.suffix}"),) for n in itertools.count(2)
        )
        with atomic_path(out, overwrite=replaced, spare=spare) as part:
            _write(made, part, count, single_kind(model) is not None)
            if replaced:
                refuse_taken(model, out, overwrite=True)  # again, as hours have passed
    return out


def _write(made: Plan, part: Path, count: Callable[[int], None], alone: bool) -> None:
    if alone:
        made.outputs[0].write(part, count)
        return
    part.mkdir()
    for output in made.outputs:
        file = part / output.path
        file.parent.mkdir(parents=True, exist_ok=True)
        output.write(file, count)
    for name, data in made.files.items():
        file = part / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        count(len(data))


def _place(model: Checkpoint, out: Path, options: Options) -> Path:
    """Return where the result goes: for a single part a file with its container's ending."""
    kind, layout = single_kind(model), options.target.layout
    if kind is None:
        return out
    if layout == "gguf" and kind == "vae":
        raise RequestError("--to gguf: no program reads a VAE in GGUF; use --to bf16 or --to fp16")
    endings = {"gguf": (".gguf",), "official": (".pth", ".safetensors")}.get(
        layout, (".safetensors",)
    )
    if kind == "dit" and layout != "gguf":
        endings = (".safetensors",)
    if out.suffix in (".gguf", ".pth", ".safetensors"):
        if out.suffix not in endings:
            raise RequestError(f"{out}: --to {options.to} writes {' or '.join(endings)}")
        return out
    stem = model.folder.name if model.folder.is_dir() else model.folder.stem
    return out / f"{stem}-{options.to}{endings[0]}"


def refuse_taken(model: Checkpoint, out: Path, overwrite: bool) -> None:
    """Raise a RequestError for a path that the conversion must not replace."""
    real = out.resolve()
    for file in source_paths(model):
        source = file.resolve()
        if real == source or real in source.parents or (source.is_dir() and source in real.parents):
            raise RequestError(f"{out} and the source {file} overlap; name another place")
    if os.path.isfile(out) and single_kind(model) is None:
        raise RequestError(f"{out} is a file, and the result is not; name another place")
    if os.path.isdir(out) and single_kind(model) is not None:
        raise RequestError(f"{out} is a folder, and the result is not; name another place")
    refuse_folder(out, overwrite)
