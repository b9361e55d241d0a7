"""Weights become modules: read, convert, change, pack and place one tensor at a time.

Weights that are packed in their file (fp8, GGUF) stay packed in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.checkpoint.containers import Report, TensorSource
from wanflow.checkpoint.structure import (
    M,
    build,
    expert_dtypes,
    expert_structure,
    has_other_form,
    lay_out,
    vae_of,
    weight_names,
)
from wanflow.checkpoint.tokenizers import open_tokenizer
from wanflow.config import RequestError
from wanflow.models.dit import WanDiT
from wanflow.models.tokenizer import Tokenizer
from wanflow.models.umt5 import UMT5Encoder
from wanflow.models.vae import WanVAE
from wanflow.presets import Expert
from wanflow.runtime import Runtime

if TYPE_CHECKING:
    from wanflow.checkpoint.reading import Upload
    from wanflow.transforms.host_memory import HostMemory

logger = logging.getLogger("wanflow")

Change = Callable[[str, Tensor], Tensor]  # name and float32 value -> float32 value


def load_module(
    module: nn.Module,
    source: TensorSource,
    device: torch.device | str,
    report: Report | None = None,
    changes: Mapping[str, Change] | None = None,
    skip: Collection[str] = (),
    memory: HostMemory | None = None,
) -> None:
    """Fill a module that `lay_out` prepared on meta, one tensor at a time.

    Of a sharded weight, only this rank's rows are read. `changes` apply to single tensors between
    reading and placing (a fused LoRA). The tensors in `skip` stay on meta.

    Args:
        memory: of an expert. A GPU then converts what it gets, and the ranks of a machine that
            hold the same weights read each of them once.

    Raises:
        RequestError: when a file breaks off.
    """
    device = torch.device(device)
    names = [name for name in weight_names(module) if name not in skip]
    sizes = {name: source.tensors[name].nbytes for name in names}
    upload = None
    if memory is not None and device.type == "cuda":
        from wanflow.checkpoint.reading import Upload

        upload = Upload(device, memory)

    def read(name: str) -> dict[str, Tensor]:
        holder, key = place_of(module, name)
        rows = _own_rows(holder, key)
        return materialize_param(holder, key, name, source, changes or {}, rows, upload)

    def like(name: str) -> dict[str, Tensor]:
        return stored_parts(*place_of(module, name))

    sharded = any(is_sharded(parameter) for parameter in module.parameters())
    group = None if memory is None or sharded else memory.group
    parts: Iterable[tuple[str, dict[str, Tensor]]] = ((name, read(name)) for name in names)
    if group is not None and group.size > 1:
        from wanflow.checkpoint.reading import read_in_turns

        parts = read_in_turns(names, sizes, read, like, group, device)
    total, done = sum(sizes.values()), 0
    for name, values in parts:
        holder, _ = place_of(module, name)
        for parameter, value in values.items():
            _write_param(holder, parameter, value, device)
        done += sizes[name]
        if report is not None:
            report(done, total)


def place_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the leaf that holds a tensor, and the tensor's name there."""
    owner, _, key = name.rpartition(".")
    return module.get_submodule(owner), key


def stored_parts(holder: nn.Module, key: str) -> dict[str, Tensor]:
    """Return the parameters of a leaf in which it stores a tensor; see `materialize_param`."""
    several = has_other_form(holder) and key == "weight"
    held = dict(holder.named_parameters(recurse=False))
    return {one: v for one, v in held.items() if (one != "bias" if several else one == key)}


def materialize_param(
    holder: nn.Module,
    key: str,
    name: str,
    source: TensorSource,
    changes: Mapping[str, Change],
    rows: slice | None = None,
    upload: Upload | None = None,
) -> dict[str, Tensor]:
    """Read the tensor `name`, or some of its rows, in the form in which `holder` stores it.

    Returns:
        {parameter of `holder`: value} on the host, or with `upload` perhaps on its device. A packed
        or quantised leaf has several.
    """
    leaf: Any = holder if has_other_form(holder) and key == "weight" else None
    if leaf is not None and hasattr(leaf, "parts"):  # it is packed as in the file
        packed: dict[str, Tensor] = leaf.parts(source.packed(name, rows))
        return packed
    dtype = torch.float32 if leaf is not None else getattr(holder, key).dtype
    if name in changes:  # a change needs all rows
        value = changes[name](name, source.read(name, torch.float32))[rows or slice(None)]
    elif upload is not None and upload.takes(source, name):
        value = upload.read(source, name, dtype, rows)
    else:
        value = source.read(name, dtype, rows)
    if leaf is not None:
        quantised: dict[str, Tensor] = leaf.quantise(value)
        return quantised
    return {key: value.to(dtype)}


