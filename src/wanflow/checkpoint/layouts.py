"""Where the parts of a model lie: the official folder, Diffusers', or loose files of any kind, and
each part by itself.

Finding reads headers at most. High- and low-noise expert have the same tensors, so which is which
is told by the layout, by words in file and folder names, by the name of a Hugging Face blob (its
sha256), or by the user; where none of these says it, it is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanflow.checkpoint.containers import TensorSource, read_json, weight_files
from wanflow.checkpoint.infer_config import BY_TYPE, ONLY, refuse_relatives
from wanflow.checkpoint.key_maps import Kind, expert_in_name
from wanflow.checkpoint.published import VARIANTS, expert_by_hash
from wanflow.checkpoint.source import Part, describe, is_lora, kinds_in, official
from wanflow.checkpoint.tokenizers import carries_tokenizer
from wanflow.config import RequestError
from wanflow.presets import T2V_A14B, Expert

FOLDERS = dict(T2V_A14B.expert_folders)
DIFFUSERS: dict[Part, str] = {
    "high": "transformer",
    "low": "transformer_2",
    "t5": "text_encoder",
    "vae": "vae",
}
T5_STEM, VAE_STEM = "models_t5_umt5-xxl-enc-bf16", "Wan2.1_VAE"
TOKENIZER = "google/umt5-xxl/tokenizer.json"
TOKENIZERS = (
    TOKENIZER,
    "tokenizer/tokenizer.json",
    "tokenizer.json",
    "google/umt5-xxl/spiece.model",
    "tokenizer/spiece.model",
    "spiece.model",
)
# What Diffusers' and transformers' configs call the fields that tensors do not show.
DIT_WORDS = {"num_attention_heads": "num_heads", "eps": "eps"}
T5_WORDS = {"relative_attention_max_distance": "max_dist", "layer_norm_epsilon": "eps"}
VAE_WORDS = {"latents_mean": "latent_mean", "latents_std": "latent_std"}
EXPERTS = T2V_A14B.expert_names
PARTS: tuple[Part, ...] = (*EXPERTS, "t5", "vae", "tokenizer")
KINDS: dict[Part, Kind] = {**dict.fromkeys(EXPERTS, "dit"), "t5": "t5", "vae": "vae"}
WORDS: dict[Part, str] = {
    "high": "the high-noise expert",
    "low": "the low-noise expert",
    "t5": "the text encoder",
    "vae": "the VAE",
    "tokenizer": "the tokenizer",
}
ENDINGS = {".safetensors", ".sft", ".gguf", ".pth", ".pt", ".bin"}
DEPTH, MANY = (
    4,
    400,
)  # how deep loose files are looked for, and how many files are too many to be a model's folder


def kind_of(part: Part) -> Kind:
    """Return the kind of model that a part is; KeyError for the tokenizer."""
    return KINDS[part]


ASK = "--high, --low, --t5, --vae"


@dataclass(frozen=True)
class CheckpointFiles:
    """The parts of a model: files, or folders with an index."""

    layout: str
    parts: Mapping[Part, Path]
    sheet: Mapping[str, Any] = field(
        default_factory=dict
    )  # what configs of this layout say, in the words of wanflow.json
    shift: float | None = None  # what a scheduler's config says
    own: Mapping[Part, Path] = field(
        default_factory=dict
    )  # what the folder has itself, also where a part was named by hand


def find(
    folder: Path, given: Mapping[Part, Path], opened: Callable[[Path], TensorSource]
) -> CheckpointFiles:
    """Find the parts in a folder; parts that the user named replace its own.

    Args:
        opened: opens a path, or returns the source that it opened before.

    Raises:
        RequestError: listing all that is missing; or naming what is ambiguous, or of another model.
    """
    for part, path in given.items():
        if not path.exists():
            raise RequestError(f"{path} is missing; it was named as {WORDS[part]}")
    if folder.is_file():
        raise RequestError(
            f"{folder} is one file, and a model has two experts, a text encoder and a VAE; name its"
            " folder, or the files with --high, --low, --t5, --vae"
        )
    if not folder.is_dir():
        raise RequestError(f"{folder} is missing; {_help(folder)}")
    layout = layout_of(folder)
    if layout == "files":
        found = _loose(folder, given, opened)
    else:
        found = _official(folder) if layout == "official" else _diffusers(folder)
    parts = {**found.parts, **given}
    text = parts.get("t5")
    if (
        not _exists(parts.get("tokenizer"))
        and text is not None
        and text.is_file()
        and carries_tokenizer(opened(text))
    ):
        parts["tokenizer"] = text
    missing = sorted(
        {name for part, path in parts.items() for name in _missing(path, folder, part in given)}
    )
    missing += [WORDS[part] for part in PARTS if part not in parts]
    if missing:
        raise RequestError(
            f"{folder} is incomplete, it lacks {', '.join(missing)}; {_help(folder)}{_flags(parts)}"
        )
    return CheckpointFiles(
        found.layout, {part: parts[part] for part in PARTS}, found.sheet, found.shift, found.parts
    )


def layout_of(folder: Path) -> str:
    """Return the layout of a folder: official, diffusers or files."""
    if any((folder / name).is_dir() for name in FOLDERS.values()):
        return "official"
    return "diffusers" if (folder / "model_index.json").exists() else "files"


def _help(folder: Path) -> str:
    """How to get what a folder lacks; a variant's own folder is filled with that variant."""
    variant = next(
        (
            f" --variant {name}"
            for name, one in VARIANTS.items()
            if one.folder == folder.name and name != "official"
        ),
        "",
    )
    return f"get the weights with `wanflow download{variant} --local_dir {folder}`"


