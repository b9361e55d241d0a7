"""Containers of tensors: safetensors files, sharded folders, torch zips. A loader sees only a
`TensorSource`.

Opening reads headers alone, so names, shapes and dtypes of 57 GB are known in milliseconds; `read`
costs the memory of the one tensor it returns. Files come from strangers and from downloads that
broke off: whatever is wrong with one ends in a single `RequestError` that names the file and what
to do, no code in it is ever run, and no size that a header claims is believed before the file's own
size bears it out.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from wanflow.config import RequestError, plain
from wanflow.transforms.ggml import LAYOUTS
from wanflow.transforms.packed import Packed

HEADER_LIMIT = 100 << 20  # safetensors' own limit; a full-size expert's header is 0.1 MB
CHUNK = 4 << 20  # bytes converted at a time: small enough for a cache, large enough for a disk
VALUES = 1 << 20  # of a streamed piece: 4 MB in float32; larger ones leave the CPU's cache
INDEX = "diffusion_pytorch_model.safetensors.index.json"
AGAIN = "download it again"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Report = Callable[[int, int], None]  # bytes read, bytes in all


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before its data is read.

    A packed tensor (fp8 with a scale, GGUF blocks) names its `packing`, the bytes it takes in its
    file and the shape of its scale, if that is a tensor of its own; `dtype` is then what it unpacks
    into without loss.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    packing: str | None = None
    packed_bytes: int = 0
    scale: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.packed_bytes if self.packing else math.prod(self.shape) * self.dtype.itemsize


class Headers(Protocol):
    """The names, shapes and dtypes of a file's tensors, before any data is read."""

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...


class TensorSource(Headers, Protocol):
    """Named tensors on disk. A source holds no open file, so threads and forks may share it."""

    @property
    def container(self) -> str:
        """The format in words: "safetensors", "GGUF of wan", "torch zip"."""

    @property
    def files(self) -> Sequence[Path]:
        """The files that hold the tensors."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The header's own keys and values; empty for formats without them."""

    def read(
        self, name: str, dtype: torch.dtype | None = None, rows: slice | None = None
    ) -> Tensor:
        """The tensor in CPU memory of its own, as stored or converted on the way; RequestError when
        the file breaks off.

        Args:
            rows: of its first side, these alone, and no others are read.
        """

    def packed(self, name: str, rows: slice | None = None) -> Packed:
        """Return a tensor whose info has a `packing`, as stored; KeyError for any other.

        Raises:
            ValueError: when a row of `rows` is not a whole number of blocks.
        """

    def stream(self, name: str) -> Iterator[Tensor]:
        """Yield the values of a tensor in order: 1-D, at most `VALUES`, as stored.

        Packed tensors come unpacked, in float32. Each piece but the last holds complete blocks of
        every packed format (a multiple of 256 values), or complete rows. The next piece may
        overwrite the buffer of this one. Memory: one piece, and the packed data of a packed tensor.

        Raises:
            RequestError: when the file breaks off, or a scale is damaged.
        """


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever the system refuses (permission, a broken disk, an impossible name) becomes a
    RequestError that names the file.
    """
    try:
        yield
    except OSError as error:
        raise RequestError(
            f"{error.filename or path} cannot be read: {error.strerror or error}"
        ) from None


def refuse_unreadable(path: Path) -> int:
    """The size in bytes of a regular file that may be read; a RequestError for anything else."""
    with reading(path):
        if not path.exists():
            raise RequestError(f"{path} is missing; {AGAIN}")
        if not path.is_file():
            raise RequestError(f"{path} is not a regular file")
        with path.open("rb"):
            size = path.stat().st_size
    if size == 0:
        raise RequestError(f"{path} is empty; {AGAIN}")
    return size


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file; a RequestError that names the file otherwise."""
    if refuse_unreadable(path) > HEADER_LIMIT:
        raise RequestError(f"{path} is too large for JSON that describes a model; {AGAIN}")
    try:
        with reading(path):
            return _json_object(path.read_bytes())
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(f"{path} is not a JSON object ({error}); {AGAIN}") from None


