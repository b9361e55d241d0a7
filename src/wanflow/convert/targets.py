"""What a conversion writes: the files of each layout, their tensors and the small files beside
them, planned from headers alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.checkpoint.infer_config import SHEET, configure, text_shapes
from wanflow.checkpoint.key_maps import Dialect, Kind
from wanflow.checkpoint.layouts import DIFFUSERS, EXPERTS, FOLDERS, OFFICIAL_STEMS, kind_of
from wanflow.checkpoint.source import EMBEDDED, OfficialSource, Part
from wanflow.checkpoint.tokenizers import open_tokenizer
from wanflow.config import RequestError, TextConfig
from wanflow.convert import configs
from wanflow.convert.encode import StorageFormat, bytes_entry, entries
from wanflow.convert.write import TensorSpec, shards, write_safetensors, write_torch
from wanflow.convert.write_gguf import KINDS, Note, note_text, package, pieces_in, write_gguf
from wanflow.presets import T2V_A14B

Layout = Literal["official", "diffusers", "comfy", "gguf"]
SHARD = 10_000_000_000  # bytes, as the published experts have it
TOKENIZER_FILES = (
    "tokenizer.json",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
SINGLE = "file"  # the layout of a checkpoint that is one part of a model
ARCHITECTURE: dict[Kind, str] = {"dit": "wan", "t5": "t5encoder"}
# The names of each layout; ComfyUI's single files have the official names, and transformers' for
# the text encoder.
DIALECT: dict[Layout, dict[Kind, Dialect]] = {
    "official": {"dit": "official", "t5": "official", "vae": "official"},
    "diffusers": {"dit": "diffusers", "t5": "huggingface", "vae": "diffusers"},
    "comfy": {"dit": "official", "t5": "huggingface", "vae": "official"},
    "gguf": {"dit": "official", "t5": "gguf", "vae": "official"},
}


@dataclass(frozen=True)
class Target:
    """A layout and how its tensors are stored; `word` is what its file names say of that."""

    layout: Layout
    coding: StorageFormat
    word: str = ""

    def of(self, kind: Kind, dtype: str | None, alone: bool) -> StorageFormat:
        """The coding of one part.

        Args:
            dtype: what the user wants for all that is not quantised.
            alone: nothing else is converted, so that this part was asked for by name.
        """
        if (
            kind == "vae"
        ):  # beside quantised weights it stays as it is: half a gigabyte, and rounding it shows
            small = self.coding.quant is not None or self.coding.gguf
            return StorageFormat(plain=dtype or (None if small else self.coding.plain))
        coding = replace(self.coding, plain=dtype or self.coding.plain)
        if kind == "t5" and coding.quant in KINDS and not alone:
            return replace(coding, quant="Q8_0")  # it runs once a prompt, and decides what is drawn
        return coding


TARGETS: dict[str, Target] = {
    "official": Target("official", StorageFormat()),
    "diffusers": Target("diffusers", StorageFormat()),
    "bf16": Target("comfy", StorageFormat(plain="BF16"), "bf16"),
    "fp16": Target("comfy", StorageFormat(plain="F16"), "fp16"),
    "fp8": Target("comfy", StorageFormat("F8_E4M3", "BF16"), "fp8_scaled"),
    **{
        f"gguf-{kind.lower()}": Target("gguf", StorageFormat(kind, "F16", True), kind)
        for kind in KINDS
    },
    "gguf-f16": Target("gguf", StorageFormat(None, "F16", True), "F16"),
    "gguf-bf16": Target("gguf", StorageFormat(None, "BF16", True), "BF16"),
}
WORDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Options:
    """How to convert.

    dtype: float32, bfloat16 or float16 for what is not quantised; None: what the target usually
        has.
    parts: of high, low, t5, vae; those to convert.
    shard: most bytes of a file, in layouts that have several.
    """

    to: str
    dtype: str | None = None
    parts: tuple[Part, ...] = ("high", "low", "t5", "vae")
    shard: int = SHARD
    overwrite: bool = False

    @property
    def target(self) -> Target:
        return TARGETS[self.to]

    def coding(self, kind: Kind, alone: bool = False) -> StorageFormat:
        return self.target.of(kind, WORDS[self.dtype] if self.dtype else None, alone)


def options(to: str, dtype: str | None = None, **others: Any) -> Options:
    """Checked options; RequestError for what does not exist or go together."""
    if to not in TARGETS:
        raise RequestError(
            f"there is no format {to!r} to convert to; there are {', '.join(TARGETS)}"
        )
    if dtype is not None and dtype not in WORDS:
        raise RequestError(f"dtype {dtype!r} is none of {', '.join(WORDS)}")
    coding = TARGETS[to].coding
    if dtype is not None and coding.quant is None and coding.plain not in (None, WORDS[dtype]):
        raise RequestError(f"--to {to} says the dtype already; leave out --dtype {dtype}")
    if coding.gguf:
        package()
    return Options(to, dtype, **others)


def single_kind(model: Checkpoint) -> Kind | None:
    """Return the kind of a part that is converted alone; None for a complete model."""
    return kind_of(next(iter(model.sources))) if model.layout == SINGLE else None


def source_paths(model: Checkpoint) -> list[Path]:
    """Return the paths that a conversion reads from."""
    return [model.folder, *(part.path for part in model.sources.values()), *model.paths.values()]


def _tokenizer_files(path: Path) -> dict[str, bytes]:
    """The files of a tokenizer, `tokenizer.json` always among them, whatever it is read from."""
    names = TOKENIZER_FILES if path.name in TOKENIZER_FILES else ()
    files = {
        name: (path.parent / name).read_bytes() for name in names if (path.parent / name).is_file()
    }
    if path.suffix == ".json":
        files["tokenizer.json"] = path.read_bytes()
    if "tokenizer.json" not in files:
        files["tokenizer.json"] = open_tokenizer(path).to_str().encode()
    return files


# what comes out


@dataclass(frozen=True)
class Output:
    """A file of tensors, by its path in the folder to be."""

    path: str
    entries: list[TensorSpec]
    note: Note | None = None  # of a GGUF file's header
    arch: str = ""
    kind: str = ""

    def write(self, path: Path, count: Callable[[int], None]) -> None:
        if self.arch:
            write_gguf(
                path, self.entries, count, self.arch, self.kind, self.note or (lambda writer: None)
            )
        elif self.path.endswith(".pth"):
            write_torch(path, self.entries, count)
        else:
            write_safetensors(path, self.entries, count)


@dataclass(frozen=True)
class Plan:
    """All that will be written."""

    outputs: list[Output]
    files: dict[str, bytes]  # small ones
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for output in self.outputs for entry in output.entries) + sum(
            map(len, self.files.values())
        )


def plan(model: Checkpoint, wanted: Options, name: str) -> Plan:
    """The files of a conversion; `name` is that of the only one, for a part that stands alone."""
    if single_kind(model) is not None:
        return _plan_part(model, wanted, name)
    tokens = _tokenizer_files(model.paths["tokenizer"])
    layout = wanted.target.layout
    outputs: list[Output] = []
    files: dict[str, bytes] = {}
    parts = {part: source for part, source in model.sources.items() if part in wanted.parts}
    made = {
        part: entries(
            kind_of(part), source, wanted.coding(kind_of(part)), DIALECT[layout][kind_of(part)]
        )
        for part, source in parts.items()
    }
    if layout in ("official", "diffusers"):
        for part, tensors in made.items():
            some, index = _arrange(part, tensors, wanted)
            outputs += some
            files |= index
    else:
        outputs = [_single(part, tensors, model, wanted, tokens) for part, tensors in made.items()]
    if layout == "official":
        files |= {
            f"{FOLDERS[part]}/config.json": configs.as_json(configs.official(model.spec.dit))
            for part in EXPERTS
            if part in made
        }
    if layout == "diffusers":
        files |= _diffusers_files(model, wanted, tokens)
    else:
        files |= {f"google/umt5-xxl/{file}": data for file, data in tokens.items()}
    sheet = configs.model_card(model.spec, model.vocabulary)
    if sheet is not None:
        files[SHEET] = configs.as_json(sheet)
    return Plan(outputs, files, _notes(parts, wanted, tokens))


def _notes(
    parts: Mapping[Part, OfficialSource], wanted: Options, tokens: Mapping[str, bytes]
) -> tuple[str, ...]:
    """What a user should know."""
    notes = []
    if "t5" in parts and wanted.coding("t5").quant != wanted.target.coding.quant:
        notes.append(
            "the text encoder becomes Q8_0: it runs once a prompt, and decides what is drawn"
        )
    if (
        "vae" in parts
        and wanted.target.coding != StorageFormat()
        and wanted.coding("vae").plain is None
    ):
        notes.append("the VAE stays as it is: it is small, and rounding it shows")
    if (
        "t5" in parts
        and wanted.target.layout == "gguf"
        and tokens
        and pieces_in(tokens["tokenizer.json"]) is None
    ):
        notes.append(
            "GGUF cannot express this tokenizer; it lies beside the text encoder instead of in it"
        )
    return tuple(notes)


def _plan_part(model: Checkpoint, wanted: Options, name: str) -> Plan:
    """One file with one part."""
    kind, layout = single_kind(model) or "dit", wanted.target.layout
    (source,) = model.sources.values()
    coding = wanted.coding(kind, alone=True)
    tensors = entries(kind, source, coding, DIALECT[layout][kind])
    if not coding.gguf:
        return Plan([Output(name, tensors)], {})
    note = (
        note_text(
            configure(TextConfig, text_shapes(source), {}, source.path), T2V_A14B.dit.text_len, None
        )
        if kind == "t5"
        else None
    )
    notes = (
        ("the tokenizer is not in this file; convert the whole model to have it there",)
        if kind == "t5"
        else ()
    )
    return Plan(
        [Output(name, tensors, note, ARCHITECTURE[kind], coding.quant or str(coding.plain))],
        {},
        notes,
    )


# layouts of folders


def _arrange(
    part: Part, tensors: list[TensorSpec], wanted: Options
) -> tuple[list[Output], dict[str, bytes]]:
    """The files of one part in the official or Diffusers' layout, and an index where there are
    several.
    """
    if wanted.target.layout == "official" and part not in EXPERTS:
        return [Output(f"{OFFICIAL_STEMS[part]}.pth", tensors)], {}
    folder = (
        FOLDERS[part] if wanted.target.layout == "official" and part in EXPERTS else DIFFUSERS[part]
    )
    stem = f"{folder}/model" if part == "t5" else f"{folder}/diffusion_pytorch_model"
    groups = shards(tensors, wanted.shard)
    if len(groups) == 1:
        return [Output(f"{stem}.safetensors", tensors)], {}
    outputs = [
        Output(f"{stem}-{n:05d}-of-{len(groups):05d}.safetensors", group)
        for n, group in enumerate(groups, 1)
    ]
    places = {
        entry.name: output.path.rpartition("/")[2] for output in outputs for entry in output.entries
    }
    index = {
        "metadata": {"total_size": sum(entry.nbytes for entry in tensors)},
        "weight_map": dict(sorted(places.items())),
    }
    return outputs, {f"{stem}.safetensors.index.json": configs.as_json(index)}


def _diffusers_files(
    model: Checkpoint, wanted: Options, tokens: Mapping[str, bytes]
) -> dict[str, bytes]:
    preset, tokens = model.spec, dict(tokens)
    name = "T5TokenizerFast"
    if "tokenizer_config.json" not in tokens and tokens:
        name = "PreTrainedTokenizerFast"
        tokens["tokenizer.json"], tokens["tokenizer_config.json"] = configs.tokenizer(
            tokens["tokenizer.json"]
        )
    shapes = {
        "high": configs.transformer(preset.dit),
        "low": configs.transformer(preset.dit),
        "t5": configs.text_encoder(preset.text),
        "vae": configs.autoencoder(preset.vae),
    }
    return {
        "model_index.json": configs.as_json(configs.model_index(preset, name)),
        "scheduler/scheduler_config.json": configs.as_json(configs.scheduler(preset.sample_shift)),
        **{
            f"{DIFFUSERS[part]}/config.json": configs.as_json(shapes[part]) for part in wanted.parts
        },
        **{f"tokenizer/{file}": data for file, data in tokens.items()},
    }


def _single(
    part: Part,
    tensors: list[TensorSpec],
    model: Checkpoint,
    wanted: Options,
    tokens: Mapping[str, bytes],
) -> Output:
    """One part as one file, where and as ComfyUI's users and GGUF's look for it."""
    preset, word = model.spec, wanted.target.word
    published, own = preset.dit == T2V_A14B.dit, re.sub(r"[^\w.-]+", "_", preset.name)
    if part == "vae":
        return Output(
            "vae/wan_2.1_vae.safetensors" if published else f"vae/{own}_vae.safetensors", tensors
        )
    coding = wanted.coding(kind_of(part))
    if not coding.gguf:
        if part == "t5":
            inside = (
                [bytes_entry(EMBEDDED, tokens["spiece.model"])] if "spiece.model" in tokens else []
            )
            kind = "fp8_e4m3fn_scaled" if coding.quant else word
            return Output(
                f"text_encoders/{'umt5_xxl' if published else f'{own}_t5'}_{kind}.safetensors",
                [*tensors, *inside],
            )
        stem = f"wan2.2_t2v_{part}_noise_14B" if published else f"{own}_{part}_noise"
        return Output(f"diffusion_models/{stem}_{word}.safetensors", tensors)
    kind = coding.quant or str(coding.plain)
    if part == "t5":
        note = note_text(
            preset.text,
            preset.dit.text_len,
            pieces_in(tokens["tokenizer.json"]) if tokens else None,
        )
        stem = "umt5-xxl-encoder" if published else f"{own}-t5"
        return Output(f"text_encoders/{stem}-{kind}.gguf", tensors, note, ARCHITECTURE["t5"], kind)
    side = "HighNoise" if part == "high" else "LowNoise"
    return Output(f"{side}/{own}-{side}-{kind}.gguf", tensors, None, ARCHITECTURE["dit"], kind)
