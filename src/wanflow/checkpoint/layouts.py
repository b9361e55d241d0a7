"""Find the parts of a model: in the official folder, in Diffusers', among loose files, or named.

Finding reads headers at most. All experts have the same tensors. Which file is which expert follows
from the layout, from words in file and folder names, from the name of a Hugging Face blob (its
sha256), or from the user; otherwise it is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanflow.checkpoint.containers import AGAIN, TensorSource, read_json
from wanflow.checkpoint.folders import weight_files
from wanflow.checkpoint.infer_config import BY_TYPE, ONLY, refuse_relatives
from wanflow.checkpoint.parts import (
    ENDINGS,
    EXPERTS,
    FLAGS,
    PARTS,
    WEIGHTS,
    WORDS,
    Part,
    expert_in_name,
)
from wanflow.checkpoint.source import describe, is_lora, kinds_in, official
from wanflow.config import RequestError
from wanflow.presets import T2V_A14B, Expert

FOLDERS = dict(T2V_A14B.expert_folders)
DIFFUSERS = {"high": "transformer", "low": "transformer_2", "t5": "text_encoder", "vae": "vae"}
OFFICIAL_STEMS: dict[Part, str] = {"t5": "models_t5_umt5-xxl-enc-bf16", "vae": "Wan2.1_VAE"}
TOKENIZER = "google/umt5-xxl/tokenizer.json"
TOKENIZERS = (
    TOKENIZER,
    "tokenizer/tokenizer.json",
    "tokenizer.json",
    "google/umt5-xxl/spiece.model",
    "tokenizer/spiece.model",
    "spiece.model",
)
# The fields that tensors do not show: their names in Diffusers' and transformers' configs -> ours.
DIT_FIELDS = {"num_attention_heads": "num_heads", "eps": "eps"}
T5_FIELDS = {"relative_attention_max_distance": "max_dist", "layer_norm_epsilon": "eps"}
VAE_FIELDS = {"latents_mean": "latent_mean", "latents_std": "latent_std"}
DEPTH, MANY = 4, 400  # of folders that are searched for loose files; files of one model at most


@dataclass(frozen=True)
class CheckpointFiles:
    """The parts of a model: files, or folders with an index.

    sheet: what the layout's own configs declare, with the keys of wanflow.json.
    shift: what the scheduler's config declares.
    own: the folder's own parts, even where the user named another file.
    """

    layout: str
    parts: Mapping[Part, Path]
    sheet: Mapping[str, Any] = field(default_factory=dict)
    shift: float | None = None
    own: Mapping[Part, Path] = field(default_factory=dict)


def find(
    folder: Path, given: Mapping[Part, Path], opened: Callable[[Path], TensorSource]
) -> CheckpointFiles:
    """Find the parts in a folder; parts that the user named (`given`) replace its own.

    `opened` opens a path, or returns the source that it opened before.

    Raises:
        RequestError: listing all that is missing, or naming what is ambiguous or of another model.
    """
    for part, path in given.items():
        if not path.exists():
            raise RequestError(f"{path} is missing; it was named as {WORDS[part]} (--{part})")
    if folder.is_file():
        raise RequestError(
            f"{folder} is one file, and a model has two experts, a text encoder and a VAE; name its"
            f" folder, or the files with {FLAGS}"
        )
    if not folder.is_dir():
        raise RequestError(f"{folder} is missing; {_help(folder)}")
    layout = layout_of(folder)
    if layout == "files":
        found = _loose(folder, given, opened)
    else:
        found = _official(folder) if layout == "official" else _diffusers(folder)
    parts = {**found.parts, **given}
    text, tokenizer = parts.get("t5"), parts.get("tokenizer")
    lacks_tokenizer = tokenizer is None or not tokenizer.exists()
    if lacks_tokenizer and text and text.is_file():
        from wanflow.checkpoint.tokenizers import carries_tokenizer

        if carries_tokenizer(opened(text)):
            parts["tokenizer"] = text
    for part, path in given.items():
        lost = list(_missing(path, path, config=False))
        if lost:
            raise RequestError(
                f"{path}, named as {WORDS[part]} (--{part}), lacks {', '.join(lost)}; {AGAIN}, or"
                " name another"
            )
    own = {path: part for part, path in parts.items() if part not in given}
    missing = sorted({name for path in own for name in _missing(path, folder)})
    missing += [WORDS[part] for part in PARTS if part not in parts]
    if missing:
        flags = [f"--{part}" for part in PARTS if part not in parts]
        by_hand = f", or name the files with {', '.join(flags)}" if flags else ""
        raise RequestError(
            f"{folder} is incomplete, it lacks {', '.join(missing)}; {_help(folder)}{by_hand}"
        )
    ordered = {part: parts[part] for part in PARTS}
    return CheckpointFiles(layout, ordered, found.sheet, found.shift, found.parts)


def layout_of(folder: Path) -> str:
    """Return the layout of a folder: official, diffusers or files."""
    if any((folder / name).is_dir() for name in FOLDERS.values()):
        return "official"
    return "diffusers" if (folder / "model_index.json").exists() else "files"


def _help(folder: Path) -> str:
    from wanflow.checkpoint.published import how_to_get

    return how_to_get(folder)


def _missing(path: Path, folder: Path, config: bool = True) -> Iterator[str]:
    """Yield the names of the files that a part needs and that are missing.

    A folder of a layout has a config.json (`config`); one that the user named need not.
    """
    if path.is_file():
        return
    needed = weight_files(path) if path.is_dir() or not path.suffix else [path]
    in_layout = path.parent == folder and path.name in (*FOLDERS.values(), *DIFFUSERS.values())
    if config and (not path.suffix or (path.is_dir() and in_layout)):
        needed = [path / "config.json", *needed]
    for file in needed:
        if not file.exists():
            yield file.relative_to(folder).as_posix() if file.is_relative_to(folder) else str(file)


def _official(folder: Path) -> CheckpointFiles:
    parts: dict[Part, Path] = {expert: folder / name for expert, name in FOLDERS.items()}
    for part, stem in OFFICIAL_STEMS.items():
        safe = folder / f"{stem}.safetensors"
        parts[part] = safe if safe.exists() else folder / f"{stem}.pth"
    parts["tokenizer"] = _tokenizer(folder) or folder / TOKENIZER
    return CheckpointFiles("official", parts)


def _diffusers(folder: Path) -> CheckpointFiles:
    """Find the parts by folder: `transformer` is the high-noise expert, `transformer_2` the low."""
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name")
    if name not in ("WanPipeline", None):
        raise RequestError(f"{folder} holds a {name}; {ONLY}")
    if not (folder / DIFFUSERS["low"]).is_dir():
        raise RequestError(
            f"{folder} has one expert only (there is no {DIFFUSERS['low']}): Wan2.1 or"
            f" Wan2.2-TI2V-5B; {ONLY}"
        )
    parts: dict[Part, Path] = {part: folder / name for part, name in DIFFUSERS.items()}
    parts["tokenizer"] = _tokenizer(folder) or folder / "tokenizer/tokenizer.json"
    sheet = {
        "dit": _declared(parts["high"], DIT_FIELDS),
        "text": _declared(parts["t5"], T5_FIELDS),
        "vae": _declared(parts["vae"], VAE_FIELDS),
    }
    boundary = index.get("boundary_ratio")
    if isinstance(boundary, int | float):
        sheet["defaults"] = {"boundary": float(boundary)}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    shift = read_json(scheduler).get("flow_shift") if scheduler.exists() else None
    known = float(shift) if isinstance(shift, int | float) else None
    return CheckpointFiles("diffusers", parts, sheet, known)


def _tokenizer(folder: Path) -> Path | None:
    return next((folder / name for name in TOKENIZERS if (folder / name).exists()), None)


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return read_json(file) if file.exists() else {}


def _declared(folder: Path, names: Mapping[str, str]) -> dict[str, Any]:
    """Return what the config in a folder declares under `names` (theirs -> ours)."""
    config = _config(folder)
    return {
        ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None
    }


def config_beside(path: Path) -> tuple[dict[str, Any], Path]:
    """Return what an expert's `config.json` declares, with official keys, and that file."""
    folder = path if path.is_dir() else path.parent
    config, file = _config(folder), folder / "config.json"
    if "num_attention_heads" in config:
        return _declared(folder, DIT_FIELDS), file
    return {key: value for key, value in config.items() if not key.startswith("_")}, file


