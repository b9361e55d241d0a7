"""What stands at a path, told from names and headers: which model, which parts, how stored, what is
missing or too much.

No tensor is read. A file that cannot be read is a row that says why; only a path that is nothing at
all is refused.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from wanflow.checkpoint.checkpoint import open_checkpoint
from wanflow.checkpoint.containers import NAMES, Report, TensorInfo, TensorSource, reading
from wanflow.checkpoint.fp8_scales import ScaledSource
from wanflow.checkpoint.infer_config import config_of, relative
from wanflow.checkpoint.key_maps import Kind, detect, strip
from wanflow.checkpoint.layouts import (
    DIFFUSERS,
    ENDINGS,
    FOLDERS,
    TOKENIZERS,
    WORDS,
    config_beside,
    weight_groups,
    which_expert,
)
from wanflow.checkpoint.source import (
    OfficialSource,
    Part,
    describe,
    is_lora,
    kinds_in,
    official,
    open_source,
)
from wanflow.checkpoint.structure import compare, module_of
from wanflow.checkpoint.tokenizers import carries_tokenizer, open_tokenizer
from wanflow.config import DiTConfig, RequestError, TextConfig, VAEConfig
from wanflow.download.catalogue import KNOWN, LEDGER, known_sha256
from wanflow.lora.reader import describe_adapter, open_adapter
from wanflow.presets import NANO, T2V_A14B, Expert

PUBLISHED_SIZE = (  # how the model's authors count it; exactly it is 28.58 and 14.29 billion
    "27B total, 14B active"
)
BLOCK = 4 << 20  # bytes hashed at a time
UNREADABLE = "not readable"
# bytes below which a file of a published name is a miniature's, and no damaged download
SMALL = 100_000_000
WHAT: dict[Kind, str] = {
    "dit": "expert, the tensors do not say which",
    "t5": "text encoder",
    "vae": "VAE",
}
PUBLISHED = {"t5": "UMT5-XXL", "vae": "the Wan2.1 VAE"}
# Wan2.1's 14B has the shapes of one of the experts, so a file by itself does not tell the two
# apart.
EITHER = f"{T2V_A14B.name} (or Wan2.1-T2V-14B, which has the same shapes)"


@dataclass(frozen=True)
class File:
    """One file. sha256_from: "computed", "download" (hashed when it was fetched), "cache" (its name
    in Hugging Face's cache).
    """

    name: str
    bytes: int
    sha256: str | None = None
    sha256_from: str | None = None
    published_as: str | None = None  # the name under which a file of this hash was published


@dataclass(frozen=True)
class Row:
    """One part of a model, LoRA, or whatever a file holds."""

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
    """All that is known of a path."""

    path: str
    layout: str  # official, diffusers, files, file
    model: str | None
    complete: bool | None  # None for what is not meant to be a whole model
    problem: str | None  # why it does not load as a whole
    notes: list[str]
    parameters: dict[str, Any]  # experts_total, experts_active, all, published
    tensors: int
    bytes: int  # of all files
    parts: list[Row]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the keys are the fields' names."""
        return asdict(self)


# shapes


def _model_of(config: DiTConfig | TextConfig | VAEConfig) -> str:
    """Whose shape it is."""
    if isinstance(config, DiTConfig):
        if config == T2V_A14B.dit:
            return EITHER
        # nano's heads are of another width, which its tensors do not show
        if replace(config, num_heads=NANO.dit.num_heads, text_len=NANO.dit.text_len) == NANO.dit:
            return NANO.name
        return f"another size of Wan: width {config.dim}, {config.num_layers} blocks"
    if isinstance(config, TextConfig):
        known = {PUBLISHED["t5"]: T2V_A14B.text, NANO.name: NANO.text}
        return next(
            (name for name, shape in known.items() if shape == config),
            f"another size of UMT5: width {config.dim}",
        )
    for name, shape in ((PUBLISHED["vae"], T2V_A14B.vae), (NANO.name, NANO.vae)):
        if (
            shape.z_dim == config.z_dim
            and replace(shape, latent_mean=config.latent_mean, latent_std=config.latent_std)
            == config
        ):
            return name
    return f"another size of the Wan VAE: width {config.dim}"


# one file, or folder of shards


def rows_of(
    path: Path,
    root: Path,
    opened: Callable[[Path], TensorSource],
    whole: Collection[Path] = (),
    hashes: bool = False,
    report: Report | None = None,
) -> list[Row]:
    """The parts that a file, or a folder of shards, holds; one row that says why where it cannot be
    read.

    Args:
        root: the folder that is inspected, or the file itself.
        whole: files and folders that are known to lack nothing and to have nothing too much.
    """
    name = path.name if path == root else path.relative_to(root).as_posix()
    files: list[File] = []
    try:
        source = opened(path)
        files = [_file(file, root, hashes, report) for file in source.files]
        kinds = kinds_in(source)
        row = Row(
            name,
            describe(source),
            files,
            container=source.container,
            tensors=len(source.tensors),
            bytes=bytes_of(source.tensors),
        )
        row = replace(
            row,
            dtypes=_dtypes(source, source.tensors),
            parameters=_count(source.tensors),
            notes=_names_of(files),
        )
        if is_lora(source):
            return [_lora(row, path)]
        return [
            _part(row, kind, source, path, root, bool({path, path.parent} & set(whole)))
            for kind in kinds
        ] or [row]
    except RequestError as error:
        size = path.stat().st_size if path.is_file() else 0
        return [Row(name, UNREADABLE, files or [File(name, size)], error=str(error))]


def _part(row: Row, kind: Kind, source: TensorSource, path: Path, root: Path, whole: bool) -> Row:
    """A row for one part of a model."""
    part = official(kind, source)
    names = list(part.names.values())
    first = next((name for name in names if strip(kind, name) != name), "")
    notes = [
        *row.notes,
        *(["carries its tokenizer"] if kind == "t5" and carries_tokenizer(source) else []),
    ]
    which, what = None, WHAT[kind]
    if kind == "dit":
        try:
            which = _which(path, root)
        except RequestError as error:
            notes.append(str(error))
        what = WORDS[which].removeprefix("the ") if which else what
    row = replace(
        row, what=what, part=which or (None if kind == "dit" else kind), dialect=detect(kind, names)
    )
    row = replace(
        row,
        prefix=first.removesuffix(strip(kind, first)),
        dtypes=_dtypes(source, names),
        notes=notes,
    )
    row = replace(
        row,
        parameters=_count(part.tensors),
        tensors=len(part.tensors),
        bytes=bytes_of(part.tensors),
    )
    if kind == "dit":
        other = _relative(part, path)
        if other:
            return replace(row, model=other)
    try:
        config = config_of(kind, part)
        row = replace(row, model=_model_of(config), shape=_shape(config))
        if whole:
            return row
        found = compare(module_of(config), part)
        return replace(
            row, missing=found.missing, unexpected=found.unexpected, wrong_shape=found.wrong_shape
        )
    except RequestError as error:
        return replace(row, error=str(error))


def _shape(config: DiTConfig | TextConfig | VAEConfig) -> dict[str, Any]:
    """The fields that tensors show."""
    unseen = {
        "num_heads",
        "text_len",
        "eps",
        "model_type",
        "window_size",
        "qk_norm",
        "cross_attn_norm",
    }
    unseen = (
        unseen
        if isinstance(config, DiTConfig)
        else {
            "max_dist",
            "shared_pos",
            "eps",
            "attn_scales",
            "dropout",
            "latent_mean",
            "latent_std",
        }
    )
    return {name: value for name, value in asdict(config).items() if name not in unseen}


def _which(path: Path, root: Path) -> Expert | None:
    """The expert of a file or folder, by its place in the official or Diffusers' layout, its name,
    or its hash.
    """
    folder = path if path.is_dir() else path.parent
    if folder.name in FOLDERS.values():
        return "high" if folder.name == FOLDERS["high"] else "low"
    if (folder.parent / "model_index.json").exists() and folder.name in (
        DIFFUSERS["high"],
        DIFFUSERS["low"],
    ):
        return "high" if folder.name == DIFFUSERS["high"] else "low"
    return which_expert(path, path.parent if path == root else root)


def _relative(source: OfficialSource, path: Path) -> str | None:
    """The name of a relative of the model."""
    try:
        said = (
            config_beside(path)[0]
            if (path if path.is_dir() else path.parent).name
            in (*FOLDERS.values(), *DIFFUSERS.values())
            else {}
        )
    except RequestError:  # a broken config says nothing of the tensors
        return None
    return relative(source, said)


def _lora(row: Row, path: Path) -> Row:
    found = describe_adapter(open_adapter(path))
    expert = found["experts"] if found else []
    what = (
        f"LoRA for the {' and the '.join(f'{which}-noise' for which in expert)} expert"
        if expert
        else "LoRA, for either expert"
    )
    return replace(row, what=what, lora=found, dialect=found["naming"] if found else None)


# counting


def _dtypes(source: TensorSource, names: Iterable[str]) -> dict[str, int]:
    """How many tensors are stored how, most first."""
    scaled = source.scales if isinstance(source, ScaledSource) else {}
    infos = ((name, source.tensors[name]) for name in names)
    words = (
        (
            f"{info.packing}{' scaled' if name in scaled else ''}"
            if info.packing
            else NAMES[info.dtype]
        )
        for name, info in infos
    )
    return dict(Counter(words).most_common())


def _count(tensors: Mapping[str, TensorInfo]) -> int:
    return sum(math.prod(info.shape) for info in tensors.values())


def bytes_of(tensors: Mapping[str, TensorInfo]) -> int:
    return sum(info.nbytes for info in tensors.values())


# hashes


def _file(path: Path, root: Path, hashes: bool, report: Report | None) -> File:
    name, size = (
        (
            path.relative_to(root).as_posix()
            if path != root and path.is_relative_to(root)
            else path.name
        ),
        path.stat().st_size,
    )
    sha256, where = _known_hash(path)
    if hashes:
        sha256, where = _hash(path, report), "computed"
    return File(
        name,
        size,
        sha256,
        where,
        next((end for end, value in KNOWN.items() if value == sha256), None),
    )


def _known_hash(path: Path) -> tuple[str | None, str | None]:
    """A hash that somebody has computed already: who downloaded the file, or Hugging Face's cache,
    which names files by it.
    """
    real = Path(os.path.realpath(path))
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name):
        return real.name, "cache"
    folder = next(
        (parent for parent in path.absolute().parents[:3] if (parent / LEDGER).is_file()), None
    )
    if folder is None:
        return None, None
    from wanflow.download.fetch import (
        Ledger,
    )  # with the hub's library behind it, which takes a fifth of a second

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


