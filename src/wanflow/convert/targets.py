"""Plan a conversion from headers alone: the files of a layout, their tensors, their configs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.checkpoint.infer_config import HEAD_DIM, SHEET, config_of, configure, text_shapes
from wanflow.checkpoint.key_maps import Kind
from wanflow.checkpoint.layouts import DIFFUSERS, T5_STEM, VAE_STEMS
from wanflow.checkpoint.parts import Part, kind_of
from wanflow.checkpoint.source import EMBEDDED, OfficialSource
from wanflow.checkpoint.tokenizers import open_tokenizer
from wanflow.config import DiTConfig, RequestError, TextConfig
from wanflow.convert import configs
from wanflow.convert.encode import bytes_entry, entries
from wanflow.convert.formats import DIALECTS, Options, StorageFormat
from wanflow.convert.write import TensorSpec, shards, write_safetensors, write_torch
from wanflow.convert.write_gguf import Note, note_text, pieces_in, write_gguf
from wanflow.presets import FAMILY, ONLY, T2V_A14B, ModelSpec
from wanflow.untrusted import read_bytes

SINGLE = "file"  # the layout of a checkpoint that is one part of a model
COMFY_STEMS: dict[tuple[str, Part], str] = {  # of ComfyUI's published files
    **{
        (task, part): f"wan2.2_{task[:3]}_{part}_noise_14B"
        for task in ("t2v-A14B", "i2v-A14B")
        for part in ("high", "low")
    },
    ("ti2v-5B", ONLY): "wan2.2_ti2v_5B",
    ("t2v-A14B", "vae"): "wan_2.1_vae",
    ("i2v-A14B", "vae"): "wan_2.1_vae",
    ("ti2v-5B", "vae"): "wan2.2_vae",
}
ARCHITECTURE: dict[Kind, str] = {"dit": "wan", "t5": "t5encoder"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def single_kind(model: Checkpoint) -> Kind | None:
    """Return the kind of a part that is converted alone; None for a complete model."""
    return kind_of(next(iter(model.sources))) if model.layout == SINGLE else None


def source_paths(model: Checkpoint) -> list[Path]:
    """Return the paths that a conversion reads from."""
    return [model.folder, *(part.path for part in model.sources.values()), *model.paths.values()]


@dataclass(frozen=True)
class Output:
    """A file of tensors, by its path in the new folder."""

    path: str
    entries: list[TensorSpec]
    note: Note | None = None  # writes metadata into a GGUF header
    arch: str = ""  # of a GGUF file
    kind: str = ""  # the format of most of its weights
    metadata: Mapping[str, str] = field(default_factory=dict)  # of a safetensors header

    def write(self, path: Path, count: Callable[[int], None]) -> None:
        """Write the file; `count` gets the bytes as they are written."""
        if self.arch:
            note = self.note or (lambda writer: None)
            write_gguf(path, self.entries, count, self.arch, self.kind, note)
        elif self.path.endswith(".pth"):
            write_torch(path, self.entries, count)
        else:
            write_safetensors(path, self.entries, count, self.metadata)


@dataclass(frozen=True)
class Plan:
    """All that a conversion writes."""

    outputs: list[Output]
    files: dict[str, bytes]  # small ones
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for output in self.outputs for entry in output.entries) + sum(
            map(len, self.files.values())
        )


def plan(model: Checkpoint, options: Options, name: str) -> Plan:
    """Return the files of a conversion; `name` is that of the only one, for a single part."""
    alone = single_kind(model)
    if alone is not None:
        return _plan_part(model, alone, options, name)
    layout, tokens = options.target.layout, _tokenizer_files(model.paths["tokenizer"])
    parts = {part: source for part, source in model.sources.items() if part in options.parts}
    if not parts:
        raise RequestError(
            f"--parts {','.join(options.parts)} leaves nothing of {model.spec.name}, which has"
            f" {', '.join(model.sources)}"
        )
    outputs: list[Output] = []
    files: dict[str, bytes] = {}
    for part, source in parts.items():
        kind = kind_of(part)
        tensors = entries(kind, source, options.coding(kind), DIALECTS[layout][kind])
        if layout in ("official", "diffusers"):
            split, index = _split(part, tensors, options, model.spec)
            outputs += split
            files |= index
        else:
            outputs.append(_one_file(part, tensors, model, options, tokens))
    if layout == "official":
        config = configs.as_json(configs.official(model.spec.dit))
        folders = [folder for part, folder in model.spec.expert_folders if part in parts]
        files |= {f"{_inside(folder)}config.json": config for folder in folders}
    if layout == "diffusers":
        files |= _diffusers_files(model, parts, tokens)
    else:
        files |= {f"google/umt5-xxl/{file}": data for file, data in tokens.items()}
    sheet = configs.model_card(model.spec, model.vocabulary)
    if sheet is not None:
        files[SHEET] = configs.as_json(sheet)
    return Plan(outputs, files, _notes(parts, options, tokens))


def _tokenizer_files(path: Path) -> dict[str, bytes]:
    """Return the files of a tokenizer, always with a `tokenizer.json` that ends prompts."""
    names = TOKENIZER_FILES if path.name in TOKENIZER_FILES else ()
    found = [path.parent / name for name in names if (path.parent / name).is_file()]
    files = {file.name: read_bytes(file) for file in found}
    if path.suffix == ".json":
        files["tokenizer.json"] = read_bytes(path)
    if "tokenizer.json" not in files:
        files["tokenizer.json"] = open_tokenizer(path).to_str().encode()
    files["tokenizer.json"] = configs.ending(files["tokenizer.json"])
    files.setdefault("tokenizer_config.json", configs.as_json(configs.tokenizer_config()))
    return files


def _notes(
    parts: Mapping[Part, OfficialSource], options: Options, tokens: Mapping[str, bytes]
) -> tuple[str, ...]:
    """Return what a user might not expect."""
    notes, target = [], options.target
    if "t5" in parts and options.coding("t5").quant != target.coding.quant:
        notes.append(
            "the text encoder becomes Q8_0: it runs once a prompt, and decides what is drawn"
        )
    if "vae" in parts and target.coding != StorageFormat() and options.coding("vae").plain is None:
        notes.append("the VAE stays as it is: it is small, and rounding it shows")
    if "t5" in parts and target.layout == "gguf" and pieces_in(tokens["tokenizer.json"]) is None:
        notes.append(
            "GGUF cannot express this tokenizer; it becomes a file of its own next to the text"
            " encoder"
        )
    return tuple(notes)


def _plan_part(model: Checkpoint, kind: Kind, options: Options, name: str) -> Plan:
    """Return the plan of one file with one part."""
    (source,) = model.sources.values()
    coding = options.coding(kind, alone=True)
    tensors = entries(kind, source, coding, DIALECTS[options.target.layout][kind])
    if not coding.gguf:
        dit, metadata = config_of(kind, source), dict[str, str]()
        comfy = options.target.layout == "comfy"
        if (
            comfy and isinstance(dit, DiTConfig) and not dit.dim % HEAD_DIM
        ):  # else heads are unknown
            metadata = configs.comfy(dit)
        return Plan([Output(name, tensors, metadata=metadata)], {})
    note: Note | None = None
    notes: tuple[str, ...] = ()
    if kind == "t5":
        config = configure(TextConfig, text_shapes(source), {}, source.path)
        note = note_text(config, T2V_A14B.dit.text_len, None)
        notes = ("the tokenizer is not in this file; convert the complete model to include it",)
    return Plan([Output(name, tensors, note, ARCHITECTURE[kind], coding.name)], {}, notes)


# layouts of folders


def _inside(folder: str) -> str:
    """Return the beginning of paths in a folder of the new one."""
    return "" if folder == "." else f"{folder}/"


def _split(
    part: Part, tensors: list[TensorSpec], options: Options, spec: ModelSpec
) -> tuple[list[Output], dict[str, bytes]]:
    """Return the files of a part in the official or Diffusers' layout, and the index of several."""
    official, single = options.target.layout == "official", {"t5": T5_STEM}
    single["vae"] = VAE_STEMS[type(spec.vae)]
    if official and part in single:
        return [Output(f"{single[part]}.pth", tensors)], {}
    folder = dict(spec.expert_folders)[part] if official else DIFFUSERS[part]
    stem = f"{_inside(folder)}{'model' if part == 't5' else 'diffusion_pytorch_model'}"
    groups = shards(tensors, options.shard)
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
    model: Checkpoint, parts: Iterable[Part], tokens: Mapping[str, bytes]
) -> dict[str, bytes]:
    spec = model.spec
    ours = tokens["tokenizer_config.json"] == configs.as_json(configs.tokenizer_config())
    name = "PreTrainedTokenizerFast" if ours else "T5TokenizerFast"
    shapes = {
        "dit": configs.transformer(spec.dit),
        "t5": configs.text_encoder(spec.text),
        "vae": configs.autoencoder(spec.vae),
    }
    return {
        "model_index.json": configs.as_json(configs.model_index(spec, name)),
        "scheduler/scheduler_config.json": configs.as_json(configs.scheduler(spec.sample_shift)),
        **{
            f"{DIFFUSERS[part]}/config.json": configs.as_json(shapes[kind_of(part)])
            for part in parts
        },
        **{f"tokenizer/{file}": data for file, data in tokens.items()},
    }


