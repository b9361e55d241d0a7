"""Write containers as a stream: sizes are known before values, so no file is ever in memory.

A `TensorSpec` describes a tensor and yields its bytes in chunks. `write_safetensors`,
`write_torch` and `write_gguf` (in `write_gguf.py`) write them into a file.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from wanflow.checkpoint.containers import DTYPES
from wanflow.transforms.ggml import LAYOUTS

STORAGES = {"F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage"}  # in a `.pth`
ALIGNMENT = 64  # bytes, of a tensor in a torch zip, as torch.save has it

Count = Callable[[int], None]  # gets the bytes just written


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to write.

    kind: a safetensors dtype ("F32", "BF16", "F8_E4M3", ...) or a GGML type ("Q8_0").
    chunks: yields its bytes in order, as contiguous CPU tensors. It is called once, after those of
        the entries before it.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    chunks: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        count = math.prod(self.shape)
        if self.kind in LAYOUTS:
            return count // LAYOUTS[self.kind].values * LAYOUTS[self.kind].nbytes
        return count * DTYPES[self.kind].itemsize


def write_tensor(entry: TensorSpec, file: IO[bytes], count: Count) -> None:
    """Write an entry's bytes at the file's position; RuntimeError for too many or too few."""
    written = 0
    for chunk in entry.chunks():
        data = chunk.reshape(-1).view(torch.uint8).numpy().data
        file.write(data)
        written += len(data)
        count(len(data))
    if written != entry.nbytes:
        raise RuntimeError(
            f"{entry.name}: the source gave {written:,} bytes; expected {entry.nbytes:,}"
        )


# safetensors


def safetensors_header(
    entries: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """Return the bytes before the data, and the first byte of each tensor in the file.

    Wider values come first, as in the library: readers view the mapped bytes, which must be
    aligned.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    starts: dict[str, int] = {}
    place = 0
    for entry in sorted(entries, key=lambda entry: -DTYPES[entry.kind].itemsize):
        header[entry.name] = {
            "dtype": entry.kind,
            "shape": entry.shape,
            "data_offsets": [place, place + entry.nbytes],
        }
        starts[entry.name], place = place, place + entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, {
        name: 8 + len(text) + start for name, start in starts.items()
    }


def write_safetensors(
    path: Path,
    entries: Sequence[TensorSpec],
    count: Count,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a `.safetensors` file, header first."""
    header, starts = safetensors_header(entries, metadata)
    with path.open("wb") as file:
        file.write(header)
        for entry in entries:
            file.seek(starts[entry.name])
            write_tensor(entry, file, count)


def shards(entries: Sequence[TensorSpec], largest: int) -> list[list[TensorSpec]]:
    """Group entries in order, at most `largest` bytes each; a larger entry gets its own group."""
    groups: list[list[TensorSpec]] = [[]]
    room = largest
    for entry in entries:
        if entry.nbytes > room and groups[-1]:
            groups.append([])
            room = largest
        groups[-1].append(entry)
        room -= entry.nbytes
    return groups


# torch zips


class _Storage:
    """The bytes of one tensor, in the pickle."""

    def __init__(self, key: int, entry: TensorSpec) -> None:
        self.key, self.entry = str(key), entry


class _Shaped:
    """A tensor in the pickle: torch's own function rebuilds it from its storage."""

    def __init__(self, storage: _Storage) -> None:
        self.storage = storage

    def __reduce__(self) -> tuple[Any, ...]:
        shape = self.storage.entry.shape
        strides = tuple(math.prod(shape[n + 1 :]) for n in range(len(shape)))
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, shape, strides, False, {})


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        return (
            "storage",
            getattr(torch, STORAGES[obj.entry.kind]),
            obj.key,
            "cpu",
            math.prod(obj.entry.shape),
        )


def write_torch(path: Path, entries: Sequence[TensorSpec], count: Count) -> None:
    """Write a `.pth` as torch.save writes a dict of tensors; the official code reads these."""
    stored = [_Storage(key, entry) for key, entry in enumerate(entries)]
    root = path.name.partition(".")[0]
    with path.open("wb") as raw, zipfile.ZipFile(raw, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo(f"{root}/data.pkl"), "w") as file:
            _Pickler(file, protocol=2).dump(
                {storage.entry.name: _Shaped(storage) for storage in stored}
            )
        archive.writestr(zipfile.ZipInfo(f"{root}/byteorder"), "little")
        for storage in stored:
            entry = zipfile.ZipInfo(f"{root}/data/{storage.key}")
            entry.file_size = storage.entry.nbytes
            entry.extra = _padding(
                raw.tell() + 30 + len(entry.filename.encode()) + 20
            )  # 20: the sizes in 64 bits
            with archive.open(entry, "w", force_zip64=True) as file:
                write_tensor(storage.entry, file, count)
        archive.writestr(zipfile.ZipInfo(f"{root}/version"), "3\n")


def _padding(place: int) -> bytes:
    """Return an extra field of a zip entry that aligns its data; torch uses `FB` too."""
    size = -(place + 4) % ALIGNMENT
    return struct.pack("<2sH", b"FB", size) + b"Z" * size
