"""A folder of weights becomes modules: find every file, check every name and shape, then place one tensor at a time.

The official layout: `high_noise_model/` and `low_noise_model/` (config.json and safetensors), the T5 and VAE files, the
tokenizer. What it cannot say about a model that is not the published one stands beside it in `wanflow.json`. Shapes are
taken from the tensors, and configs that say otherwise are refused: what is built never exceeds what the files hold.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from wanflow.config import DiTConfig, Preset, Request, RequestError, TextConfig, VAEConfig, from_mapping, parse_size
from wanflow.models.dit import WanDiT
from wanflow.models.tokenizer import Tokenizer
from wanflow.models.umt5 import UMT5Encoder
from wanflow.models.vae import WanVAE
from wanflow.presets import T2V_A14B
from wanflow.sampling.experts import Expert
from wanflow.weights.formats import TensorInfo, TensorSource, open_source, read_json, reading, weight_files

FOLDERS: dict[Expert, str] = {"high": "high_noise_model", "low": "low_noise_model"}
T5_STEM, VAE_STEM = "models_t5_umt5-xxl-enc-bf16", "Wan2.1_VAE"
TOKENIZER = "google/umt5-xxl/tokenizer.json"
SHEET = "wanflow.json"
SECTIONS = {"name": str, "task": str, "dit": dict, "text": dict, "vae": dict, "defaults": dict, "vocabulary": list}
DEFAULTS = {field.name for field in fields(Preset)} - {"name", "task", "dit", "text", "vae"}
HELP = "get the weights with `hf download Wan-AI/Wan2.2-T2V-A14B --local-dir {}`"
ONLY = "wanflow runs Wan2.2-T2V-A14B (text to video)"

# Relatives of the model, by the first thing that gives them away.
BY_TYPE = {"i2v": "Wan I2V (image to video)", "ti2v": "Wan2.2-TI2V-5B", "flf2v": "Wan FLF2V (first and last frame to video)"}
BY_CHANNELS = {36: "Wan2.2-I2V-A14B (image to video)", 48: "Wan2.2-TI2V-5B"}
BY_TENSOR = {
    "img_emb.": "Wan2.1-I2V (image to video)",
    "vace_": "Wan VACE (video editing)",
    "casual_audio_encoder.": "Wan2.2-S2V-14B (speech to video)",
    "face_adapter.": "Wan2.2-Animate-14B",
}

Place = Callable[[str, TensorInfo], torch.dtype]  # the dtype a tensor is kept in
Report = Callable[[int, int], None]  # bytes read, bytes in all
Shapes = dict[str, Any]  # the fields of a config that tensors determine
M = TypeVar("M", bound=nn.Module)
C = TypeVar("C", DiTConfig, TextConfig, VAEConfig)


@dataclass(frozen=True)
class Checkpoint:
    """A complete folder: where everything is, and the model's shapes and defaults."""

    folder: Path
    preset: Preset
    experts: Mapping[Expert, Path]  # folders
    t5: Path
    vae: Path
    tokenizer: Path
    vocabulary: tuple[str, ...] = ()  # the words of a model that knows few


# finding


