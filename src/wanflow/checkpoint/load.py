"""A model on disk becomes modules: open its parts, check every name and shape, then place one
tensor at a time.

Where the parts lie is `layouts`' matter, what they are called `source`'s. What no layout can say
about a model that is not the published one stands beside it in `wanflow.json`. Shapes are taken
from the tensors, and configs that say otherwise are refused: what is built never exceeds what the
files hold. Weights that are packed (fp8, GGUF) stay packed in memory.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wanflow.checkpoint.containers import TensorInfo, TensorSource, read_json, reading, weight_files
from wanflow.checkpoint.infer_config import (
    SHEET,
    configure,
    dit_shapes,
    refuse_relatives,
    statistics,
    text_shapes,
    vae_shapes,
)
from wanflow.checkpoint.layouts import CheckpointFiles, config_beside, find
from wanflow.checkpoint.source import Part, open_part
from wanflow.checkpoint.tokenizers import open_tokenizer
from wanflow.config import DiTConfig, RequestError, TextConfig, VAEConfig, plain
from wanflow.geometry import parse_size
from wanflow.models.dit import WanDiT
from wanflow.models.tokenizer import Tokenizer
from wanflow.models.umt5 import UMT5Encoder
from wanflow.models.vae import WanVAE
from wanflow.parallel.sharding import own_rows, place
from wanflow.presets import T2V_A14B, Expert, ModelSpec
from wanflow.request import Request
from wanflow.runtime import Runtime
from wanflow.transforms.block_streaming import set_chunk
from wanflow.transforms.packed import PackedLeaf, replace_with_packed
from wanflow.transforms.quant import QuantLinear, quantizable_layers, swap_quantised

logger = logging.getLogger("wanflow")

SECTIONS = {
    "name": str,
    "task": str,
    "dit": dict,
    "text": dict,
    "vae": dict,
    "defaults": dict,
    "vocabulary": list,
}
SHAPES = {"name", "task", "dit", "text", "vae", "expert_folders"}
DEFAULTS = {field.name for field in fields(ModelSpec)} - SHAPES

Place = Callable[[str, TensorInfo], torch.dtype]  # the dtype a tensor is kept in
Report = Callable[[int, int], None]  # bytes read, bytes in all
Change = Callable[[str, Tensor], Tensor]  # name and float32 value -> float32 value
M = TypeVar("M", bound=nn.Module)


class Headers(Protocol):
    """What is known of a file before its data is read; a `TensorSource` is one."""

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...


@dataclass(frozen=True)
class Checkpoint:
    """A complete model: where everything is, and its shapes and defaults."""

    folder: Path
    preset: ModelSpec
    experts: Mapping[Expert, Path]  # files, or folders with an index
    t5: Path
    vae: Path
    tokenizer: Path
    vocabulary: tuple[str, ...] = ()  # the words of a model that knows few
    layout: str = "official"
    given: Mapping[Part, Path] = field(default_factory=dict)  # the parts that were named by hand
    notes: tuple[str, ...] = ()  # what a user should know of this folder


# finding


def open_checkpoint(folder: Path, given: Mapping[Part, Path] | None = None) -> Checkpoint:
    """Find every part of a model, and check every header; no weight is read.

    Args:
        folder: in the official or Diffusers' layout, or with loose files of any kind.
        given: parts named by hand, in place of the folder's own.

    Raises:
        RequestError: listing all that is missing, or naming what is broken, foreign or
            inconsistent.
    """
    folder, given = Path(folder), dict(given or {})
    with reading(folder):
        found = find(folder, given)
        sheet = _merged(found, _sheet(folder / SHEET) if (folder / SHEET).exists() else {})
        high, low = (
            _expert_config(found, which, folder, sheet.get("dit", {}), which in given)
            for which in ("high", "low")
        )
        if high != low:
            odd = [
                f.name for f in fields(DiTConfig) if getattr(high, f.name) != getattr(low, f.name)
            ]
            raise RequestError(
                f"{folder}: the two experts differ in {', '.join(odd)}; they are not of one model"
            )
        t5, vae = open_part("t5", found.parts["t5"]), open_part("vae", found.parts["vae"])
        text_config = configure(TextConfig, text_shapes(t5), sheet.get("text", {}), t5.path)
        levels = vae_shapes(vae)
        vae_config = configure(
            VAEConfig, levels, statistics(levels, sheet.get("vae", {}), vae.path), vae.path
        )
        widths = {
            "text width": (high.text_dim, text_config.dim),
            "latent channels": (high.in_dim, high.out_dim, vae_config.z_dim),
        }
        for what, values in widths.items():
            if len(set(values)) > 1:
                raise RequestError(
                    f"{folder}: the experts, the text encoder and the VAE are not of one model"
                    f" ({what} {values})"
                )
        check(build(UMT5Encoder, text_config), t5)
        check(build(WanVAE, vae_config), vae)
        preset = _preset(
            folder, replace(T2V_A14B, dit=high, text=text_config, vae=vae_config), sheet
        )
        parts = found.parts
        experts: dict[Expert, Path] = {"high": parts["high"], "low": parts["low"]}
        words = tuple(str(word) for word in sheet.get("vocabulary", ()))
        return Checkpoint(
            folder,
            preset,
            experts,
            parts["t5"],
            parts["vae"],
            parts["tokenizer"],
            words,
            found.layout,
            given,
            _notes(found, preset),
        )


def _merged(found: CheckpointFiles, sheet: dict[str, Any]) -> dict[str, Any]:
    """What the layout's own configs say, below what `wanflow.json` says."""
    merged = dict(sheet)
    for section, said in found.sheet.items():
        merged[section] = {**said, **sheet.get(section, {})}
    return merged