def _json_object(data: bytes) -> dict[str, Any]:
    """Parse; ValueError for what is not an object, nests absurdly, or names one key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if twice:
            raise ValueError(f"the key {twice[0]!r} stands there twice")
        return dict(pairs)

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it holds something else")
    return value


def fill(part: Tensor, file: FileIO, path: Path) -> None:
    """Fill a contiguous tensor with the next bytes of an unbuffered file; a RequestError when it
    breaks off.
    """
    view, done = part.view(torch.uint8).numpy().data, 0
    while done < len(view):  # one call reads at most 2 GB
        count = file.readinto(view[done:])
        if not count:
            raise RequestError(f"{path} breaks off at byte {file.tell():,}; {AGAIN}")
        done += count


def refuse_odd_names(path: Path, names: Iterable[str]) -> None:
    """RequestError for a tensor whose name cannot be shown as it is: no program writes such names,
    and no message repeats one.
    """
    odd = next((name for name in names if plain(name) != name), None)
    if odd is not None:
        raise RequestError(f"{path} is damaged: a tensor is called {odd!r}; {AGAIN}")


def read_plain(
    path: Path, info: TensorInfo, place: int, dtype: torch.dtype | None, rows: slice | None = None
) -> Tensor:
    """A tensor whose bytes begin at `place` of a file, or some of its rows, as stored or converted
    a chunk at a time.
    """
    if rows is not None:
        start, stop, _ = rows.indices(info.shape[0])
        place += start * math.prod(info.shape[1:]) * info.dtype.itemsize
        info = replace(info, shape=(max(0, stop - start), *info.shape[1:]))
    out = torch.empty(math.prod(info.shape), dtype=dtype or info.dtype)
    stored = (
        out
        if out.dtype == info.dtype
        else torch.empty(min(CHUNK, info.nbytes) // info.dtype.itemsize, dtype=info.dtype)
    )
    with reading(path), path.open("rb", buffering=0) as file:
        file.seek(place)
        for start in range(0, len(out), max(1, len(stored))):
            part = stored[: len(out) - start]
            fill(part, file, path)
            if stored is not out:
                out[start : start + len(part)] = part
    return out.view(info.shape)


def stream_plain(path: Path, info: TensorInfo, start: int) -> Iterator[Tensor]:
    """Yield the values of a tensor whose bytes begin at `start`, see `TensorSource.stream`."""
    count = math.prod(info.shape)
    buffer = torch.empty(min(count, VALUES), dtype=info.dtype)
    with reading(path), path.open("rb", buffering=0) as file:
        file.seek(start)
        for done in range(0, count, VALUES):
            piece = buffer[: count - done]
            fill(piece, file, path)
            yield piece


def stream_memory(value: Tensor) -> Iterator[Tensor]:
    """Yield the values of a tensor in memory, see `TensorSource.stream`."""
    return iter(value.flatten().split(VALUES))


def stream_packed(packed: Packed) -> Iterator[Tensor]:
    """Yield the values of a packed tensor in float32, see `TensorSource.stream`."""
    count = math.prod(packed.shape)
    if not packed.shape or not count:
        yield packed.dense().flatten()
        return
    if packed.kind in LAYOUTS:  # blocks follow one another in any shape
        layout = LAYOUTS[packed.kind]
        blocks = packed.data.reshape(-1, layout.nbytes)
        packed = Packed(packed.kind, (count // layout.values, layout.values), blocks)
    step = max(1, VALUES // math.prod(packed.shape[1:]))
    for start in range(0, packed.shape[0], step):
        yield packed.dense(rows=slice(start, start + step)).flatten()


# safetensors


@dataclass(frozen=True)
class SafetensorsFile:
    """One `.safetensors` file. Data is read, not mapped: a file that shrinks meanwhile is an error,
    not a crash.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    starts: Mapping[str, int]  # where each tensor's bytes begin in the file
    metadata: Mapping[str, str]
    container = "safetensors"

    @property
    def files(self) -> Sequence[Path]:
        return [self.path]

    def read(
        self, name: str, dtype: torch.dtype | None = None, rows: slice | None = None
    ) -> Tensor:
        return read_plain(self.path, self.tensors[name], self.starts[name], dtype, rows)

    def packed(self, name: str, rows: slice | None = None) -> Packed:
        raise KeyError(name)  # nothing here is packed

    def stream(self, name: str) -> Iterator[Tensor]:
        return stream_plain(self.path, self.tensors[name], self.starts[name])


def open_safetensors(path: Path) -> SafetensorsFile:
    """Read and check the header of a safetensors file.

    Layout: 8 bytes little-endian length n, n bytes of JSON {name: {dtype, shape, data_offsets}},
        then the data without gaps.

    Raises:
        RequestError: naming the file, for a truncated, oversized, inconsistent or foreign file.
    """
    size = refuse_unreadable(path)
    with reading(path), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > HEADER_LIMIT:
            raise RequestError(
                f"{path} is not a safetensors file, or its first bytes are damaged; {AGAIN}"
            )
        if 8 + length > size:
            raise RequestError(
                f"{path} is cut off: its header of {length:,} bytes does not fit into {size:,};"
                f" {AGAIN}"
            )
        text = file.read(length)
    try:
        header = _json_object(text)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is not an object")
        tensors, starts, end = _layout(header)
    except ValueError as error:
        raise RequestError(
            f"{path} is not a safetensors file, or its header is damaged ({error}); {AGAIN}"
        ) from None
    if 8 + length + end != size:
        state = "cut off" if 8 + length + end > size else "longer than it should be"
        raise RequestError(
            f"{path} is {state}: {size:,} bytes, and its header speaks of {8 + length + end:,};"
            f" {AGAIN}"
        )
    refuse_odd_names(path, tensors)
    return SafetensorsFile(
        path, tensors, {name: 8 + length + start for name, start in starts.items()}, metadata
    )