def _names_of(files: list[File]) -> list[str]:
    """What hashes say of names."""
    told = []
    for file in files:
        known = known_sha256(file.name)
        if file.sha256 and known and known != file.sha256 and file.bytes > SMALL:
            told.append(f"{file.name} is named as a published file, and is another one")
    return told


# a whole path


def inspect(path: Path, hashes: bool = False, report: Report | None = None) -> Findings:
    """All that headers say of a file or folder.

    Args:
        hashes: compute the sha256 of every file.
        report: told of bytes hashed, and bytes in all, file by file.

    Raises:
        RequestError: where there is nothing, or nothing that is known here.
    """
    opened = cache(open_source)
    with reading(path):
        if not path.exists():
            raise RequestError(f"{path} is missing")
        layout, model, problem, notes, whole = "file", None, None, list[str](), set[Path]()
        if path.is_dir():
            layout = _layout(path)
            try:
                found = open_checkpoint(path, opened=opened)
                model, notes = found.spec.name, list(found.notes)
                whole = {found.paths[part] for part in found.sources}
            except RequestError as error:
                problem = str(error)
        groups = weight_groups(path) if path.is_dir() else [path]
        if path.is_file() and path.suffix in (".json", ".model"):
            pieces = open_tokenizer(path).get_vocab_size()
            rows = [replace(_tokenizer(path, path, hashes, report), notes=[f"{pieces:,} pieces"])]
        else:
            rows = [
                row
                for group in groups
                for row in rows_of(group, path, opened, whole, hashes, report)
            ]
    if not rows:
        raise RequestError(f"{path} holds no weights: no {', '.join(sorted(ENDINGS))} file")
    if all(row.what == UNREADABLE for row in rows):  # nothing is understood
        raise RequestError(str(rows[0].error))
    # One part of a model, or LoRAs: it need not load.
    part_only = layout == "files" and sum(row.lora is None for row in rows) <= 1
    if path.is_dir():
        rows += [
            _tokenizer(path / name, path, hashes, report)
            for name in TOKENIZERS
            if (path / name).is_file()
        ][:1]
    model = model or _common(rows)
    files = {file.name: file.bytes for row in rows for file in row.files}
    alone = path.is_file() or part_only
    count = sum(row.tensors for row in rows)
    complete, problem = (None, None) if alone else (problem is None, problem)
    return Findings(
        str(path),
        layout,
        model,
        complete,
        problem,
        notes,
        _parameters(rows),
        count,
        sum(files.values()),
        rows,
    )