def _notes(found: CheckpointFiles, preset: ModelSpec) -> tuple[str, ...]:
    if found.shift is None or found.shift == preset.sample_shift:
        return ()
    return (
        (
            f"the scheduler's config says flow_shift {found.shift:g}; {preset.name} was published"
            f" with {preset.sample_shift:g}, which is used (--sample_shift {found.shift:g} for the"
            " other)"
        ),
    )


def _sheet(path: Path) -> dict[str, Any]:
    sheet = {key: value for key, value in read_json(path).items() if not key.startswith("_")}
    for key, value in sheet.items():
        if not isinstance(value, SECTIONS.get(key, ())):
            raise RequestError(
                f"{path}: {key} is unknown or of the wrong kind; known are {', '.join(SECTIONS)}"
            )
    unknown = sorted(set(sheet.get("defaults", {})) - set(DEFAULTS))
    if unknown:
        raise RequestError(
            f"{path}: unknown defaults {', '.join(unknown)}; known are"
            f" {', '.join(sorted(DEFAULTS))}"
        )
    return sheet


def _preset(folder: Path, shapes: ModelSpec, sheet: Mapping[str, Any]) -> ModelSpec:
    """The defaults of the published model, or what the sheet says, proven by completing a request
    with them.
    """
    name = T2V_A14B.name if shapes == T2V_A14B else folder.resolve().name
    defaults = {
        **sheet.get("defaults", {}),
        "name": plain(sheet.get("name", name)),
        "task": sheet.get("task", shapes.task),
    }
    try:
        if "size" in defaults:
            defaults["size"] = parse_size(defaults["size"])
        preset = replace(shapes, **defaults)
        Request("any", seed=0).complete(preset)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{folder / SHEET}: {error}") from None
    return preset


def _expert_config(
    found: CheckpointFiles, which: Expert, folder: Path, extra: Mapping[str, Any], given: bool
) -> DiTConfig:
    """The shape of an expert: its tensors, the config beside it, and for what both omit the sheet;
    they must agree.
    """
    path = found.parts[which]
    source = open_part("dit", path)
    # A file named by hand may lie beside anything; what is said of it then, the folder says of the
    # expert in whose place it comes.
    if given and path.is_file():
        said, file = config_beside(found.own[which]) if which in found.own else ({}, folder / SHEET)
    else:
        said, file = config_beside(path)
    refuse_relatives(source, said)
    for key, value in extra.items():
        if said.setdefault(key, value) != value:
            raise RequestError(f"{file} says {key} {said[key]}, {SHEET} says {value}")
    config = configure(DiTConfig, dit_shapes(source, said), said, file)
    check(build(WanDiT, config), source)
    return config


# placing


class _Unfilled(TorchFunctionMode):
    """Leaves new parameters as they are. On meta, filling them is no work, but imports a second's
    worth of modules.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == nn.init.__name__:
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def build(cls: Callable[[Any], M], config: DiTConfig | TextConfig | VAEConfig) -> M:
    """The module on meta: structure without memory."""
    with torch.device("meta"), _Unfilled():
        return cls(config).eval().requires_grad_(False)


def expert_place(model: nn.Module, dtype: torch.dtype) -> Place:
    """Which tensors of an expert take `dtype`: the weights of Linear and Conv layers. Norms, biases
    and modulation stay float32.
    """
    kinds = (nn.Linear, nn.Conv3d)
    matmuls = {
        f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, kinds)
    }
    return lambda name, info: dtype if name in matmuls else torch.float32


def check(module: nn.Module, source: Headers) -> None:
    """RequestError unless the source holds exactly the module's parameters, in their shapes; it
    counts and names what differs.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    found = source.tensors
    both = [(name, found[name], shape) for name, shape in wanted.items() if name in found]
    faults = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "of the wrong shape": [
            f"{name} is {list(info.shape)}, not {list(shape)}"
            for name, info, shape in both
            if info.shape != shape
        ],
        "not floating-point": [
            f"{name} is {info.dtype}" for name, info, _ in both if not info.dtype.is_floating_point
        ],
    }
    told = [
        f"{len(items)} {what} ({', '.join(items[:5])}{', ...' if len(items) > 5 else ''})"
        for what, items in faults.items()
        if items
    ]
    if told:
        raise RequestError(
            f"{source.path} does not fit the {type(module).__name__}: tensors {'; '.join(told)}"
        )


