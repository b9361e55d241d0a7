"""Any file of weights becomes a `TensorSource` with official names: container, scales, dialect.

The content decides what a file is: its first bytes, its tensors' names and shapes. Its name is
never trusted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wanflow.checkpoint.containers import (
    AGAIN,
    TensorSource,
    open_safetensors,
    opened_raw,
    reading,
    refuse_unreadable,
)
from wanflow.checkpoint.folders import open_folder
from wanflow.checkpoint.key_maps import PREFIXES, Kind, strip, to_official
from wanflow.checkpoint.torch_zip import open_torch
from wanflow.config import RequestError

if TYPE_CHECKING:
    from wanflow.transforms.packed import Packed

# A name, without prefix, that every file of a kind has in one dialect, and no other kind has.
MARKS: dict[str, Kind] = {
    "patch_embedding.weight": "dit",
    "token_embedding.weight": "t5",
    "shared.weight": "t5",
    "encoder.embed_tokens.weight": "t5",
    "token_embd.weight": "t5",
    "decoder.conv1.weight": "vae",
    "decoder.conv_in.weight": "vae",
}
KIND_LABELS: dict[Kind, str] = {
    "dit": "a diffusion transformer",
    "t5": "a T5 text encoder",
    "vae": "a VAE",
}
QUANTO = {".weight._data": ".weight", ".weight._scale": ".weight_scale"}  # to ComfyUI's
EMBEDDED = "spiece_model"  # the tensor of bytes in which ComfyUI's T5 files carry their tokenizer
LORA_MARKS = (
    ".lora_",
    "_lora.",
    ".lora.",
    "lora_unet_",
    ".hada_",
    ".lokr_",
    ".diff",
    ".alpha",
    ".dora_scale",
    ".set_weight",
)
WEB_PAGE = (
    "is a web page and not weights: the download was refused or needs a login; download it again"
)
NOT_WEIGHTS = {
    b"version https://git-lfs": (
        "is a pointer of git lfs and not the file itself; fetch that with `git lfs pull`"
    ),
    b"<!doctype html": WEB_PAGE,
    b"<html": WEB_PAGE,
}

# A file without a suffix is a blob of Hugging Face's cache.
TORCH_SUFFIXES = ("", ".pth", ".pt", ".bin", ".ckpt")


def open_source(path: Path) -> TensorSource:
    """Open any container of tensors: safetensors, GGUF, a torch zip, a folder of these.

    Raises:
        RequestError: naming the file and what to do, for anything missing, broken or hostile.
    """
    return _with_scales(open_container(path))


def open_container(path: Path) -> TensorSource:
    """Open a container with its tensors as they are named and stored; raises as `open_source`."""
    with reading(path):
        if path.is_dir():
            return open_folder(path)
    refuse_unreadable(path)
    with opened_raw(path) as file:
        start = file.read(24)
    if start[:4] == b"GGUF":
        from wanflow.checkpoint.gguf import open_gguf

        return open_gguf(path)
    for mark, what in NOT_WEIGHTS.items():
        if start.lower().startswith(mark):
            raise RequestError(f"{path} {what}")
    zipped = start[:2] == b"PK"
    if not zipped and (start[8:9] == b"{" or path.suffix == ".safetensors"):
        return open_safetensors(path)
    if not zipped and path.suffix not in TORCH_SUFFIXES:
        raise RequestError(
            f"{path} is not a file of weights (.safetensors, .gguf, .pth) or a folder of them;"
            " get the weights with `wanflow download`"
        )
    return open_torch(path)


def _with_scales(source: TensorSource) -> TensorSource:
    """Return a source that joins packed weights with their scales; the same one without any."""
    plain = all(
        info.dtype.itemsize > 1 and "scale" not in name and "quant" not in name
        for name, info in source.tensors.items()
    )
    if plain and not any("quant" in key for key in source.metadata):
        return source
    # What joins and unpacks them is imported for a file that may hold some.
    from wanflow.checkpoint.scales import pair_scales

    return pair_scales(_without_quanto(source))


def _without_quanto(source: TensorSource) -> TensorSource:
    """Return a source whose names are ComfyUI's where a file has quanto's, as Wan2GP's int8 has."""
    if not any(name.endswith(".weight._data") for name in source.tensors):
        return source
    names = {}
    for name in source.tensors:
        end = next((end for end in QUANTO if name.endswith(end)), "")
        names[name.removesuffix(end) + QUANTO.get(end, "")] = name
    return _renamed(source, names)


@dataclass(frozen=True)
class OfficialSource(TensorSource):
    """One part of a model under its official names, or a file under another program's names."""

    inner: TensorSource
    names: Mapping[str, str]  # new -> in the file

    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        rows: slice | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        return self.inner.read(self.names[name], dtype, rows, out)

    def packed(self, name: str, rows: slice | None = None) -> Packed:
        return self.inner.packed(self.names[name], rows)

    def stream(self, name: str) -> Iterator[Tensor]:
        return self.inner.stream(self.names[name])


def official(kind: Kind, source: TensorSource) -> OfficialSource:
    """Return the part of `kind` in a source, under official names.

    Raises:
        RequestError: when the source holds none.
    """
    held = kinds_in(source)
    if kind not in held:
        raise RequestError(
            f"{source.path} does not hold {KIND_LABELS[kind]}, but {describe(source)};"
            " `wanflow inspect` shows what a file holds"
        )
    names = {
        name: strip(kind, name) for name in source.tensors if name.rpartition(".")[2] != EMBEDDED
    }
    if len(held) > 1:  # one file for several parts: the prefixes tell them apart
        own = tuple(prefix for prefix in PREFIXES[kind] if prefix != "model.")
        names = {name: bare for name, bare in names.items() if name.startswith(own)}
    try:
        table = to_official(kind, names)
    except RequestError as error:
        raise RequestError(f"{source.path}: {error}") from None
    return _renamed(source, {new: old for old, new in table.items()})


def _renamed(source: TensorSource, names: dict[str, str]) -> OfficialSource:
    return OfficialSource(
        source.path,
        {new: source.tensors[old] for new, old in names.items()},
        source,
        names,
        files=source.files,
        container=source.container,
        metadata=source.metadata,
    )


def kinds_in(source: TensorSource) -> list[Kind]:
    """Return which parts of a model a source holds, by its tensors' names."""
    found = (
        kind for name in source.tensors for kind in PREFIXES if MARKS.get(strip(kind, name)) == kind
    )
    return list(dict.fromkeys(found))


def is_lora(source: TensorSource) -> bool:
    """Return whether a source holds changes to a model rather than a model."""
    return not kinds_in(source) and any(
        mark in name for name in source.tensors for mark in LORA_MARKS
    )


def describe(source: TensorSource) -> str:
    """Return a few words on what a source holds."""
    held = [KIND_LABELS[kind] for kind in kinds_in(source)]
    if held:
        return " and ".join(held)
    if is_lora(source):
        return "a LoRA (use it with --lora)"
    first = ", ".join(list(source.tensors)[:3])
    return f"something else (its tensors begin {first})" if first else f"nothing; {AGAIN}"