def _exists(path: Path | None) -> bool:
    return path is not None and path.exists()


def _flags(parts: Mapping[Part, Path]) -> str:
    """How to name by hand what a folder of loose files lacks."""
    absent = [f"--{part}" for part in PARTS if part not in parts]
    return f", or name the files with {', '.join(absent)}" if absent else ""


def _missing(path: Path, folder: Path, given: bool) -> Iterator[str]:
    """Names of the files that a part needs and that are not there."""
    wanted = weight_files(path) if path.is_dir() else [path]
    if (
        path.is_dir()
        and not given
        and path.parent == folder
        and path.name in (*FOLDERS.values(), *DIFFUSERS.values())
    ):
        wanted = [path / "config.json", *wanted]
    elif not path.suffix:
        wanted = [path / "config.json", *weight_files(path)]
    for file in wanted:
        if not file.exists():
            yield file.relative_to(folder).as_posix() if file.is_relative_to(folder) else str(file)


# the official layout


def _official(folder: Path) -> CheckpointFiles:
    parts: dict[Part, Path] = {which: folder / name for which, name in FOLDERS.items()}
    files: tuple[tuple[Part, str], ...] = (("t5", T5_STEM), ("vae", VAE_STEM))
    for part, stem in files:
        safe = folder / f"{stem}.safetensors"
        parts[part] = safe if safe.exists() else folder / f"{stem}.pth"
    parts["tokenizer"] = next(
        (folder / name for name in TOKENIZERS if (folder / name).exists()), folder / TOKENIZER
    )
    return CheckpointFiles("official", parts)


# Diffusers'


def _diffusers(folder: Path) -> CheckpointFiles:
    """`transformer` is the high-noise expert, `transformer_2` the low-noise one."""
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
    parts["tokenizer"] = next(
        (folder / name for name in TOKENIZERS if (folder / name).exists()),
        folder / "tokenizer/tokenizer.json",
    )
    sheet = {
        "dit": _said(parts["high"], DIT_WORDS),
        "text": _said(parts["t5"], T5_WORDS),
        "vae": _said(parts["vae"], VAE_WORDS),
    }
    boundary = index.get("boundary_ratio")
    if isinstance(boundary, int | float):
        sheet["defaults"] = {"boundary": float(boundary)}
    shift = (
        read_json(scheduler).get("flow_shift")
        if (scheduler := folder / "scheduler" / "scheduler_config.json").exists()
        else None
    )
    return CheckpointFiles(
        "diffusers", parts, sheet, float(shift) if isinstance(shift, int | float) else None
    )


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json") if (folder / "config.json").exists() else {}