def lay_out(
    module: nn.Module,
    source: Headers | None,
    place: Place,
    compute: torch.dtype,
    device: torch.device | str,
    touched: Collection[str] = (),
) -> None:
    """Give a module on meta the form that it will have in memory: dtypes, and leaves that keep
    packed weights packed.

    Args:
        source: tells what is packed; None: nothing is.
        place: the dtype of each tensor.
        compute: the dtype in which leaves with packed weights multiply.
        touched: tensors that are changed while they are read, and therefore unpacked.

    Raises:
        RequestError: when names or shapes differ from the source's.
    """
    if source is not None:
        check(module, source)
    for name, parameter in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        info = (
            TensorInfo(tuple(parameter.shape), parameter.dtype)
            if source is None
            else source.tensors[name]
        )
        setattr(
            module.get_submodule(owner),
            leaf,
            nn.Parameter(parameter.detach().to(place(name, info)), requires_grad=False),
        )
    if source is None:
        return
    packings = {
        name: info.packing
        for name, info in source.tensors.items()
        if info.packing is not None and name not in touched
    }
    if torch.device(device).type == "mps":  # it has no float8
        packings = {name: kind for name, kind in packings.items() if not kind.startswith("F8")}
    replace_with_packed(module, packings, compute)
    for path, leaf in module.named_modules():
        if isinstance(leaf, PackedLeaf):
            leaf.expect(source.tensors[f"{path}.weight"].scale)


def load_module(
    module: nn.Module,
    source: TensorSource,
    device: torch.device | str,
    report: Report | None = None,
    changes: Mapping[str, Change] | None = None,
    skip: Collection[str] = (),
) -> None:
    """Fill a module that is laid out on meta, one tensor at a time: read and convert, change, pack,
    move, assign.

    On the way to a GPU, host memory holds one tensor in its final form; on the CPU, nothing but the
    module. Of a weight that is shared out over processes (`fsdp.share_out`) this one's rows are
    read.

    Args:
        changes: what happens to single tensors between reading and placing (a LoRA that is fused).
        skip: tensors that are left on meta.

    Raises:
        RequestError: when a file breaks off.
    """
    names = [name for name in weight_names(module) if name not in skip]
    total, done = sum(source.tensors[name].nbytes for name in names), 0
    for name in names:
        owner, _, key = name.rpartition(".")
        holder = module.get_submodule(owner)
        for part, value in materialize_param(
            holder, key, name, source, changes or {}, own_rows(holder, key)
        ).items():
            place(holder, part, value, device)
        done += source.tensors[name].nbytes
        if report is not None:
            report(done, total)


def weight_names(module: nn.Module) -> list[str]:
    """The tensors of its file that a module is made of, in its order: a leaf in another form stands
    for one `weight`.
    """
    names: dict[str, None] = {}
    for path, owner in module.named_modules():
        for key, _ in owner.named_parameters(recurse=False):
            other = isinstance(owner, PackedLeaf | QuantLinear) and key != "bias"
            names[f"{path}.{'weight' if other else key}" if path else key] = None
    return list(names)


def materialize_param(
    holder: nn.Module,
    key: str,
    name: str,
    source: TensorSource,
    changes: Mapping[str, Change],
    rows: slice | None = None,
) -> dict[str, Tensor]:
    """What stands for one tensor of a file, or for some of its rows, in the module that holds it.

    Returns:
        {parameter: value}, on the host and in its final form.
    """
    if isinstance(holder, PackedLeaf) and key == "weight":
        return holder.parts(source.packed(name, rows))
    quantised = isinstance(holder, QuantLinear) and key == "weight"
    dtype = torch.float32 if quantised else getattr(holder, key).dtype
    if name in changes:  # which are made of whole tensors
        value = changes[name](name, source.read(name, torch.float32))[rows or slice(None)]
    else:
        value = source.read(name, dtype, rows)
    return (
        holder.quantise(value)
        if isinstance(holder, QuantLinear) and quantised
        else {key: value.to(dtype)}
    )