def _layout(folder: Path) -> str:
    if any((folder / name).is_dir() for name in FOLDERS.values()):
        return "official"
    return "diffusers" if (folder / "model_index.json").exists() else "files"


def _common(rows: list[Row]) -> str | None:
    """The model that all experts in the rows are of; without any, that of the first part."""
    names = {
        row.model for row in rows if row.part in ("high", "low") or row.what == WHAT["dit"]
    } or {row.model for row in rows[:1]}
    return names.pop() if len(names) == 1 else None


def _parameters(rows: list[Row]) -> dict[str, Any]:
    experts = {row.part: row for row in rows if row.part in ("high", "low")}
    counts = [row.parameters for row in experts.values()]
    published = len(experts) == 2 and all(
        row.model == EITHER and row.parameters for row in experts.values()
    )
    return {
        "experts_total": sum(counts),
        "experts_active": max(counts, default=0),
        "all": sum(row.parameters for row in rows if row.lora is None),
        "published": PUBLISHED_SIZE if published else None,
    }


def _tokenizer(path: Path, root: Path, hashes: bool, report: Report | None) -> Row:
    """A row for a tokenizer, which is not read: its words take longer than all headers together."""
    file = _file(path, root, hashes, report)
    kind = "tokenizer.json" if path.suffix == ".json" else "sentencepiece"
    return Row(file.name, "tokenizer", [file], "tokenizer", kind, notes=_names_of([file]))