def _said(folder: Path, words: Mapping[str, str]) -> dict[str, Any]:
    """What the config in a folder says under `words` (theirs -> ours)."""
    config = _config(folder)
    return {
        ours: config[theirs] for theirs, ours in words.items() if config.get(theirs) is not None
    }


# loose files


def _loose(
    folder: Path, given: Mapping[Part, Path], opened: Callable[[Path], TensorSource]
) -> CheckpointFiles:
    """Files of any kind, told apart by what is in them."""
    model_type = str(_config(folder).get("model_type"))
    named = {"t2v": "Wan2.1-T2V (one expert)"}.get(model_type) or BY_TYPE.get(model_type)
    if named:
        raise RequestError(f"{folder} holds {named}; {ONLY}; {_help(Path('FOLDER'))}")
    candidates: dict[Part, list[Path]] = {part: [] for part in PARTS}
    doubtful: list[Path] = []
    others: list[str] = []
    for file in () if all(part in given for part in PARTS[:4]) else weight_groups(folder):
        try:
            source = opened(file)
            kinds = kinds_in(source)
            if "dit" in kinds:
                refuse_relatives(official("dit", source), {})
        except RequestError as error:  # one of many files, and perhaps not needed
            others.append(str(error))
            continue
        if "dit" in kinds:
            which = which_expert(file, folder)
            (candidates[which] if which else doubtful).append(file)
        for kind in kinds:
            if kind != "dit":
                candidates[kind].append(file)
        if not kinds and not is_lora(source):
            others.append(f"{file} holds {describe(source)}")
    candidates["tokenizer"] = [folder / name for name in TOKENIZERS if (folder / name).exists()][:1]
    parts = _choose(folder, candidates, doubtful, given)
    lacking = [part for part in PARTS[:4] if part not in parts and part not in given]
    if others and lacking:
        raise RequestError(
            f"{folder} lacks {', '.join(WORDS[part] for part in lacking)}; what it holds beside:"
            f" {'; '.join(others[:3])}"
        )
    return CheckpointFiles("files", parts)


def weight_groups(folder: Path) -> Iterator[Path]:
    """Loose files below a folder, and folders of shards that an index ties together, in order."""
    count = 0
    for place, folders, files in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        folders[:] = (
            sorted(name for name in folders if not name.startswith(".")) if depth < DEPTH else []
        )
        if any(name.endswith(".safetensors.index.json") for name in files):
            yield Path(place)
            continue
        for name in sorted(files):
            if Path(name).suffix.lower() in ENDINGS:
                count += 1
                if count > MANY:
                    raise RequestError(
                        f"{folder} holds more than {MANY} weight files; name the model's own"
                        f" folder, or its files: {ASK}"
                    )
                yield Path(place) / name


def which_expert(file: Path, folder: Path) -> Expert | None:
    """The expert a loose file holds, by its known hash, or by words in its path below `folder`;
    None where nothing says it.
    """
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
    doubtful: list[Path],
    given: Mapping[Part, Path],
) -> dict[Part, Path]:
    """One file a part; a RequestError where there are several, or where an expert's name does not
    say which it is.
    """
    chosen: dict[Part, Path] = {}
    for part, files in candidates.items():
        if len(files) > 1 and part not in given:
            names = ", ".join(file.relative_to(folder).as_posix() for file in files)
            raise RequestError(
                f"{folder} holds several files for {WORDS[part]}: {names}; name the one to use with"
                f" --{part}"
            )
        if files:
            chosen[part] = files[0]
    if doubtful and {"high", "low"} - chosen.keys() - given.keys():
        names = ", ".join(file.relative_to(folder).as_posix() for file in doubtful)
        raise RequestError(
            f"{folder}: {names} may hold either expert, and the tensors do not say which; name them"
            " with --high FILE --low FILE, or put high or low into their names"
        )
    return chosen


def config_beside(path: Path) -> tuple[dict[str, Any], Path]:
    """What the `config.json` beside an expert says in the official words, and the file that says
    it.
    """
    folder = path if path.is_dir() else path.parent
    config = _config(folder)
    if "num_attention_heads" in config:
        return _said(folder, DIT_WORDS), folder / "config.json"
    return {
        key: value for key, value in config.items() if not key.startswith("_")
    }, folder / "config.json"
