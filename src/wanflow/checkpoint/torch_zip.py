"""Files of torch.save: a dict of tensors, whose places its pickle names. No code is ever run."""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from wanflow.checkpoint.containers import (
    AGAIN,
    DTYPES,
    MOST_TENSORS,
    OpenedFile,
    TensorInfo,
    TensorSource,
    impossible,
    read_plain,
    refuse_odd_names,
    stream_memory,
    stream_plain,
)
from wanflow.checkpoint.state_dict import LONGEST, Foreign, Named, StoredTensor, walk
from wanflow.config import RequestError
from wanflow.untrusted import printable

DIRECTORY = 16 << 20  # bytes of a zip's list of records; a text encoder's has 0.02 MB
LOCAL = struct.Struct("<4s22xHH")  # before data: mark, lengths of name and extra field
SHARED = 4  # times that tensors may use the bytes of a file; tied weights use them twice


@dataclass(frozen=True)
class TorchFile(TensorSource):
    """A dict of tensors that torch.save wrote. Data is read, not mapped.

    starts: the first byte of each tensor in the file. strides: of those that do not lie in order.
    """

    file: OpenedFile
    starts: Mapping[str, int] = field(repr=False)
    strides: Mapping[str, tuple[int, ...]] = field(repr=False)

    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        rows: slice | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        info = self.tensors[name]
        if name not in self.strides:
            return read_plain(self.file, info, self.starts[name], dtype, rows, out)
        span = TensorInfo((_span(info.shape, self.strides[name]),), info.dtype)
        values = read_plain(self.file, span, self.starts[name], None)
        value = values.as_strided(info.shape, self.strides[name])[rows or slice(None)]
        if out is not None:
            return out.copy_(value)
        return value.to(dtype or info.dtype, copy=True, memory_format=torch.contiguous_format)

    def stream(self, name: str) -> Iterator[Tensor]:
        if name in self.strides:
            return stream_memory(self.read(name))
        return stream_plain(self.file, self.tensors[name], self.starts[name])


def open_torch(path: Path) -> TorchFile:
    """Open a `.pth`: a dict of tensors, or one inside `model_state` or `state_dict`.

    Raises:
        RequestError: naming the file, for any other content, code in the pickle included.
    """
    opened = OpenedFile.of(path)
    with opened.at(0) as file:
        try:
            records, pickle = _records(path, file, opened.size)
        except zipfile.BadZipFile:
            raise RequestError(
                f"{path} is not a complete file of torch.save: cut off, of another format, or from"
                f" before torch 1.6; {AGAIN}, or save it again with a newer torch"
            ) from None
        except (ValueError, RuntimeError, EOFError, struct.error) as error:
            raise RequestError(f"{path} is damaged ({printable(error)}); {AGAIN}") from None
    state = _state(path, pickle)
    infos, starts, strides = dict[str, TensorInfo](), dict[str, int](), {}
    storages, total = dict[str, int](), 0
    for name, value in state.items():
        if not isinstance(name, str) or not _readable(value):
            raise RequestError(
                f"{path}: {printable(name)!r} is not a plain tensor but {_kind(value)}"
            )
        info, (start, size) = TensorInfo(value.shape, value.dtype), _place(path, records, value)
        first, last = value.offset, value.offset + _span(value.shape, value.strides)
        # A view may repeat a few stored bytes into any shape; a copy would take all it claims.
        if max(info.nbytes, last * value.dtype.itemsize) > size or impossible(value.shape):
            raise RequestError(f"{path}: {name} claims more data than the file holds; {AGAIN}")
        infos[name], starts[name] = info, start + first * value.dtype.itemsize
        if not _in_order(value):
            strides[name] = value.strides
        storages[value.storage.key], total = size, total + info.nbytes
    # Records that overlap in the zip, and many views of one, are as large as they like.
    if sum(storages.values()) > opened.size or total > SHARED * opened.size:
        raise RequestError(f"{path} claims more data than it holds; {AGAIN}")
    refuse_odd_names(path, infos)
    return TorchFile(path, infos, opened, starts, strides, files=[path], container="torch zip")


