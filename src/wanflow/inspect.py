"""Describe a path by names and headers: which model, which parts, how stored, what is missing.

No tensor is read. A file that cannot be read becomes a row with the reason. Only a path without
anything readable is refused.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from wanflow.checkpoint.checkpoint import open_checkpoint
from wanflow.checkpoint.containers import NAMES, Report, TensorSource, reading
from wanflow.checkpoint.infer_config import VAES, config_of, model_of, relative
from wanflow.checkpoint.key_maps import Kind, detect, strip
from wanflow.checkpoint.layouts import (
    DIFFUSERS,
    FOLDERS,
    TOKENIZERS,
    config_beside,
    layout_of,
    weight_groups,
    which_expert,
)
from wanflow.checkpoint.ledger import LEDGER, Ledger
from wanflow.checkpoint.parts import ENDINGS, EXPERTS, NETWORKS, WORDS, Part
from wanflow.checkpoint.published import known_sha256, published_as
from wanflow.checkpoint.source import (
    OfficialSource,
    describe,
    is_lora,
    kinds_in,
    official,
    open_source,
)
from wanflow.checkpoint.structure import Config, compare, module_of
from wanflow.checkpoint.tokenizers import carries_tokenizer, open_tokenizer
from wanflow.config import DiTConfig, RequestError, TextConfig
from wanflow.lora.reader import describe_adapter, open_adapter
from wanflow.presets import FAMILY, NANO, NANO_I2V, ONLY, T2V_A14B, Expert, ModelSpec

# The authors' counts; exactly A14B has 28.58 and 14.29 billion.
PUBLISHED_SIZES = {2: "27B total, 14B active", 1: "5B"}  # by the number of networks
BLOCK = 4 << 20  # bytes hashed at a time
UNREADABLE = "not readable"
SMALL = 100_000_000  # bytes; a smaller file of a published name is a miniature, not damaged
PART_LABELS: dict[Kind, str] = {
    "dit": "expert, the tensors do not say which",
    "t5": "text encoder",
    "vae": "VAE",
}
TEXT_ENCODER = "UMT5-XXL"
# Wan2.1's 14B has the shapes of one expert, so a single file does not tell the two apart.
EITHER = f"{T2V_A14B.name} (or Wan2.1-T2V-14B, which has the same shapes)"
# The fields of each config that tensors do not show.
HIDDEN: dict[Kind, set[str]] = {
    "dit": {
        "num_heads",
        "text_len",
        "eps",
        "model_type",
        "window_size",
        "qk_norm",
        "cross_attn_norm",
    },
    "t5": {"max_dist", "shared_pos", "eps"},
    "vae": {"attn_scales", "dropout", "latent_mean", "latent_std"},
}


@dataclass(frozen=True)
class File:
    """One file.

    sha256_from: "computed", "download" (hashed when downloaded) or "cache" (its name in Hugging
        Face's cache).
    """

    name: str
    bytes: int
    sha256: str | None = None
    sha256_from: str | None = None
    published_as: str | None = None  # the name under which a file of this hash was published


@dataclass(frozen=True)
class Row:
    """A part of a model, a LoRA, or any other content of a file."""

    path: str
    what: str
    files: list[File]
    part: Part | None = None
    container: str | None = None
    dialect: str | None = None
    prefix: str = ""
    model: str | None = None
    shape: dict[str, Any] | None = None
    dtypes: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    tensors: int = 0
    bytes: int = 0  # of its tensors
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: list[str] = field(default_factory=list)
    lora: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class Findings:
    """The description of a path."""

    path: str
    layout: str  # official, diffusers, files, file
    model: str | None
    complete: bool | None  # None for a single part, which need not be complete
    problem: str | None  # why it does not load as a model
    notes: list[str]
    parameters: dict[str, Any]  # experts_total, experts_active, all, published
    tensors: int
    bytes: int  # of all files
    parts: list[Row]


def inspect(
    path: Path, hashes: bool = False, report: Report | None = None, on_file: Report | None = None
) -> Findings:
    """Return all that the headers of a file or folder say.

    Args:
        path: a file or folder.
        hashes: compute the sha256 of every file.
        report: called with bytes hashed, and bytes in all, file by file.
        on_file: called with files read, and files in all; the shards of one part count as one.

    Raises:
        RequestError: for a path that is missing, or holds nothing readable.
    """
    opened = cache(open_source)
    with reading(path):
        if not path.exists():
            raise RequestError(f"{path} is missing; name an existing file or folder")
        layout, model, problem, notes, checked = "file", None, None, list[str](), set[Path]()
        if path.is_dir():
            layout = layout_of(path)
            try:
                found = open_checkpoint(path, opened=opened)
                model, notes = found.spec.name, list(found.notes)
                checked = {found.paths[part] for part in found.sources}
            except RequestError as error:
                problem = str(error)
        if path.is_file() and path.suffix in (".json", ".model"):
            pieces = open_tokenizer(path).get_vocab_size()
            rows = [replace(_tokenizer(path, path, hashes, report), notes=[f"{pieces:,} pieces"])]
        else:
            groups = list(weight_groups(path)) if path.is_dir() else [path]
            rows = []
            for number, group in enumerate(groups, 1):
                rows += rows_of(group, path, opened, checked, hashes, report)
                if on_file is not None:
                    on_file(number, len(groups))
    if not rows:
        raise RequestError(f"{path} holds no weights: no {', '.join(sorted(ENDINGS))} file")
    if all(row.what == UNREADABLE for row in rows):
        raise RequestError(str(rows[0].error))
    # A single part, or LoRAs: it need not load as a model.
    single = layout == "files" or (path / "config.json").is_file()
    alone = path.is_file() or (single and sum(row.lora is None for row in rows) <= 1)
    tokenizer = next((path / name for name in TOKENIZERS if (path / name).is_file()), None)
    if tokenizer is not None:
        rows.append(_tokenizer(tokenizer, path, hashes, report))
    files = {file.name: file.bytes for row in rows for file in row.files}
    return Findings(
        str(path),
        layout,
        model or _common(rows),
        None if alone else problem is None,
        None if alone else problem,
        notes,
        _parameters(rows),
        sum(row.tensors for row in rows),
        sum(files.values()),
        rows,
    )


def _common(rows: list[Row]) -> str | None:
    """Return the model of all experts in the rows; without experts, that of the first part."""
    experts = [row for row in rows if row.part in NETWORKS or row.what == PART_LABELS["dit"]]
    names = {row.model for row in experts or rows[:1]}
    return names.pop() if len(names) == 1 else None


def _parameters(rows: list[Row]) -> dict[str, Any]:
    experts = {row.part: row for row in rows if row.part in NETWORKS}
    counts = [row.parameters for row in experts.values()]
    models = {row.model for row in experts.values() if row.parameters}
    published = any(
        models == {_name(spec)} and {*spec.expert_names} == {*experts} for spec in FAMILY
    )
    return {
        "experts_total": sum(counts),
        "experts_active": max(counts, default=0),
        "all": sum(row.parameters for row in rows if row.lora is None),
        "published": PUBLISHED_SIZES[len(experts)] if published else None,
    }


def _tokenizer(path: Path, root: Path, hashes: bool, report: Report | None) -> Row:
    """Return a row for a tokenizer without reading it: that takes longer than all headers."""
    file = _file(path, root, hashes, report)
    kind = "tokenizer.json" if path.suffix == ".json" else "sentencepiece"
    return Row(file.name, "tokenizer", [file], "tokenizer", kind, notes=_hash_notes([file]))


# one file, or folder of shards


def rows_of(
    path: Path,
    root: Path,
    opened: Callable[[Path], TensorSource],
    checked: Collection[Path] = (),
    hashes: bool = False,
    report: Report | None = None,
) -> list[Row]:
    """Return a row for each part in a file or folder of shards, or one that says what is wrong.

    `root` is the folder that is inspected, or the file itself. The tensors of `checked` files and
    folders were already compared with the model's.
    """
    name = path.name if path == root else path.relative_to(root).as_posix()
    files: list[File] = []
    try:
        source = opened(path)
        files = [_file(file, root, hashes, report) for file in source.files]
        row = Row(
            name,
            describe(source),
            files,
            container=source.container,
            notes=_hash_notes(files),
            **_sums(source),
        )
        if is_lora(source):
            return [_lora(row, path)]
        known = not {path, path.parent}.isdisjoint(checked)
        return [_part(row, kind, source, path, root, known) for kind in kinds_in(source)] or [row]
    except RequestError as error:
        size = path.stat().st_size if path.is_file() else 0
        return [Row(name, UNREADABLE, files or [File(name, size)], error=str(error))]


def _part(row: Row, kind: Kind, source: TensorSource, path: Path, root: Path, known: bool) -> Row:
    """Return the row of one part of a model."""
    part, expert, notes = official(kind, source), None, list(row.notes)
    names = list(part.names.values())
    first = next((name for name in names if strip(kind, name) != name), "")
    if kind == "t5" and carries_tokenizer(source):
        notes.append("carries its tokenizer")
    if kind == "dit":
        try:
            spec = model_of(part)
            expert = ONLY if spec and ONLY in spec.expert_names else _which(path, root)
        except RequestError as error:
            notes.append(str(error))
    row = replace(
        row,
        what=WORDS[expert].removeprefix("the ") if expert else PART_LABELS[kind],
        part=expert if kind == "dit" else kind,
        dialect=detect(kind, names),
        prefix=first.removesuffix(strip(kind, first)),
        notes=notes,
        **_sums(part),
    )
    other = _relative(part, path) if kind == "dit" else None
    if other:
        return replace(row, model=other)
    try:
        config = config_of(kind, part)
        shape = {name: value for name, value in asdict(config).items() if name not in HIDDEN[kind]}
        row = replace(row, model=_model_of(config), shape=shape)
        if known:
            return row
        found = compare(module_of(config), part)
    except RequestError as error:
        return replace(row, error=str(error))
    return replace(
        row,
        missing=found["missing"],
        unexpected=found["unexpected"],
        wrong_shape=found["of the wrong shape"],
    )


def _model_of(config: Config) -> str:
    """Return the model that has this shape."""
    if isinstance(config, DiTConfig):
        # The width of nano's heads is its own, and tensors do not show it.
        heads, length = NANO.dit.num_heads, NANO.dit.text_len
        same_width = config.dim == NANO.dit.dim
        nano = replace(config, num_heads=heads, text_len=length) if same_width else None
        for spec in (*FAMILY, NANO, NANO_I2V):
            if spec.dit in (config, nano):
                return _name(spec)
        kinds = {spec.dit.model_type: spec.name for spec in FAMILY if spec is not T2V_A14B}
        kind = kinds.get(config.model_type, "Wan")
        return f"another size of {kind}: width {config.dim}, {config.num_layers} blocks"
    if isinstance(config, TextConfig):
        known = {T2V_A14B.text: TEXT_ENCODER, NANO.text: NANO.name}
        return known.get(config, f"another size of UMT5: width {config.dim}")
    latent: Any = {"latent_mean": config.latent_mean, "latent_std": config.latent_std}
    published = {VAES[type(spec.vae)]: spec.vae for spec in FAMILY} | {NANO.name: NANO.vae}
    for name, shape in published.items():
        if shape.z_dim == config.z_dim and config == replace(shape, **latent):
            return name
    return f"another size of {VAES[type(config)]}: width {config.dim}"


def _name(spec: ModelSpec) -> str:
    """Return what an expert of these shapes belongs to."""
    return EITHER if spec is T2V_A14B else spec.name


def _which(path: Path, root: Path) -> Expert | None:
    """Return the expert by folder in the official or Diffusers' layout, by name, or by hash."""
    folder = path if path.is_dir() else path.parent
    for expert in EXPERTS:
        if folder.name == FOLDERS[expert]:
            return expert
        if folder.name == DIFFUSERS[expert] and (folder.parent / "model_index.json").exists():
            return expert
    return which_expert(path, path.parent if path == root else root)


def _relative(source: OfficialSource, path: Path) -> str | None:
    """Return the name of a relative of the model."""
    folder = path if path.is_dir() else path.parent
    in_layout = folder.name in (*FOLDERS.values(), *DIFFUSERS.values())
    try:
        return relative(source, config_beside(path)[0] if in_layout else {})
    except RequestError:  # a broken config says nothing of the tensors
        return None


def _lora(row: Row, path: Path) -> Row:
    found = describe_adapter(open_adapter(path))
    experts = [f"{expert}-noise" for expert in found["experts"]] if found else []
    what = f"LoRA for the {' and the '.join(experts)} expert" if experts else ""
    return replace(
        row,
        what=what or "LoRA, for either expert",
        lora=found,
        dialect=found["naming"] if found else None,
    )


def _sums(source: TensorSource) -> dict[str, Any]:
    """Return the fields of a row that count tensors; of the formats, the most frequent first."""
    words = (
        f"{info.packing} scaled"
        if (info.packing or "").startswith("F8") and info.scale is not None
        else info.packing or NAMES[info.dtype]
        for info in source.tensors.values()
    )
    return {
        "dtypes": dict(Counter(words).most_common()),
        "parameters": source.parameters,
        "tensors": len(source.tensors),
        "bytes": source.nbytes,
    }


# hashes


def _file(path: Path, root: Path, hashes: bool, report: Report | None) -> File:
    inside = path != root and path.is_relative_to(root)
    name = path.relative_to(root).as_posix() if inside else path.name
    sha256, origin = (_hash(path, report), "computed") if hashes else _known_hash(path)
    return File(name, path.stat().st_size, sha256, origin, published_as(sha256))


def _known_hash(path: Path) -> tuple[str | None, str | None]:
    """Return a hash that a download computed, or that names the file in Hugging Face's cache."""
    real = Path(os.path.realpath(path))
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name):
        return real.name, "cache"
    folder = next(
        (parent for parent in path.absolute().parents[:3] if (parent / LEDGER).is_file()), None
    )
    if folder is None:
        return None, None
    sha256 = Ledger(folder).sha256(path.absolute().relative_to(folder).as_posix())
    return sha256, "download" if sha256 else None


def _hash(path: Path, report: Report | None) -> str:
    digest, done, size = hashlib.sha256(), 0, path.stat().st_size
    with reading(path), path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            done += len(block)
            if report is not None:
                report(done, size)
    return digest.hexdigest()


def _hash_notes(files: list[File]) -> list[str]:
    """Return a note for each file that has a published name and another hash."""
    notes = []
    for file in files:
        known = known_sha256(file.name)
        if file.sha256 and known and known != file.sha256 and file.bytes > SMALL:
            notes.append(f"{file.name} is named as a published file, and is another one")
    return notes