def open_checkpoint(folder: Path) -> Checkpoint:
    """Find every file of a model, and check every header; no weight is read.

    Raises:
        RequestError: listing all that is missing, or naming what is broken, foreign or inconsistent.
    """
    folder = Path(folder)
    with reading(folder):
        refuse_other_layouts(folder)
        files = _files(folder)
        sheet = _sheet(folder / SHEET) if (folder / SHEET).exists() else {}
        high, low = (_expert_config(files[name], sheet.get("dit", {})) for name in FOLDERS.values())
        if high != low:
            odd = [f.name for f in fields(DiTConfig) if getattr(high, f.name) != getattr(low, f.name)]
            raise RequestError(f"{folder}: the two experts differ in {', '.join(odd)}; they are not of one model")
        t5, vae = open_source(files[T5_STEM]), open_source(files[VAE_STEM])
        text_config = configure(TextConfig, text_shapes(t5), sheet.get("text", {}), files[T5_STEM])
        levels = vae_shapes(vae)
        vae_config = configure(VAEConfig, levels, _statistics(levels, sheet.get("vae", {}), files[VAE_STEM]), files[VAE_STEM])
        widths = {"text width": (high.text_dim, text_config.dim), "latent channels": (high.in_dim, high.out_dim, vae_config.z_dim)}
        for what, values in widths.items():
            if len(set(values)) > 1:
                raise RequestError(f"{folder}: the experts, the text encoder and the VAE are not of one model ({what} {values})")
        check(build(UMT5Encoder, text_config), t5)
        check(build(WanVAE, vae_config), vae)
        preset = _preset(folder, replace(T2V_A14B, dit=high, text=text_config, vae=vae_config), sheet)
        experts = {which: files[name] for which, name in FOLDERS.items()}
        words = tuple(str(word) for word in sheet.get("vocabulary", ()))
        return Checkpoint(folder, preset, experts, files[T5_STEM], files[VAE_STEM], files[TOKENIZER], words)


def refuse_other_layouts(folder: Path) -> None:
    """RequestError, naming the layout, unless the folder has at least one of the official experts' folders or could become one."""
    if not folder.is_dir():
        kind = {".gguf": "a GGUF file", ".safetensors": "a single safetensors file"}.get(folder.suffix, "a file")
        what = f"{kind}, which is not read yet; give a folder in the official layout" if folder.exists() else "missing"
        raise RequestError(f"{folder} is {what}; {HELP.format('<folder>')}")
    if any((folder / name).is_dir() for name in FOLDERS.values()):
        return
    found = ""
    if (folder / "model_index.json").exists():
        found = "the Diffusers layout"
    elif any(folder.glob("*.gguf")) or any(folder.glob("*/*.gguf")):
        found = "GGUF files"
    elif any(folder.glob("*.safetensors")) or any(folder.glob("*/diffusion_models/*")) or any(folder.glob("diffusion_models/*")):
        found = "single files (ComfyUI's layout)"
    if (folder / "config.json").exists():
        kind = str(read_json(folder / "config.json").get("model_type"))
        found = {"t2v": "Wan2.1-T2V (one expert)"}.get(kind) or BY_TYPE.get(kind) or found
        if found:
            raise RequestError(f"{folder} holds {found}; {ONLY}; {HELP.format('<folder>')}")
    if found:
        raise RequestError(f"{folder} holds {found}, which is not read yet; {ONLY} in its official layout; {HELP.format('<folder>')}")


def _files(folder: Path) -> dict[str, Path]:
    """Every part's file or folder, by name; a RequestError lists all that is missing at once."""
    files = {name: folder / name for name in (*FOLDERS.values(), TOKENIZER)}
    for stem in (T5_STEM, VAE_STEM):
        safe = folder / f"{stem}.safetensors"
        files[stem] = safe if safe.exists() else folder / f"{stem}.pth"
    wanted = [path for path in files.values() if path.name not in FOLDERS.values()]
    for name in FOLDERS.values():
        wanted += [files[name] / "config.json", *weight_files(files[name])]
    missing = sorted(path.relative_to(folder).as_posix() for path in wanted if not path.exists())
    if missing:
        raise RequestError(f"{folder} is incomplete, it lacks {', '.join(missing)}; {HELP.format(folder)}")
    return files


def _sheet(path: Path) -> dict[str, Any]:
    sheet = {key: value for key, value in read_json(path).items() if not key.startswith("_")}
    for key, value in sheet.items():
        if not isinstance(value, SECTIONS.get(key, ())):
            raise RequestError(f"{path}: {key} is unknown or of the wrong kind; known are {', '.join(SECTIONS)}")
    unknown = sorted(set(sheet.get("defaults", {})) - set(DEFAULTS))
    if unknown:
        raise RequestError(f"{path}: unknown defaults {', '.join(unknown)}; known are {', '.join(sorted(DEFAULTS))}")
    return sheet


