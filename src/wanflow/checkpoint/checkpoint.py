"""A model on disk: find its parts, open each file once, and infer shapes and defaults.

Shapes come from the tensors. A config that disagrees with them is refused, so a model is never
built larger than its files. What no layout can say of an unpublished model is in `wanflow.json`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wanflow.checkpoint.containers import TensorInfo, TensorSource, read_json, reading
from wanflow.checkpoint.folders import weight_files
from wanflow.checkpoint.infer_config import (
    SHEET,
    VAES,
    configure,
    dit_shapes,
    model_of,
    refuse_relatives,
    statistics,
    text_shapes,
    told_by,
    vae_class,
    vae_shapes,
)
from wanflow.checkpoint.key_maps import Kind
from wanflow.checkpoint.layouts import CheckpointFiles, config_beside, find
from wanflow.checkpoint.parts import NETWORKS, Part, kind_of, weights_of
from wanflow.checkpoint.source import OfficialSource, official, open_source
from wanflow.checkpoint.structure import Config, check, module_of
from wanflow.config import DiTConfig, RequestError, TextConfig, VAE22Config, VAEConfig, plain
from wanflow.geometry import parse_size
from wanflow.presets import ONLY, T2V_A14B, Expert, ModelSpec
from wanflow.request import Request

SECTIONS = {
    "name": str,
    "task": str,
    "dit": dict,
    "text": dict,
    "vae": dict,
    "defaults": dict,
    "vocabulary": list,
}
SHAPES = {"name", "task", "dit", "text", "vae", "expert_folders"}  # of a spec, not defaults
DEFAULTS = {field.name for field in fields(ModelSpec)} - SHAPES
TOKENIZER_DISK = 22_000_000  # bytes of the published tokenizer, configs and headers
PUBLISHED_DTYPES: dict[Kind, torch.dtype] = {
    "dit": torch.float32,
    "t5": torch.bfloat16,
    "vae": torch.float32,
}
WINDOW, WINDOWS = 64 << 10, 16  # what a fingerprint samples of a file
# Nano's tokenizer.json says since 2026-11 how prompts end, for other programs. Nothing that wanflow
# makes changed, so nano keeps the fingerprint that recipes and saved runs have of it.
KEPT = {"58322076bc1e54c9": "e0344b796653d108"}


@dataclass(frozen=True)
class Checkpoint:
    """A model's shapes, defaults and opened sources. Headers are read, weights are not.

    It is a complete model in a folder, one part of a model (`convert`), or the published model
    without its files (a plan).
    """

    spec: ModelSpec
    sources: Mapping[Part, OfficialSource]  # of the weights, by part
    folder: Path
    paths: Mapping[Part, Path] = field(default_factory=dict)  # files, or folders with an index
    vocabulary: tuple[str, ...] = ()  # the words of a model that knows few
    layout: str = "official"
    given: Mapping[Part, Path] = field(default_factory=dict)  # parts that the user named
    notes: tuple[str, ...] = ()  # warnings about this folder

    def source(self, part: Part) -> OfficialSource:
        """Return the opened source of an expert, the text encoder or the VAE."""
        return self.sources[part]

    def config(self, part: Part) -> Config:
        """Return the shape of a part."""
        configs: dict[Kind, Config] = {
            "dit": self.spec.dit,
            "t5": self.spec.text,
            "vae": self.spec.vae,
        }
        return configs[kind_of(part)]

    def module(self, part: Part) -> nn.Module:
        """Return a part on meta, in float32 and not packed."""
        return module_of(self.config(part))

    def parameters(self, part: Part) -> int:
        """Return the number of a part's parameters."""
        return self.source(part).parameters

    def file_bytes(self, part: Part) -> int:
        """Return the bytes that loading a part reads."""
        return self.source(part).nbytes

    @property
    def disk_bytes(self) -> int:
        """The size of all weight files, indexes included."""
        if not self.paths:
            return sum(map(self.file_bytes, self.sources)) + TOKENIZER_DISK
        files = {file for part in self.sources for file in _files(self.paths[part])}
        return sum(file.stat().st_size for file in files if file.exists())