def expert_structure(
    config: DiTConfig,
    source: Headers | None,
    runtime: Runtime,
    dtype: torch.dtype,
    device: torch.device | str,
    touched: Collection[str] = (),
) -> WanDiT:
    """An expert on meta in the form in which it will run: matmul weights in `dtype`, packed or
    quantised, the rest float32.

    Args:
        source: where its weights lie; None: a file of plain weights.
        touched: tensors that LoRAs are fused into.
    """
    model = build(WanDiT, config)
    lay_out(model, source, expert_place(model, dtype), dtype, device, touched)
    if runtime.quantize:
        swap_quantised(
            model,
            quantizable_layers(model, runtime.quantize_layers),
            runtime.quantize,
            dtype,
            torch.device(device),
        )
    set_chunk(model, runtime.chunk_tokens or 0)
    return model


def load_expert(
    checkpoint: Checkpoint,
    which: Expert,
    dtype: torch.dtype,
    device: torch.device | str,
    report: Report | None = None,
    changes: Mapping[str, Change] | None = None,
    runtime: Runtime = Runtime(),  # noqa: B008 (it is frozen)
) -> WanDiT:
    """One expert, all of it on one device."""
    source = open_part("dit", checkpoint.experts[which])
    model = expert_structure(checkpoint.preset.dit, source, runtime, dtype, device, changes or {})
    load_module(model, source, device, report, changes)
    return model


def load_text_encoder(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | str,
    report: Report | None = None,
) -> UMT5Encoder:
    """The text encoder, wholly in `dtype` (or packed, and computed in `dtype`)."""
    return _loaded(
        build(UMT5Encoder, checkpoint.preset.text),
        open_part("t5", checkpoint.t5),
        dtype,
        device,
        report,
    )


def load_vae(
    checkpoint: Checkpoint,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    report: Report | None = None,
) -> WanVAE:
    """The VAE, wholly in `dtype`."""
    return _loaded(
        build(WanVAE, checkpoint.preset.vae),
        open_part("vae", checkpoint.vae),
        dtype,
        device,
        report,
    )


def _loaded(
    module: M,
    source: TensorSource,
    dtype: torch.dtype,
    device: torch.device | str,
    report: Report | None,
) -> M:
    lay_out(module, source, lambda name, info: dtype, dtype, device)
    load_module(module, source, device, report)
    return module


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer, for prompts of the experts' text length; RequestError when it is not the text
    encoder's.
    """
    engine, vocab = open_tokenizer(checkpoint.tokenizer), checkpoint.preset.text.vocab
    if engine.get_vocab_size() > vocab:
        raise RequestError(
            f"{checkpoint.tokenizer} has {engine.get_vocab_size():,} pieces and the text encoder"
            f" {vocab:,}; they do not belong together"
        )
    if engine.get_vocab_size() < vocab // 2:
        logger.warning(
            "the tokenizer has %d pieces, and the text encoder knows %d: is it this model's?",
            engine.get_vocab_size(),
            vocab,
        )
    return Tokenizer(engine, checkpoint.preset.dit.text_len)


def expert_bytes(checkpoint: Checkpoint, dtype: torch.dtype, which: Expert = "high") -> int:
    """What one expert takes in memory, as `load_expert` places it."""
    model = build(WanDiT, checkpoint.preset.dit)
    place, stored = expert_place(model, dtype), open_part("dit", checkpoint.experts[which]).tensors
    matmuls = {
        f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Linear)
    }
    return sum(
        (
            stored[name].nbytes
            if stored[name].packing and name in matmuls
            else p.numel() * place(name, stored[name]).itemsize
        )
        for name, p in model.named_parameters()
    )


def text_encoder_bytes(checkpoint: Checkpoint) -> int:
    """What the text encoder takes in its file, which is about what it takes in memory."""
    return sum(info.nbytes for info in open_part("t5", checkpoint.t5).tensors.values())


# identity

WINDOW, WINDOWS = 64 << 10, 16


def fingerprint(checkpoint: Checkpoint) -> str:
    """16 hex digits that tell two sets of weights apart without reading 126 GB.

    sha256 over every file's name and size, safetensors headers, and 16 evenly spread windows of 64
    KiB of its content (all of it up to 1 MiB). Other weights change it; a few flipped bytes between
    the windows need not: it tells models apart, and is no checksum.
    """
    files = [checkpoint.t5, checkpoint.vae, checkpoint.tokenizer, checkpoint.folder / SHEET]
    for expert in checkpoint.experts.values():
        files += [expert / "config.json", *weight_files(expert)] if expert.is_dir() else [expert]
    files = [inner for file in files for inner in (weight_files(file) if file.is_dir() else [file])]
    digest = hashlib.sha256()
    for file in sorted({file for file in files if file.exists()}):
        name = (
            file.relative_to(checkpoint.folder).as_posix()
            if file.is_relative_to(checkpoint.folder)
            else file.name
        )
        with reading(file):
            digest.update(f"{name} {file.stat().st_size}\n".encode())
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
