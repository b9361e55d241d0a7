"""Find the parts of a model: in the official folder, in Diffusers', among loose files, or named.

Finding reads headers at most. Both experts of a model have the same tensors. Which file is which
expert follows from the layout, from words in file and folder names, from the name of a Hugging Face
blob (its sha256), or from the user; otherwise it is refused. A network that has no expert beside it
(TI2V-5B) is known by its shapes; in the official layout it lies in the model's folder itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wanflow.checkpoint.containers import AGAIN, TensorSource, read_json
from wanflow.checkpoint.folders import STEMS, weight_files
from wanflow.checkpoint.infer_config import RUNS, model_of, refuse_relatives, vae_class
from wanflow.checkpoint.parts import (
    ENDINGS,
    EXPERTS,
    FLAGS,
    NETWORKS,
    PARTS,
    WORDS,
    Part,
    expert_in_name,
)
from wanflow.checkpoint.source import describe, is_lora, kinds_in, official
from wanflow.config import RequestError, VAE22Config, VAEConfig
from wanflow.presets import FAMILY, LENT, ONLY, T2V_A14B, TI2V_5B, Expert

FOLDERS = dict(T2V_A14B.expert_folders)
DIFFUSERS: dict[Part, str] = {
    "high": "transformer",
    "low": "transformer_2",
    ONLY: "transformer",
    "t5": "text_encoder",
    "vae": "vae",
}
T5_STEM = "models_t5_umt5-xxl-enc-bf16"
VAE_STEMS: dict[type[VAEConfig], str] = {VAEConfig: "Wan2.1_VAE", VAE22Config: "Wan2.2_VAE"}
PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")  # of Diffusers
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
SHARDED = tuple(f"{stem}." for stem in STEMS)  # how the one file of such a folder begins
DEPTH, MANY = 4, 400  # of folders that are searched for loose files; files of one model at most


@dataclass(frozen=True)
class CheckpointFiles:
    """The parts of a model: files, or folders with an index.

    sheet: what the layout's own configs declare, with the keys of wanflow.json.
    shift: what the scheduler's config declares.
    expand: whether Diffusers gives each token a time of its own.
    own: the folder's own parts, even where the user named another file.
    """

    layout: str
    parts: Mapping[Part, Path]
    sheet: Mapping[str, Any] = field(default_factory=dict)
    shift: float | None = None
    expand: bool | None = None
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
            f"{folder} is one file, and a model has two experts or a transformer, a text encoder"
            f" and a VAE; name its folder, or the files with {FLAGS}"
        )
    if not folder.is_dir():
        raise RequestError(f"{folder} is missing; {_help(folder)}")
    layout = layout_of(folder)
    if layout == "files":
        found = _loose(folder, given, opened)
    else:
        found = _official(folder) if layout == "official" else _diffusers(folder)
    parts = {**found.parts, **_lent(folder), **given}
    needed = (*_networks(folder, parts, given), "t5", "vae", "tokenizer")
    parts = {part: path for part, path in parts.items() if part in needed}
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
    missing += [WORDS[part] for part in needed if part not in parts]
    if missing:
        flags = [f"--{part}" for part in needed if part not in parts]
        by_hand = f", or name the files with {', '.join(flags)}" if flags else ""
        raise RequestError(
            f"{folder} is incomplete, it lacks {', '.join(missing)}; {_help(folder)}{by_hand}"
        )
    ordered = {part: parts[part] for part in needed}
    return replace(found, layout=layout, parts=ordered, own=found.parts)


def _lent(folder: Path) -> dict[Part, Path]:
    """Return the parts that a miniature has from another one."""
    lender = LENT.get(folder)
    parts = {} if lender is None else _official(lender).parts
    return {part: path for part, path in parts.items() if part not in EXPERTS}


def layout_of(folder: Path) -> str:
    """Return the layout of a folder: official, diffusers or files."""
    if has_experts(folder):
        return "official"
    if (folder / "model_index.json").exists():
        return "diffusers"
    try:
        one = _config(folder).get("model_type") == TI2V_5B.dit.model_type
    except RequestError:  # it is read, and refused, with the layout's own parts
        one = False
    return "official" if one else "files"


def has_experts(folder: Path) -> bool:
    """Return whether a folder has one of both experts, as the official layout has them."""
    return any((folder / name).is_dir() for name in FOLDERS.values())


def _networks(folder: Path, parts: Collection[Part], given: Collection[Part]) -> tuple[Expert, ...]:
    """Return the networks of a model: of those that the user named, else of those found.

    Raises:
        RequestError: for experts and the one network of another model.
    """
    for names in (given, parts):
        one = {name == ONLY for name in NETWORKS if name in names}
        if len(one) > 1:
            raise RequestError(
                f"{folder}: a model has {WORDS[ONLY]} (TI2V-5B) or two experts (A14B); name the one"
                f" with --{ONLY}, or both with {' and '.join(f'--{name}' for name in EXPERTS)}"
            )
        if one:
            return (ONLY,) if one.pop() else EXPERTS
    return EXPERTS


def _help(folder: Path) -> str:
    from wanflow.checkpoint.published import how_to_get

    tasks = {spec.dit.model_type: spec.task for spec in FAMILY}
    for place in (folder, *(folder / name for name in FOLDERS.values())):
        try:
            kind = _config(place).get("model_type")
        except RequestError:  # it says nothing
            continue
        if isinstance(kind, str) and kind in tasks:
            return how_to_get(folder, tasks[kind])
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
    two = has_experts(folder)
    networks = FOLDERS if two else dict(TI2V_5B.expert_folders)
    parts: dict[Part, Path] = {name: folder / place for name, place in networks.items()}
    # A VAE of the other kind is found too: its shapes tell what is wrong.
    stems = [*VAE_STEMS.values()][:: 1 if two else -1]
    for part, names in (("t5", [T5_STEM]), ("vae", stems)):
        files = [folder / f"{name}{end}" for name in names for end in (".safetensors", ".pth")]
        parts[part] = next((file for file in files if file.exists()), files[1])
    parts["tokenizer"] = _tokenizer(folder) or folder / TOKENIZER
    return CheckpointFiles("official", parts)


def _diffusers(folder: Path) -> CheckpointFiles:
    """Find the parts by folder: `transformer` is the high-noise expert, or the only network."""
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name")
    if name not in (*PIPELINES, None):
        raise RequestError(f"{folder} holds a {name}; {RUNS}")
    second = index.get("transformer_2")
    two = (folder / DIFFUSERS["low"]).is_dir() or (isinstance(second, list) and any(second))
    networks = EXPERTS if two else (ONLY,)
    parts = {part: folder / DIFFUSERS[part] for part in (*networks, "t5", "vae")}
    parts["tokenizer"] = _tokenizer(folder) or folder / "tokenizer/tokenizer.json"
    sheet = {
        "dit": _declared(parts[networks[0]], DIT_FIELDS),
        "text": _declared(parts["t5"], T5_FIELDS),
        "vae": _declared(parts["vae"], VAE_FIELDS),
    }
    boundary, expand = index.get("boundary_ratio"), index.get("expand_timesteps")
    if isinstance(boundary, int | float) and two:
        sheet["defaults"] = {"boundary": float(boundary)}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    shift = read_json(scheduler).get("flow_shift") if scheduler.exists() else None
    known = float(shift) if isinstance(shift, int | float) else None
    expand = expand if isinstance(expand, bool) else None
    return CheckpointFiles("diffusers", parts, sheet, known, expand)


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
    model_type = _config(folder).get("model_type")
    if model_type in ("t2v", "i2v", "flf2v"):
        raise RequestError(
            f"{folder} holds one network of the type {model_type}: Wan2.1, or one of two experts;"
            f" {RUNS}; {_help(Path('FOLDER'))}"
        )
    candidates: dict[Part, list[Path]] = {part: [] for part in PARTS}
    unnamed: list[Path] = []  # experts that nothing names
    others: list[str] = []  # what else is there
    for file in () if _all_named(given) else weight_groups(folder):
        try:
            source = opened(file)
            kinds = kinds_in(source)
            network = _network(source, file, folder) if "dit" in kinds else None
        except RequestError as error:  # one of many files, and perhaps not needed
            others.append(str(error))
            continue
        for kind in kinds:
            part = network if kind == "dit" else kind
            (unnamed if part is None else candidates[part]).append(file)
        if not kinds and not is_lora(source):
            others.append(f"{file} holds {describe(source)}")
    tokenizer = _tokenizer(folder)
    candidates["tokenizer"] = [] if tokenizer is None else [tokenizer]
    found = [part for part, files in candidates.items() if files]
    networks = _networks(folder, [*found, *(EXPERTS if unnamed else ())], given)
    candidates |= {name: [] for name in NETWORKS if name not in networks}
    if len(candidates["vae"]) > 1:  # ComfyUI's folder holds both kinds; the model takes one
        one = networks == (ONLY,)
        candidates["vae"] = [
            file
            for file in candidates["vae"]
            if (vae_class(official("vae", opened(file))) is VAE22Config) == one
        ] or candidates["vae"]
    parts = _choose(folder, candidates, unnamed if networks == EXPERTS else [], given)
    lacking = [part for part in (*networks, "t5", "vae") if part not in {**parts, **given}]
    if others and lacking:
        raise RequestError(
            f"{folder} lacks {', '.join(WORDS[part] for part in lacking)}; its other files:"
            f" {'; '.join(others[:3])}"
        )
    return CheckpointFiles("files", parts)


def _all_named(given: Collection[Part]) -> bool:
    """Return whether the user named all weights, so that no folder need be searched."""
    return any({*networks, "t5", "vae"} <= {*given} for networks in (EXPERTS, (ONLY,)))


def _network(source: TensorSource, file: Path, folder: Path) -> Expert | None:
    """Return which network of a model a loose file holds; None where nothing says which expert.

    Raises:
        RequestError: for one of another model.
    """
    dit = official("dit", source)
    refuse_relatives(dit, {})
    spec = model_of(dit)
    return ONLY if spec and ONLY in spec.expert_names else which_expert(file, folder)


def weight_groups(folder: Path) -> Iterator[Path]:
    """Yield the loose files below a folder, and the folders of shards with an index, in order."""
    count = 0
    for place, folders, files in os.walk(folder):
        deep = len(Path(place).relative_to(folder).parts) >= DEPTH
        folders[:] = [] if deep else sorted(name for name in folders if not name.startswith("."))
        if any(name.endswith((".safetensors.index.json", ".bin.index.json")) for name in files):
            yield Path(place)
            # What lies beside the shards: the text encoder and the VAE of TI2V-5B.
            files = [name for name in files if "-of-" not in name and not name.startswith(SHARDED)]
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