def _preset(folder: Path, shapes: Preset, sheet: Mapping[str, Any]) -> Preset:
    """The defaults of the published model, or what the sheet says, proven by completing a request with them."""
    name = T2V_A14B.name if shapes == T2V_A14B else folder.resolve().name
    defaults = {**sheet.get("defaults", {}), "name": sheet.get("name", name), "task": sheet.get("task", shapes.task)}
    try:
        if "size" in defaults:
            defaults["size"] = parse_size(defaults["size"])
        preset = replace(shapes, **defaults)
        Request("any", seed=0).complete(preset)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{folder / SHEET}: {error}") from None
    return preset


# shapes


def _expert_config(folder: Path, extra: Mapping[str, Any]) -> DiTConfig:
    """The shape of the expert in a folder: its config.json, the sheet for what that omits, and the tensors, which must agree."""
    file = folder / "config.json"
    said = {key: value for key, value in read_json(file).items() if not key.startswith("_")}
    source = open_source(folder)
    refuse_relatives(source, said)
    for key, value in extra.items():
        if said.setdefault(key, value) != value:
            raise RequestError(f"{file} says {key} {said[key]}, {SHEET} says {value}")
    config = configure(DiTConfig, dit_shapes(source), said, file)
    check(build(WanDiT, config), source)
    return config


def refuse_relatives(source: TensorSource, config: Mapping[str, Any]) -> None:
    """RequestError, by name, for the DiT of a model that is not text to video."""
    kind, patches = config.get("model_type", "t2v"), source.tensors.get("patch_embedding.weight")
    channels = patches.shape[1] if patches is not None and len(patches.shape) == 5 else config.get("in_dim")
    names = [name for mark, name in BY_TENSOR.items() if any(key.startswith(mark) for key in source.tensors)]
    name = BY_CHANNELS.get(channels) if isinstance(channels, int) else None
    name = name or next(iter(names), None) or (None if kind == "t2v" else BY_TYPE.get(str(kind), f"a model of type {kind!r}"))
    if name:
        raise RequestError(f"{source.path} holds {name}; {ONLY}")


def _shape_of(source: TensorSource, what: str) -> Callable[[str, int], tuple[int, ...]]:
    def shape(name: str, rank: int) -> tuple[int, ...]:
        info = source.tensors.get(name)
        if info is None or len(info.shape) != rank or not all(info.shape):
            has = "has none" if info is None else f"has {list(info.shape)}"
            raise RequestError(f"{source.path} is not {what} in the official names: {name} should have {rank} dimensions, and it {has}")
        return info.shape

    return shape


def _numbered(source: TensorSource, prefix: str) -> dict[int, list[str]]:
    """Tensor names below `prefix`, by the number that follows it."""
    groups: dict[int, list[str]] = {}
    for name in source.tensors:
        number, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and number.isdecimal() and len(number) < 9:
            groups.setdefault(int(number), []).append(rest)
    return dict(sorted(groups.items()))


def dit_shapes(source: TensorSource) -> Shapes:
    """What an expert's tensors say of its `DiTConfig`."""
    shape = _shape_of(source, "an expert")
    patch, text, head = shape("patch_embedding.weight", 5), shape("text_embedding.0.weight", 2), shape("head.head.weight", 2)
    return {
        "dim": patch[0], "in_dim": patch[1], "patch_size": patch[2:], "text_dim": text[1], "out_dim": head[0] // math.prod(patch[2:]),
        "ffn_dim": shape("blocks.0.ffn.0.weight", 2)[0], "freq_dim": shape("time_embedding.0.weight", 2)[1],
        "num_layers": len(_numbered(source, "blocks.")),
    }  # fmt: skip


