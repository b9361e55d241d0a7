"""Folders of weights: files of tensors that an index ties together, or one file alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wanflow.checkpoint.containers import (
    AGAIN,
    MOST_TENSORS,
    TensorSource,
    open_safetensors,
    read_json,
)
from wanflow.checkpoint.torch_zip import open_torch
from wanflow.config import RequestError
from wanflow.untrusted import printable

STEMS = ("diffusion_pytorch_model", "pytorch_model", "model")  # of weights beside other `.bin`
INDEX = f"{STEMS[0]}.safetensors.index.json"
MOST_SHARDS = 512


@dataclass(frozen=True)
class ShardedFolder(TensorSource):
    """Files that an index ties together."""

    shards: Mapping[str, TensorSource]  # the file of each tensor

    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        rows: slice | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        return self.shards[name].read(name, dtype, rows, out)

    def stream(self, name: str) -> Iterator[Tensor]:
        return self.shards[name].stream(name)


def weight_files(folder: Path) -> list[Path]:
    """Return the files that a model's folder needs: an index and its shards, or a single file.

    `diffusion_pytorch_model.safetensors.index.json` comes first; one variant of it (`-bf16`,
    `.fp16`) serves as well. `.bin` files, of torch.save, count where no safetensors are. A file in
    the list may be missing.

    Raises:
        RequestError: for several models, or an index that is broken or leads out of the folder.
    """
    for ending in (".safetensors", ".bin"):
        indexes = [
            file
            for file in sorted(folder.glob("*.json"))
            if ending in file.name and ".index" in file.name
        ]
        index = _only(indexes, folder / f"{STEMS[0]}{ending}.index.json")
        if index is not None:
            return [index, *_indexed(index, _weight_map(index), ending)]
        single = [
            file
            for file in sorted(folder.glob(f"*{ending}"))
            if "-of-" not in file.name
            and (ending == ".safetensors" or file.name.startswith(tuple(f"{s}." for s in STEMS)))
        ]
        alone = _only(single, folder / f"{STEMS[0]}{ending}")
        if alone is not None:
            return [alone]
    return [folder / INDEX]


def _only(files: list[Path], preferred: Path) -> Path | None:
    if preferred in files:
        return preferred
    if len(files) > 1:
        raise RequestError(
            f"{preferred.parent} holds several models: {', '.join(file.name for file in files)};"
            " move all but one away"
        )
    return files[0] if files else None


def _weight_map(index: Path) -> dict[str, str]:
    mapping = read_json(index).get("weight_map")
    if (
        not isinstance(mapping, dict)
        or not mapping
        or not all(isinstance(file, str) for file in mapping.values())
    ):
        raise RequestError(f"{index} has no weight_map of tensor names to file names; {AGAIN}")
    if len(mapping) > MOST_TENSORS or len(set(mapping.values())) > MOST_SHARDS:
        raise RequestError(
            f"{index} names {len(mapping):,} tensors in {len(set(mapping.values())):,} files; at"
            f" most {MOST_TENSORS:,} in {MOST_SHARDS} are read"
        )
    return mapping


def _indexed(index: Path, mapping: dict[str, str], ending: str) -> list[Path]:
    """Return the shards that an index names; each must be a file of the index's folder."""
    home = index.parent.resolve()
    # Only Hugging Face's cache may lead outside: it links each snapshot's files to its blobs. The
    # index lies in the snapshot (TI2V-5B), or in a folder of it.
    blobs = [above.parent / "blobs" for above in home.parents[:2] if above.name == "snapshots"]
    files = []
    for name in sorted(set(mapping.values())):
        file = index.parent / name
        simple = name == file.name and not set(name) & set('/\\:*?"<>|\0')
        if not simple or not name.endswith(ending):
            raise RequestError(
                f"{index} names {printable(name)!r}, which is not a {ending.lstrip('.')} file of"
                f" its own folder; {AGAIN}"
            )
        real = Path(os.path.realpath(file))
        if real.parent not in (home, *blobs):
            raise RequestError(
                f"{file} is a link out of its folder, to {real}; put the file itself there, or link"
                " the folder"
            )
        files.append(file)
    return files


def _open(file: Path) -> TensorSource:
    return open_torch(file) if file.suffix == ".bin" else open_safetensors(file)


def open_folder(folder: Path) -> TensorSource:
    """Open a folder with an index and its shards, or with one file.

    Raises:
        RequestError: naming what is missing, broken, or not where the index says.
    """
    files = weight_files(folder)
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise RequestError(
            f"{folder} lacks {len(missing)} of {len(files)} files: {', '.join(missing)}; {AGAIN}"
        )
    if len(files) == 1:
        return _open(files[0])
    index, *files = files
    shards = {file.name: _open(file) for file in files}
    mapping = _weight_map(index)
    for name, file in mapping.items():
        if name not in shards[file].tensors:
            raise RequestError(
                f"{folder / file} lacks {name}, which {index.name} lists; index and shards are of"
                f" different downloads; {AGAIN}"
            )
    for file, shard in shards.items():
        extra = [name for name in shard.tensors if mapping.get(name) != file]
        if extra:
            raise RequestError(
                f"{folder / file} holds {extra[0]}, which {index.name} puts elsewhere; index and"
                f" shards are of different downloads; {AGAIN}"
            )
    sources = {name: shards[file] for name, file in mapping.items()}
    tensors = {name: source.tensors[name] for name, source in sources.items()}
    container = f"{shards[files[0].name].container}, {len(files)} shards"
    return ShardedFolder(folder, tensors, sources, files=files, container=container)