def _state(path: Path, pickle: bytes) -> dict[Any, Any]:
    """Return the dict of tensors that a pickle describes."""
    try:
        state = walk(pickle)
    except Foreign as error:
        raise RequestError(
            f"{path} holds Python objects ({printable(error)}), not only tensors, and code in"
            " weight files is never run here; use the published file, or safetensors"
        ) from None
    except Exception as error:  # of damaged opcodes the library raises many kinds
        raise RequestError(
            f"{path} is damaged, or holds other things than tensors ({printable(error)}); {AGAIN}"
        ) from None
    for wrapper in ("model_state", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state:
        raise RequestError(f"{path} is not a dict of tensors but {type(state).__name__}")
    if len(state) > MOST_TENSORS:
        raise RequestError(
            f"{path} holds {len(state):,} tensors; at most {MOST_TENSORS:,} are read"
        )
    return state


def _kind(value: Any) -> str:
    if isinstance(value, StoredTensor):
        return str(value.dtype)
    return value.name if isinstance(value, Named) else type(value).__name__


def _readable(value: Any) -> bool:
    return isinstance(value, StoredTensor) and value.dtype in DTYPES.values()


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return how many stored values lie between a tensor's first and its last, both included."""
    if not math.prod(shape):
        return 0
    return 1 + sum((side - 1) * step for side, step in zip(shape, strides, strict=True))


def _in_order(value: StoredTensor) -> bool:
    """Return whether values lie in the order of the shape, without gaps."""
    expected = 1
    for side, step in zip(reversed(value.shape), reversed(value.strides), strict=True):
        if side != 1 and step != expected:
            return not math.prod(value.shape)
        expected *= side
    return True


# the zip


def _place(
    path: Path, records: Mapping[str, tuple[int, int]], value: StoredTensor
) -> tuple[int, int]:
    """Return the first byte of a tensor's storage in the file, and its bytes."""
    kind, key = value.storage.dtype, value.storage.key
    size = value.storage.count * (kind.itemsize if kind is not None else 1)
    start, held = records.get(key, (0, -1))
    if size > held:
        raise RequestError(
            f"{path}: its record {printable(key)} claims more data than the file holds; {AGAIN}"
        )
    return start, size


class _Bounded:
    """A file for `zipfile`, which reads a list of records as long as the file says it is."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def seekable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        if count > DIRECTORY:
            raise ValueError(f"a list of {count:,} bytes of records")
        return self._file.read(DIRECTORY if count < 0 else count)


def _records(path: Path, file: Any, size: int) -> tuple[dict[str, tuple[int, int]], bytes]:
    """Return the data records, {key: (first byte, bytes)}, and the pickle.

    Refused is what torch.save does not write: compression, foreign byte order, a second pickle.
    """
    records, pickle = dict[str, tuple[int, int]](), b""
    bounded: Any = _Bounded(file)
    with zipfile.ZipFile(bounded) as archive:
        entries = archive.infolist()
        roots = {entry.filename.partition("/")[0] for entry in entries}
        if len(roots) != 1 or len({entry.filename for entry in entries}) < len(entries):
            raise zipfile.BadZipFile
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED:  # its bytes are not the tensor's
                raise RequestError(
                    f"{path} is a compressed zip, which torch does not write; {AGAIN}"
                )
            name = entry.filename.partition("/")[2]
            begin = entry.header_offset
            if entry.file_size != entry.compress_size or begin + entry.file_size > size:
                raise zipfile.BadZipFile
            if name == "data.pkl":
                pickle = _content(path, archive, entry)
            elif name == "byteorder" and _content(path, archive, entry) != b"little":
                raise RequestError(
                    f"{path} was saved on a big-endian machine, which is not supported; save it on"
                    " a little-endian one"
                )
            elif name.startswith("data/"):
                records[name.removeprefix("data/")] = begin, entry.file_size
    if not pickle:
        raise RequestError(f"{path} is damaged, or holds other things than tensors; {AGAIN}")
    return {key: (_data(file, *place), place[1]) for key, place in records.items()}, pickle


def _content(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    if entry.file_size > LONGEST:
        raise RequestError(
            f"{path} has an index of {entry.file_size:,} bytes, far too large; {AGAIN}"
        )
    return archive.read(entry)


def _data(file: IO[bytes], begin: int, size: int) -> int:
    """Return the first byte of a record's data, behind its own header."""
    file.seek(begin)
    mark, name, extra = LOCAL.unpack(file.read(LOCAL.size))
    if mark != b"PK\x03\x04":
        raise zipfile.BadZipFile
    return begin + LOCAL.size + int(name) + int(extra)