def open_checkpoint(
    folder: Path,
    given: Mapping[Part, Path] | None = None,
    opened: Callable[[Path], TensorSource] | None = None,
) -> Checkpoint:
    """Find and open every part of a model, and check every header; no weight is read.

    Args:
        folder: in the official or Diffusers' layout, or with loose files of any kind.
        given: parts that the user named, in place of the folder's own.
        opened: opens a path, or returns the source that it opened before.

    Raises:
        RequestError: listing all that is missing, or naming what is broken, foreign or
            inconsistent.
    """
    folder, given = Path(folder), dict(given or {})
    opened = opened or cache(open_source)
    with reading(folder):
        found = find(folder, given, opened)
        sheet = _merged(found, _read_sheet(folder / SHEET))
        sources: dict[Part, OfficialSource] = {
            part: official(kind_of(part), opened(path))
            for part, path in found.parts.items()
            if part != "tokenizer"
        }
        dit = _dit_config(folder, found, sources, sheet.get("dit", {}), given)
        preset = told_by(dit.in_dim, dit.out_dim) or T2V_A14B
        t5, vae = sources["t5"], sources["vae"]
        text_config = configure(TextConfig, text_shapes(t5), sheet.get("text", {}), t5.path)
        kind, levels = vae_class(vae), vae_shapes(vae)
        _refuse_vae(preset, kind, vae)
        declared = statistics(kind, levels, sheet.get("vae", {}), vae.path)
        vae_config = configure(kind, levels, declared, vae.path)
        _refuse_mixed(folder, dit, text_config, vae_config)
        check(module_of(text_config), t5)
        check(module_of(vae_config), vae)
        shapes = replace(preset, dit=dit, text=text_config, vae=vae_config)
        spec = _spec(folder, preset, shapes, sheet)
        return Checkpoint(
            spec,
            sources,
            folder,
            found.parts,
            tuple(str(word) for word in sheet.get("vocabulary", ())),
            found.layout,
            given,
            _notes(found, spec),
        )


def _merged(found: CheckpointFiles, sheet: dict[str, Any]) -> dict[str, Any]:
    """Return what `wanflow.json` declares, over what the layout's own configs declare."""
    merged = dict(sheet)
    for section, declared in found.sheet.items():
        merged[section] = {**declared, **sheet.get(section, {})}
    return merged