def _layout(header: dict[str, Any]) -> tuple[dict[str, TensorInfo], dict[str, int], int]:
    """Shapes, first bytes and total bytes that a header describes; ValueError unless they tile the
    data exactly.
    """
    tensors: dict[str, TensorInfo] = {}
    starts: dict[str, int] = {}
    spans = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise ValueError(f"{name} is not described")
        dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {dtype!r}; known are {', '.join(DTYPES)}")
        if not (_counts(shape) and _counts(span) and len(span) == 2):
            raise ValueError(f"{name} has a shape or place that is no list of counts")
        # Bounded even where one side is 0: torch multiplies the sides up for the strides.
        if math.prod(max(side, 1) for side in shape) >= 1 << 48:
            raise ValueError(f"{name} has an impossible shape")
        info = TensorInfo(tuple(shape), DTYPES[dtype])
        if span[1] - span[0] != info.nbytes:
            raise ValueError(
                f"{name} takes {info.nbytes:,} bytes and is given {span[1] - span[0]:,}"
            )
        tensors[name], starts[name] = info, span[0]
        spans.append((span[0], span[1]))
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError("its tensors overlap or leave gaps")
        end = stop
    return tensors, starts, end


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


# folders of safetensors


@dataclass(frozen=True)
class ShardedFolder:
    """Safetensors files that an index ties together."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    shards: Mapping[str, SafetensorsFile]  # the file of each tensor

    @property
    def container(self) -> str:
        return f"safetensors, {len(self.files)} shards"

    @property
    def files(self) -> Sequence[Path]:
        return sorted({shard.path for shard in self.shards.values()})

    @property
    def metadata(self) -> Mapping[str, str]:
        return {}

    def read(
        self, name: str, dtype: torch.dtype | None = None, rows: slice | None = None
    ) -> Tensor:
        return self.shards[name].read(name, dtype, rows)

    def packed(self, name: str, rows: slice | None = None) -> Packed:
        raise KeyError(name)  # nothing here is packed

    def stream(self, name: str) -> Iterator[Tensor]:
        return self.shards[name].stream(name)


def weight_files(folder: Path) -> list[Path]:
    """The files that a model's folder needs, there or not: its index and the shards that names, or
    one file with everything.

    `diffusion_pytorch_model.safetensors.index.json` comes first; one variant of it (`-bf16`,
    `.fp16`) serves as well.

    Raises:
        RequestError: when there are several models, or the index is broken or points out of the
            folder.
    """
    indexes = sorted(
        file
        for file in folder.glob("*.json")
        if ".safetensors" in file.name and ".index" in file.name
    )
    index = _only(indexes, folder / INDEX)
    if index is not None:
        return [index, *_indexed(index, _weight_map(index))]
    whole = sorted(file for file in folder.glob("*.safetensors") if "-of-" not in file.name)
    return [_only(whole, folder / "diffusion_pytorch_model.safetensors") or folder / INDEX]


def _only(files: list[Path], preferred: Path) -> Path | None:
    if preferred in files:
        return preferred
    if len(files) > 1:
        raise RequestError(
            f"{preferred.parent} holds several models: {', '.join(file.name for file in files)};"
            " keep one of them"
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
    return mapping


def _indexed(index: Path, mapping: dict[str, str]) -> list[Path]:
    """The shards an index names; each must be a file of the index's own folder."""
    home = index.parent.resolve()
    cache = (
        home.parents[2] if len(home.parents) > 2 and home.parents[1].name == "snapshots" else None
    )
    files = []
    for name in sorted(set(mapping.values())):
        file = index.parent / name
        plain = name == file.name and not set(name) & set('/\\:*?"<>|\0')
        if not plain or not name.endswith(".safetensors"):
            raise RequestError(
                f"{index} names {name!r}, which is not a safetensors file of its own folder;"
                f" {AGAIN}"
            )
        real = Path(os.path.realpath(file))
        # Hugging Face's cache links every file of a snapshot to its blobs folder; nothing else may
        # lead outside.
        if real.parent != home and not (cache and real.parent == cache / "blobs"):
            raise RequestError(
                f"{file} is a link out of its folder, to {real}; put the file itself there, or link"
                " the whole folder"
            )
        files.append(file)
    return files


def open_folder(folder: Path) -> TensorSource:
    """Open a folder with an index and its shards, or with one safetensors file.

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
        return open_safetensors(files[0])
    index, *files = files
    shards = {file.name: open_safetensors(file) for file in files}
    mapping = _weight_map(index)
    for name, file in mapping.items():
        if name not in shards[file].tensors:
            raise RequestError(
                f"{folder / file} lacks {name}, which {index.name} promises; index and shards are"
                " of different downloads"
            )
    for file, shard in shards.items():
        extra = [name for name in shard.tensors if mapping.get(name) != file]
        if extra:
            raise RequestError(
                f"{folder / file} holds {extra[0]}, not so in {index.name}; index and shards are of"
                " different downloads"
            )
    sources = {name: shards[file] for name, file in mapping.items()}
    return ShardedFolder(
        folder, {name: source.tensors[name] for name, source in sources.items()}, sources
    )
