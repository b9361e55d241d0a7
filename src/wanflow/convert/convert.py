"""From any layout that is read to any that is written, one piece of a tensor at a time.

What comes out is planned to the byte from headers alone, checked against the disk, written under a
temporary name beside its place and renamed when it is whole. Memory does not depend on the model's
size (megabytes; a weight that is packed in its file, its packed data).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from wanflow.checkpoint.checkpoint import Checkpoint, open_checkpoint
from wanflow.checkpoint.containers import Report, reading, weight_files
from wanflow.checkpoint.infer_config import config_of, refuse_relatives
from wanflow.checkpoint.layouts import ENDINGS, FOLDERS, PARTS, kind_of
from wanflow.checkpoint.source import Part, is_lora, kinds_in, official, open_source
from wanflow.checkpoint.structure import check, module_of
from wanflow.config import RequestError
from wanflow.convert.targets import SINGLE, Options, Plan, plan, single_kind, source_paths
from wanflow.convert.write import refuse_full
from wanflow.files import atomic_path, leftovers, remove
from wanflow.presets import T2V_A14B

# What a folder may hold that --overwrite replaces: anything else shows that it is not a model's.
REPLACEABLE = {*ENDINGS, ".json", ".model", ".md", ".txt", ".part", ""}


def open_model(path: Path, given: Mapping[Part, Path]) -> Checkpoint:
    """What stands at a path: a model in any layout, or a part in a file or a folder of shards;
    headers are read.

    Raises:
        RequestError: for what cannot be read, is no model, or is a relative that wanflow does not
            run.
    """
    with reading(path):
        if not given and (path.is_file() or _is_part(path)):
            return _open_part(path)
    return open_checkpoint(path, given)


def _is_part(folder: Path) -> bool:
    """Whether a folder is that of one expert, text encoder or VAE: a config beside its weights."""
    if not (folder / "config.json").exists() or (folder / "model_index.json").exists():
        return False
    return not any((folder / name).is_dir() for name in FOLDERS.values()) and all(
        file.exists() for file in weight_files(folder)
    )


def _open_part(path: Path) -> Checkpoint:
    source = open_source(path)
    if is_lora(source):
        raise RequestError(
            f"{path} is a LoRA, and not converted: every naming is read as it is (--lora); it has"
            " no weights of its own"
        )
    kinds = kinds_in(source)
    if len(kinds) != 1:
        what = (
            "several parts of a model in one file"
            if kinds
            else "no part of a model that is known here"
        )
        raise RequestError(
            f"{path} holds {what}; convert takes a model's folder, an expert, a text encoder or"
            " a VAE"
        )
    part = official(kinds[0], source)
    if kinds[0] == "dit":
        refuse_relatives(part, {})
    check(module_of(config_of(kinds[0], part)), part)
    name = next(name for name in PARTS if kind_of(name) == kinds[0])
    return Checkpoint(T2V_A14B, {name: part}, path, {name: path}, layout=SINGLE)


def convert(
    model: Checkpoint,
    out: Path,
    wanted: Options,
    say: Callable[[str], None],
    report: Report | None = None,
) -> Path:
    """Write a model in another form; where it then stands.

    Args:
        out: a folder; or for a part that stands alone a file, or a folder to put one into.
        say: told in a few words what is done otherwise than one might think.
        report: told of bytes written, and bytes in all.

    Raises:
        RequestError: before anything is written, for a place that is taken, inside the source or
            without room; on the way, for weights that are not finite, or that the wanted dtype
            cannot hold.
        OSError: when the disk refuses.
    """
    out = _place(model, out, wanted)
    _refuse_taken(model, out, wanted.overwrite)
    made = plan(model, wanted, out.name)
    refuse_full(out, made.nbytes)
    for note in made.notes:
        say(note)
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if report is not None:
            report(done, made.nbytes)

    for part in leftovers(out):
        if not wanted.overwrite:
            raise RequestError(
                f"{part} is left over from an interrupted conversion, or another one is writing it;"
                " remove it, or give --overwrite"
            )
        remove(part)
    with atomic_path(out, overwrite=wanted.overwrite) as part:
        _write(made, part, count, single_kind(model) is not None)
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


def _place(model: Checkpoint, out: Path, wanted: Options) -> Path:
    """Where the result goes: for a part that stands alone always a file, of the ending that its
    container has.
    """
    if single_kind(model) is None:
        return out
    layout = wanted.target.layout
    if layout == "gguf" and single_kind(model) == "vae":
        raise RequestError("a VAE is not kept in GGUF by any program; convert it to bf16 or fp16")
    endings = {"gguf": (".gguf",), "official": (".pth", ".safetensors")}.get(
        layout, (".safetensors",)
    )
    endings = endings if single_kind(model) != "dit" or layout == "gguf" else (".safetensors",)
    if out.suffix in (".gguf", ".pth", ".safetensors"):
        if out.suffix not in endings:
            raise RequestError(f"{out}: --to {wanted.to} writes {' or '.join(endings)}")
        return out
    stem = model.folder.name if model.folder.is_dir() else model.folder.stem
    return out / f"{stem}-{wanted.to}{endings[0]}"


def _refuse_taken(model: Checkpoint, out: Path, overwrite: bool) -> None:
    """RequestError where writing would take a place that is not free to be taken."""
    real = out.resolve()
    for file in source_paths(model):
        source = file.resolve()
        if real == source or real in source.parents or (source.is_dir() and source in real.parents):
            raise RequestError(
                f"{out} and the source {file} lie inside one another; name another place"
            )
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise RequestError(f"{out} exists; name another place, or give --overwrite")
    if out.is_dir() != (single_kind(model) is None):
        raise RequestError(
            f"{out} is {'a folder' if out.is_dir() else 'a file'}, and what is written is not"
        )
    odd = next(
        (
            file
            for file in out.rglob("*")
            if out.is_dir() and file.is_file() and file.suffix not in REPLACEABLE
        ),
        None,
    )
    if odd is not None:
        raise RequestError(
            f"{out} holds {odd.relative_to(out)}, so it is more than a model, and --overwrite does"
            " not replace it"
        )