# loose files


def _loose(
    folder: Path, given: Mapping[Part, Path], opened: Callable[[Path], TensorSource]
) -> CheckpointFiles:
    """Find the parts among files of any kind, by their content."""
    model_type = str(_config(folder).get("model_type"))
    named = {"t2v": "Wan2.1-T2V (one expert)"}.get(model_type) or BY_TYPE.get(model_type)
    if named:
        raise RequestError(f"{folder} holds {named}; {ONLY}; {_help(Path('FOLDER'))}")
    candidates: dict[Part, list[Path]] = {part: [] for part in PARTS}
    unnamed: list[Path] = []  # experts that nothing names
    others: list[str] = []  # what else is there
    for file in () if given.keys() >= set(WEIGHTS) else weight_groups(folder):
        try:
            source = opened(file)
            kinds = kinds_in(source)
            if "dit" in kinds:
                refuse_relatives(official("dit", source), {})
        except RequestError as error:  # one of many files, and perhaps not needed
            others.append(str(error))
            continue
        for kind in kinds:
            expert = which_expert(file, folder) if kind == "dit" else None
            part = expert if kind == "dit" else kind
            (unnamed if part is None else candidates[part]).append(file)
        if not kinds and not is_lora(source):
            others.append(f"{file} holds {describe(source)}")
    tokenizer = _tokenizer(folder)
    candidates["tokenizer"] = [] if tokenizer is None else [tokenizer]
    parts = _choose(folder, candidates, unnamed, given)
    lacking = [part for part in WEIGHTS if part not in parts and part not in given]
    if others and lacking:
        raise RequestError(
            f"{folder} lacks {', '.join(WORDS[part] for part in lacking)}; its other files:"
            f" {'; '.join(others[:3])}"
        )
    return CheckpointFiles("files", parts)