def _read_sheet(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    sheet = {key: value for key, value in read_json(path).items() if not key.startswith("_")}
    for key, value in sheet.items():
        if not isinstance(value, SECTIONS.get(key, ())):
            raise RequestError(
                f"{path}: {key} is unknown or of the wrong kind; known are {', '.join(SECTIONS)}"
            )
    unknown = sorted(set(sheet.get("defaults", {})) - DEFAULTS)
    if unknown:
        raise RequestError(
            f"{path}: unknown defaults {', '.join(unknown)}; known are"
            f" {', '.join(sorted(DEFAULTS))}"
        )
    return sheet


def _dit_config(
    folder: Path,
    found: CheckpointFiles,
    sources: Mapping[Part, OfficialSource],
    extra: Mapping[str, Any],
    given: Mapping[Part, Path],
) -> DiTConfig:
    """Return the one shape of all networks; RequestError where two experts differ."""
    first, *others = (
        _expert_config(found, part, sources[part], folder, extra, part in given)
        for part in found.parts
        if part in NETWORKS
    )
    for other in others:
        high, low = (told_by(config.in_dim, config.out_dim) for config in (first, other))
        if high and low and high is not low:
            raise RequestError(
                f"{folder}: the high-noise expert is of {high.name} and the low-noise one of"
                f" {low.name}; name two of one model with --high and --low"
            )
        names = [
            f.name for f in fields(DiTConfig) if getattr(first, f.name) != getattr(other, f.name)
        ]
        if names:
            raise RequestError(
                f"{folder}: the two experts differ in {', '.join(names)}; they are not of one"
                " model; name two that belong together with --high and --low"
            )
    return first


def _expert_config(
    found: CheckpointFiles,
    part: Expert,
    source: OfficialSource,
    folder: Path,
    extra: Mapping[str, Any],
    given: bool,
) -> DiTConfig:
    """Return the shape of an expert; its tensors, its config and `wanflow.json` must agree."""
    path = found.parts[part]
    # Any config may be next to a file that the user named, so it does not count. Then the config
    # of the expert that the file replaces counts.
    if given and path.is_file():
        declared, file = (
            config_beside(found.own[part]) if part in found.own else ({}, folder / SHEET)
        )
    else:
        declared, file = config_beside(path)
    refuse_relatives(source, declared)
    _refuse_alone(part, source)
    for key, value in extra.items():
        if declared.setdefault(key, value) != value:
            raise RequestError(f"{file} says {key} {declared[key]}, {SHEET} says {value}")
    config = configure(DiTConfig, dit_shapes(source, declared), declared, file)
    check(module_of(config), source)
    return config


def _refuse_alone(part: Expert, source: OfficialSource) -> None:
    """Raise a RequestError for an expert in place of the one network, or the other way round."""
    spec = model_of(source)
    if spec is None or part in spec.expert_names:
        return
    if part == ONLY:
        raise RequestError(
            f"{source.path} has the channels of {spec.name}, which has two experts, and is one"
            " network: Wan2.1, or one of the experts; name both with --high and --low"
        )
    raise RequestError(
        f"{source.path} holds the transformer of {spec.name}, which has no experts; name it with"
        f" --{ONLY}, and no --high or --low"
    )


def _refuse_vae(spec: ModelSpec, kind: type[VAEConfig], vae: OfficialSource) -> None:
    """Raise a RequestError for the VAE of another model of the family."""
    if type(spec.vae) is kind:
        return
    channels = vae_shapes(vae)["z_dim"]
    uses = "I2V-A14B and T2V-A14B use wan_2.1_vae (Wan2.1_VAE.pth); wan2.2_vae belongs to TI2V-5B"
    if kind is not VAE22Config:
        uses = "TI2V-5B uses wan2.2_vae (Wan2.2_VAE.pth), with 48"
    raise RequestError(
        f"{vae.path} is {VAES[kind]}, with {channels} channels, and not of one model with"
        f" {spec.name}: {uses}; name the right one with --vae"
    )


def _refuse_mixed(folder: Path, dit: DiTConfig, text: TextConfig, vae: VAEConfig) -> None:
    widths = {"text width": (dit.text_dim, text.dim), "latent channels": (dit.out_dim, vae.z_dim)}
    for what, values in widths.items():
        if len(set(values)) > 1:
            raise RequestError(
                f"{folder}: the experts, the text encoder and the VAE are not of one model"
                f" ({what} {values})"
            )


def _spec(
    folder: Path, preset: ModelSpec, shapes: ModelSpec, sheet: Mapping[str, Any]
) -> ModelSpec:
    """Return the shapes with the sheet's defaults, else the published ones of `preset`.

    The defaults are checked by completing a request with them.
    """
    name = preset.name if shapes == preset else folder.resolve().name
    defaults = {
        **sheet.get("defaults", {}),
        "name": plain(sheet.get("name", name)),
        "task": sheet.get("task", shapes.task),
    }
    try:
        if "size" in defaults:
            defaults["size"] = parse_size(defaults["size"])
        spec = replace(shapes, **defaults)
        if spec.conditioning != shapes.conditioning:
            raise RequestError(
                f"conditioning {spec.conditioning!r}: the tensors say {shapes.conditioning!r}"
            )
        Request("any", seed=0).complete(spec)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{folder / SHEET}: {error}") from None
    return spec


def _notes(found: CheckpointFiles, spec: ModelSpec) -> tuple[str, ...]:
    notes = []
    if found.shift is not None and found.shift != spec.sample_shift:
        notes.append(
            f"the scheduler's config says flow_shift {found.shift:g}; {spec.name} was published"
            f" with {spec.sample_shift:g}, which is used (--sample_shift {found.shift:g} for the"
            " other)"
        )
    expands = spec.conditioning == "first_frame"
    if found.expand is not None and found.expand != expands:
        notes.append(
            f"model_index.json says expand_timesteps {str(found.expand).lower()}; {spec.name}"
            f" {'gives each token its time' if expands else 'has one time for all tokens'}, which"
            " is what happens"
        )
    return tuple(notes)


# without files


def published(spec: ModelSpec = T2V_A14B) -> Checkpoint:
    """Return the official model, or one of other shapes, stored as the official files are."""
    checkpoint = Checkpoint(spec, {}, Path(spec.name), layout="published")
    sources = {}
    for part in weights_of(spec):
        dtype = PUBLISHED_DTYPES[kind_of(part)]
        tensors = {
            name: TensorInfo(tuple(parameter.shape), dtype)
            for name, parameter in checkpoint.module(part).named_parameters()
        }
        headers = TensorSource(Path(spec.name), tensors)
        names = {name: name for name in tensors}
        sources[part] = OfficialSource(headers.path, tensors, headers, names)
    return replace(checkpoint, sources=sources)


# identity


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return 16 hex digits that tell two sets of weights apart without reading 126 GB.

    sha256 over every file's name and size, safetensors headers, and 16 evenly spread windows of 64
    KiB of its content (all of it up to 1 MiB). Other weights change it. A few flipped bytes between
    the windows may not: it is no checksum.
    """
    files = [checkpoint.folder / SHEET]
    for part, path in checkpoint.paths.items():
        files += [path / "config.json"] if part in NETWORKS and path.is_dir() else []
        files += _files(path)
    # In the order of the names inside, and of bare names outside: it must not depend on where a
    # folder or a file stands on this machine.
    folder, labelled = checkpoint.folder, []
    for file in {file for file in files if file.exists()}:
        inside = file.is_relative_to(folder)
        labelled.append((inside, file.relative_to(folder) if inside else Path(file.name), file))
    digest = _digest((f"{name.as_posix()} ", file) for _, name, file in sorted(labelled))
    return KEPT.get(digest, digest)


def text_fingerprint(checkpoint: Checkpoint) -> str:
    """Return 16 hex digits that tell two text encoders with their tokenizers apart.

    Raises:
        RequestError: for a file that cannot be read.
    """
    return _digest_of(checkpoint, "t5", "tokenizer")


def vae_fingerprint(checkpoint: Checkpoint) -> str:
    """Return 16 hex digits that tell two VAEs apart.

    Raises:
        RequestError: for a file that cannot be read.
    """
    return _digest_of(checkpoint, "vae")


def _digest_of(checkpoint: Checkpoint, *parts: Part) -> str:
    paths = (checkpoint.paths[part] for part in parts)
    return _digest(("", file) for path in paths for file in sorted(_files(path)))


def _digest(labelled: Iterable[tuple[str, Path]]) -> str:
    """Return 16 hex digits of files' labels, sizes and samples."""
    digest = hashlib.sha256()
    for label, file in labelled:
        with reading(file):
            digest.update(f"{label}{file.stat().st_size}\n".encode())
            for sample in samples(file):
                digest.update(sample)
    return digest.hexdigest()[:16]


def _files(path: Path) -> list[Path]:
    return weight_files(path) if path.is_dir() else [path]


def samples(path: Path) -> Iterator[bytes]:
    """Yield the header and 16 windows of a file, or all of a small one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WINDOW * WINDOWS:
            yield file.read()
            return
        if path.suffix == ".safetensors":
            yield file.read(8 + min(int.from_bytes(file.read(8), "little"), size))
        for number in range(WINDOWS):
            file.seek((size - WINDOW) * number // (WINDOWS - 1))
            yield file.read(WINDOW)