def text_shapes(source: TensorSource) -> Shapes:
    """What the encoder's tensors say of its `TextConfig`."""
    shape = _shape_of(source, "a UMT5 encoder")
    (vocab, dim), (buckets, heads) = shape("token_embedding.weight", 2), shape("blocks.0.pos_embedding.embedding.weight", 2)
    return {
        "vocab": vocab, "dim": dim, "num_buckets": buckets, "num_heads": heads, "num_layers": len(_numbered(source, "blocks.")),
        "dim_attn": shape("blocks.0.attn.q.weight", 2)[0], "dim_ffn": shape("blocks.0.ffn.fc1.weight", 2)[0],
    }  # fmt: skip


def vae_shapes(source: TensorSource) -> Shapes:
    """What the VAE's tensors say of its `VAEConfig`: levels of residual blocks, each but the last ending in a resampling."""
    shape = _shape_of(source, "the Wan2.1 VAE")
    dim, z_dim = shape("encoder.conv1.weight", 5)[0], shape("conv2.weight", 5)[0]
    levels: list[list[int]] = [[]]  # widths of the residual blocks
    temporal = []
    for number, names in _numbered(source, "encoder.downsamples.").items():
        if "residual.6.weight" in names:
            levels[-1].append(shape(f"encoder.downsamples.{number}.residual.6.weight", 5)[0])
        else:
            temporal.append("time_conv.weight" in names)
            levels.append([])
    if not all(levels) or len({len(level) for level in levels}) > 1 or any(level[-1] % dim for level in levels):
        raise RequestError(f"{source.path} is not the Wan2.1 VAE in the official names: its levels are not alike")
    mult = tuple(level[-1] // dim for level in levels)
    return {"dim": dim, "z_dim": z_dim, "dim_mult": mult, "num_res_blocks": len(levels[0]), "temperal_downsample": tuple(temporal)}


def _statistics(found: Shapes, said: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
    """Add the published latent statistics where the VAE has the published shape; another VAE must bring its own."""
    if "latent_mean" in said and "latent_std" in said:
        return said
    published = T2V_A14B.vae
    if any(getattr(published, key) != value for key, value in found.items()):
        raise RequestError(f"{file} is not the published VAE, and {SHEET} beside it gives no latent_mean and latent_std for it")
    return {"latent_mean": published.latent_mean, "latent_std": published.latent_std, **said}


def configure(cls: type[C], found: Shapes, said: Mapping[str, Any], file: Path) -> C:
    """A config of what a file says and what its tensors show; RequestError where the two differ or a value makes no sense."""
    said = {key: tuple(value) if isinstance(value, list) else value for key, value in said.items()}
    for key, value in found.items():
        if said.get(key, value) != value:
            raise RequestError(f"{file}: the config says {key} {said[key]}, the tensors say {value}")
    for field in fields(cls):
        value, kind = said.get(field.name, field.default), type(field.default)
        good = isinstance(value, int | float) if kind is float else type(value) is kind
        if kind is tuple and good:
            good = all(isinstance(item, int | float) for item in value)
        if not good or (kind is int and value < 1):
            raise RequestError(f"{file}: {field.name} {value!r} makes no sense; the published model has {field.default!r}")
    return from_mapping(cls, {**said, **found}, str(file))


# placing


class _Unfilled(TorchFunctionMode):
    """Leaves new parameters as they are. On meta, filling them is no work, but imports a second's worth of modules."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == nn.init.__name__:
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def build(cls: Callable[[Any], M], config: DiTConfig | TextConfig | VAEConfig) -> M:
    """The module on meta: structure without memory."""
    with torch.device("meta"), _Unfilled():
        return cls(config).eval().requires_grad_(False)


def expert_place(model: nn.Module, dtype: torch.dtype) -> Place:
    """Which tensors of an expert take `dtype`: the weights of Linear and Conv layers. Norms, biases and modulation stay float32."""
    kinds = (nn.Linear, nn.Conv3d)
    matmuls = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, kinds)}
    return lambda name, info: dtype if name in matmuls else torch.float32


def check(module: nn.Module, source: TensorSource) -> None:
    """RequestError unless the source holds exactly the module's parameters, in their shapes; it counts and names what differs."""
    wanted = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    found = source.tensors
    both = [(name, found[name], shape) for name, shape in wanted.items() if name in found]
    faults = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "of the wrong shape": [f"{name} is {list(info.shape)}, not {list(shape)}" for name, info, shape in both if info.shape != shape],
        "not floating-point": [f"{name} is {info.dtype}" for name, info, _ in both if not info.dtype.is_floating_point],
    }
    told = [f"{len(items)} {what} ({', '.join(items[:5])}{', ...' if len(items) > 5 else ''})" for what, items in faults.items() if items]
    if told:
        raise RequestError(f"{source.path} does not fit the {type(module).__name__}: tensors {'; '.join(told)}")


def load_module(module: nn.Module, source: TensorSource, place: Place, device: torch.device | str, report: Report | None = None) -> None:
    """Fill a module on meta, one tensor at a time: read and convert, move, assign.

    On the way to a GPU, host memory holds one tensor in its final dtype; on the CPU, nothing but the module.

    Raises:
        RequestError: before anything is read, when names or shapes differ; while reading, when a file breaks off.
    """
    check(module, source)
    names = [name for name, _ in module.named_parameters()]
    total, done = sum(source.tensors[name].nbytes for name in names), 0
    for name in names:
        info = source.tensors[name]
        value = source.read(name, place(name, info)).to(device)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
        done += info.nbytes
        if report is not None:
            report(done, total)


def load_expert(
    checkpoint: Checkpoint, which: Expert, dtype: torch.dtype, device: torch.device | str, report: Report | None = None
) -> WanDiT:
    """One expert: matmul weights in `dtype`, the rest float32."""
    model = build(WanDiT, checkpoint.preset.dit)
    load_module(model, open_source(checkpoint.experts[which]), expert_place(model, dtype), device, report)
    return model


def load_text_encoder(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str, report: Report | None = None) -> UMT5Encoder:
    """The text encoder, wholly in `dtype`."""
    model = build(UMT5Encoder, checkpoint.preset.text)
    load_module(model, open_source(checkpoint.t5), lambda name, info: dtype, device, report)
    return model


def load_vae(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", report: Report | None = None
) -> WanVAE:
    """The VAE, wholly in `dtype`."""
    model = build(WanVAE, checkpoint.preset.vae)
    load_module(model, open_source(checkpoint.vae), lambda name, info: dtype, device, report)
    return model


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer, for prompts of the experts' text length."""
    return Tokenizer(checkpoint.tokenizer, checkpoint.preset.dit.text_len)


def expert_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """What one expert takes in memory, as `load_expert` places it."""
    model = build(WanDiT, checkpoint.preset.dit)
    place = expert_place(model, dtype)
    return sum(p.numel() * place(name, TensorInfo(tuple(p.shape), dtype)).itemsize for name, p in model.named_parameters())


# identity

WINDOW, WINDOWS = 64 << 10, 16


def fingerprint(checkpoint: Checkpoint) -> str:
    """16 hex digits that tell two sets of weights apart without reading 126 GB.

    sha256 over every file's name and size, safetensors headers, and 16 evenly spread windows of 64 KiB of its content (all of it
    up to 1 MiB). Other weights change it; a few flipped bytes between the windows need not: it tells models apart, and is no checksum.
    """
    files = [checkpoint.t5, checkpoint.vae, checkpoint.tokenizer, checkpoint.folder / SHEET]
    for folder in checkpoint.experts.values():
        files += [folder / "config.json", *weight_files(folder)]
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file.exists()):
        with reading(file):
            digest.update(f"{file.relative_to(checkpoint.folder).as_posix()} {file.stat().st_size}\n".encode())
            for part in _samples(file):
                digest.update(part)
    return digest.hexdigest()[:16]


def _samples(path: Path) -> Iterator[bytes]:
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