def weight_groups(folder: Path) -> Iterator[Path]:
    """Yield the loose files below a folder, and the folders of shards with an index, in order."""
    count = 0
    for place, folders, files in os.walk(folder):
        deep = len(Path(place).relative_to(folder).parts) >= DEPTH
        folders[:] = [] if deep else sorted(name for name in folders if not name.startswith("."))
        if any(name.endswith((".safetensors.index.json", ".bin.index.json")) for name in files):
            yield Path(place)
            continue
        for name in sorted(files):
            if Path(name).suffix.lower() in ENDINGS:
                count += 1
                if count > MANY:
                    raise RequestError(
                        f"{folder} holds more than {MANY} weight files; name the model's own"
                        f" folder, or its files with {FLAGS}"
                    )
                yield Path(place) / name


def which_expert(file: Path, folder: Path) -> Expert | None:
    """Return the expert in a loose file, by known hash, or by words in its path below `folder`.

    Raises:
        RequestError: when the name and the hash disagree.
    """
    from wanflow.checkpoint.published import expert_by_hash

    path = file.relative_to(folder) if file.is_relative_to(folder) else Path(file.name)
    named, known = expert_in_name(path.as_posix()), expert_by_hash(file)
    if named and known and named != known:
        raise RequestError(
            f"{file} is named as the {named}-noise expert, and its hash is that of the"
            f" {known}-noise one; use --{known} {file}"
        )
    return known or named or expert_by_hash(file, compute=True)


def _choose(
    folder: Path,
    candidates: Mapping[Part, list[Path]],
    unnamed: list[Path],
    given: Mapping[Part, Path],
) -> dict[Part, Path]:
    """Return one file for each part.

    Raises:
        RequestError: for several files of a part, or experts that nothing tells apart.
    """

    def listed(files: list[Path]) -> str:
        return ", ".join(file.relative_to(folder).as_posix() for file in files)

    for part, files in candidates.items():
        if len(files) > 1 and part not in given:
            raise RequestError(
                f"{folder} holds several files for {WORDS[part]}: {listed(files)}; name the one to"
                f" use with --{part}"
            )
    chosen = {part: files[0] for part, files in candidates.items() if files}
    if unnamed and set(EXPERTS) - chosen.keys() - given.keys():
        flags = " ".join(f"--{expert} FILE" for expert in EXPERTS)
        raise RequestError(
            f"{folder}: {listed(unnamed)} may hold any expert, and the tensors do not say which;"
            f" name them with {flags}, or put {' or '.join(EXPERTS)} into their names"
        )
    return chosen