def _one_file(
    part: Part,
    tensors: list[TensorSpec],
    model: Checkpoint,
    options: Options,
    tokens: Mapping[str, bytes],
) -> Output:
    """Return one part as one file, with the path that users of ComfyUI and GGUF expect."""
    spec, word, coding = model.spec, options.target.word, options.coding(kind_of(part))
    own = re.sub(r"[^\w.-]+", "_", spec.name)
    published = any(spec.dit == one.dit for one in FAMILY)
    known = COMFY_STEMS.get((spec.task, part)) if published else None
    if part == "vae":
        return Output(f"vae/{known or f'{own}_vae'}.safetensors", tensors)
    if part == "t5" and coding.gguf:
        note = note_text(spec.text, spec.dit.text_len, pieces_in(tokens["tokenizer.json"]))
        stem = "umt5-xxl-encoder" if published else f"{own}-t5"
        path = f"text_encoders/{stem}-{coding.name}.gguf"
        return Output(path, tensors, note, ARCHITECTURE["t5"], coding.name)
    if part == "t5":
        if "spiece.model" in tokens:
            tensors = [*tensors, bytes_entry(EMBEDDED, tokens["spiece.model"])]
        stem = "umt5_xxl" if published else f"{own}_t5"
        kind = "fp8_e4m3fn_scaled" if coding.quant else word
        return Output(f"text_encoders/{stem}_{kind}.safetensors", tensors)
    if coding.gguf:
        side = f"{part.capitalize()}Noise"
        path = f"{side}/{own}-{side}-{coding.name}.gguf"
        if part == ONLY:
            path = f"{own}-{coding.name}.gguf"
        return Output(path, tensors, None, ARCHITECTURE["dit"], coding.name)
    stem = known or (own if part == ONLY else f"{own}_{part}_noise")
    path = f"diffusion_models/{stem}_{word}.safetensors"
    return Output(path, tensors, metadata=configs.comfy(spec.dit))