def _own_rows(holder: nn.Module, key: str) -> slice | None:
    """Return the rows of a tensor that this rank holds; None where it holds all.

    `key` is the tensor's name in `holder`. A packed or rounded weight has the rows of its data.
    """
    parameter: Any = getattr(holder, key, None)
    if parameter is None:
        parameter = getattr(holder, "data", None)
    if not is_sharded(parameter):
        return None
    mesh, rows = parameter.device_mesh, len(parameter)
    length = -(-rows // mesh.size())
    start = min(rows, length * mesh.get_local_rank())
    return slice(start, min(rows, start + length))


def _write_param(holder: nn.Module, key: str, value: Tensor, device: torch.device | str) -> None:
    """Write a value, or this rank's rows of it, into a module's parameter."""
    parameter: Any = getattr(holder, key)
    if is_sharded(parameter):
        parameter.to_local().copy_(value)
    else:
        setattr(holder, key, nn.Parameter(value.to(device), requires_grad=False))


def is_sharded(parameter: object) -> bool:
    """Return whether it is a DTensor."""
    return hasattr(parameter, "device_mesh")


def load_expert(
    checkpoint: Checkpoint,
    which: Expert,
    dtype: torch.dtype,
    device: torch.device | str,
    report: Report | None = None,
    changes: Mapping[str, Change] | None = None,
    runtime: Runtime = Runtime(),  # noqa: B008 (it is frozen)
    memory: HostMemory | None = None,
) -> WanDiT:
    """Load an expert, all of it on one device; see `load_module`."""
    source = checkpoint.source(which)
    model = expert_structure(checkpoint.spec.dit, source, runtime, dtype, device, changes or {})
    load_module(model, source, device, report, changes, memory=memory)
    return model


def load_text_encoder(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | str,
    report: Report | None = None,
) -> UMT5Encoder:
    """Load the text encoder in `dtype`; packed weights stay packed and compute in `dtype`."""
    model = build(UMT5Encoder, checkpoint.spec.text)
    return _load(model, checkpoint.source("t5"), dtype, device, report)


def load_vae(
    checkpoint: Checkpoint,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    report: Report | None = None,
) -> WanVAE:
    """Load the VAE in `dtype`."""
    model = vae_of(checkpoint.spec.vae)
    return _load(model, checkpoint.source("vae"), dtype, device, report)


def _load(
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
    """Load the tokenizer, for prompts of the experts' text length.

    Raises:
        RequestError: when it has more pieces than the text encoder.
    """
    path, vocab = checkpoint.paths["tokenizer"], checkpoint.spec.text.vocab
    inside = path == checkpoint.paths["t5"]
    engine = open_tokenizer(path, checkpoint.source("t5").inner if inside else None)
    pieces = engine.get_vocab_size()
    if pieces > vocab:
        raise RequestError(
            f"{path} has {pieces:,} pieces and the text encoder {vocab:,}; they do not belong"
            " together; name the encoder's own tokenizer with --tokenizer"
        )
    if pieces < vocab // 2:
        logger.warning(
            "the tokenizer has %d pieces, and the text encoder knows %d: is it this model's?",
            pieces,
            vocab,
        )
    return Tokenizer(engine, checkpoint.spec.dit.text_len)


def expert_bytes(checkpoint: Checkpoint, dtype: torch.dtype, which: Expert | None = None) -> int:
    """Return the bytes that an expert takes in memory, as `load_expert` places it."""
    which = which or checkpoint.spec.expert_names[0]
    model, stored = build(WanDiT, checkpoint.spec.dit), checkpoint.source(which).tensors
    choose_dtype = expert_dtypes(model, dtype)
    matmuls = {
        f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Linear)
    }
    return sum(
        stored[name].nbytes
        if stored[name].packing and name in matmuls
        else parameter.numel() * choose_dtype(name, stored[name]).itemsize
        for name, parameter in model.named_parameters()
    )
