"""Containers of tensors: safetensors files and sharded folders, behind one `TensorSource`.

Opening reads headers alone, so the names, shapes and dtypes of 57 GB are known in milliseconds.
`read` costs the memory of the one tensor it returns. Files come from strangers and from broken
downloads. Any fault ends in one `RequestError` that names the file and what to do. No code in a
file ever runs, and no size in a header counts before the file's own size confirms it.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wanflow.config import RequestError, plain
from wanflow.hardware import thread_on, usable_cores
from wanflow.untrusted import open_regular, parse_json, read_bytes

if TYPE_CHECKING:
    from wanflow.transforms.packed import Packed

HEADER_LIMIT = 16 << 20  # bytes; a full-size expert's header has 0.1 MB
MOST_TENSORS = 1 << 16  # of a file or an index; a full-size expert has 1,095
MOST_SIDES = 8
LONGEST_NAME = 1000  # characters of a tensor's name
CHUNK = 4 << 20  # bytes read at a time: small enough for a cache, large enough for a disk
SERIAL = 1 << 14  # values converted at a time: below what torch spreads over threads of its own
MOST_THREADS = 16  # that read one tensor
VALUES = 1 << 20  # of a streamed piece: 4 MB in float32; larger ones leave the CPU's cache
MOST_VALUES = 1 << 48  # of a shape; torch multiplies the sides for the strides, even next to a 0
AGAIN = "download it again"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Of safetensors, and not read: what holds them.
UNREAD = {
    "F4": "fp4 weights",
    "F6_E2M3": "fp6 weights",
    "F6_E3M2": "fp6 weights",
    "F8_E4M3FNUZ": "fp8 weights of another kind",
    "F8_E5M2FNUZ": "fp8 weights of another kind",
    "C64": "complex numbers",
    **dict.fromkeys(("U16", "U32", "U64"), "packed integers"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Report = Callable[[int, int], None]  # bytes read, bytes in all


@dataclass(frozen=True)
class TensorInfo:
    """The header of a tensor.

    A packed tensor (fp8 with a scale, GGUF blocks) has a `packing`, its bytes in the file, and the
    shape of its scale if that is a tensor of its own. Its `dtype` is then what it unpacks into
    without loss.
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


@dataclass(frozen=True)
class TensorSource:
    """Named tensors on disk. It holds no open file, so threads and forks may share it.

    This class has headers only, as of a file that is not on this machine; others read.

    files: the files that hold the tensors.
    container: the format in words: "safetensors", "GGUF of wan", "torch zip".
    metadata: the header's own keys and values; empty for formats without them.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    files: Sequence[Path] = field(default=(), kw_only=True)
    container: str = field(default="safetensors", kw_only=True)
    metadata: Mapping[str, Any] = field(default_factory=dict, kw_only=True, repr=False)

    @property
    def parameters(self) -> int:
        """The number of all tensors' values."""
        return sum(math.prod(info.shape) for info in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors in the files."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        rows: slice | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Read a tensor into CPU memory of its own, as stored or converted on the way.

        Only these `rows` of the first side are read; all by default. With `out`, contiguous and
        in its shape and dtype, they are read into that.

        Raises:
            RequestError: when the file breaks off.
        """
        raise LookupError(f"{self.path} has headers only, no {name}")

    def packed(self, name: str, rows: slice | None = None) -> Packed:
        """Return a tensor whose info has a `packing`, as stored; KeyError for any other.

        Raises:
            ValueError: when a row of `rows` does not consist of complete blocks.
        """
        raise KeyError(name)

    def stream(self, name: str) -> Iterator[Tensor]:
        """Yield the values of a tensor in order: 1-D, at most `VALUES`, as stored.

        Packed tensors come unpacked, in float32. Each piece but the last holds complete blocks of
        every packed format (a multiple of 256 values), or complete rows. The next piece may
        overwrite the buffer of this one. Memory: one piece, and the packed data of a packed tensor.

        Raises:
            RequestError: when the file breaks off, or a scale is damaged.
        """
        raise LookupError(f"{self.path} has headers only, no {name}")


# reading files


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the system refuses (permission, a broken disk) into a RequestError."""
    try:
        yield
    except OSError as error:
        raise RequestError(
            f"{error.filename or path} cannot be read: {error.strerror or error}"
        ) from None


def refuse_unreadable(path: Path) -> int:
    """Return the size in bytes of a readable regular file; RequestError for anything else."""
    with reading(path):
        if not path.exists():
            raise RequestError(f"{path} is missing; {AGAIN}")
        if not path.is_file():
            raise RequestError(f"{path} is not a regular file")
    with opened_raw(path) as file:
        size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise RequestError(f"{path} is empty; {AGAIN}")
    return size


@contextmanager
def opened_raw(path: Path) -> Iterator[FileIO]:
    """Yield a regular file, unbuffered; RequestError for what cannot be read, or is none."""
    with reading(path), open_regular(path) as file:
        raw: Any = file.raw  # type: ignore[attr-defined]
        yield raw


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a small file; RequestError for any other content."""
    if refuse_unreadable(path) > HEADER_LIMIT:
        raise RequestError(f"{path} is too large for JSON that describes a model; {AGAIN}")
    try:
        return _json_object(read_bytes(path, HEADER_LIMIT))
    except ValueError as error:
        raise RequestError(f"{path} is not a JSON object ({error}); {AGAIN}") from None


def _json_object(data: bytes) -> dict[str, Any]:
    """Parse an object; ValueError for other JSON, absurd nesting, or a key that is given twice."""
    value = parse_json(data, "its text", HEADER_LIMIT)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}")
    return value


def fill(part: Tensor, file: FileIO, path: Path) -> None:
    """Fill a contiguous tensor from an unbuffered file; RequestError when the file breaks off."""
    view, done = part.view(torch.uint8).numpy().data, 0
    while done < len(view):  # one call reads at most 2 GB
        count = file.readinto(view[done:])
        if not count:
            raise RequestError(f"{path} breaks off at byte {file.tell():,}; {AGAIN}")
        done += count


def refuse_odd_names(path: Path, names: Collection[str]) -> None:
    """Raise a RequestError for a tensor name that a terminal cannot show as it is."""
    longest = max(map(len, names), default=0)
    if longest > LONGEST_NAME:
        raise RequestError(f"{path} is damaged: a tensor's name has {longest:,} letters; {AGAIN}")
    invalid = next((name for name in names if plain(name) != name), None)
    if invalid is not None:
        raise RequestError(f"{path} is damaged: a tensor is called {invalid!r}; {AGAIN}")


@dataclass(frozen=True)
class OpenedFile:
    """A file whose header was read. Its data is read later, and only if the file is the same."""

    path: Path
    size: int
    seconds: int  # of its last change

    @classmethod
    def of(cls, path: Path) -> OpenedFile:
        """Return a readable regular file; RequestError for anything else."""
        size = refuse_unreadable(path)
        with reading(path):
            return cls(path, size, int(path.stat().st_mtime))

    @contextmanager
    def at(self, start: int) -> Iterator[FileIO]:
        """Yield the file at a byte; RequestError if the file has changed or cannot be read."""
        with opened_raw(self.path) as file:
            stat = os.fstat(file.fileno())
            if (stat.st_size, int(stat.st_mtime)) != (self.size, self.seconds):
                raise RequestError(f"{self.path} has changed since it was opened; start again")
            file.seek(start)
            yield file


def impossible(shape: Sequence[int]) -> bool:
    """Return whether a shape is larger than any tensor, even where one side is 0."""
    return math.prod(max(side, 1) for side in shape) >= MOST_VALUES


def read_plain(
    opened: OpenedFile,
    info: TensorInfo,
    start: int,
    dtype: torch.dtype | None,
    rows: slice | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Read a tensor, or some rows, whose bytes begin at `start`; see `TensorSource.read`.

    Threads share a large tensor: one reader does not keep a fast disk busy.
    """
    if rows is not None:
        first, last, _ = rows.indices(info.shape[0])
        start += first * math.prod(info.shape[1:]) * info.dtype.itemsize
        info = replace(info, shape=(max(0, last - first), *info.shape[1:]))
    if out is None:
        out = torch.empty(info.shape, dtype=dtype or info.dtype)
    values = out.view(-1)

    def read_from(begin: int) -> None:
        with opened.at(start + begin * info.dtype.itemsize) as file:
            _fill_converted(values[begin : begin + step], file, opened.path, info.dtype)

    threads = 1 if info.nbytes < 2 * CHUNK else reading_threads()
    step = max(1, -(-len(values) // threads))
    if threads == 1:
        read_from(0)
    else:
        with thread_on(out.device, "wanflow-read", threads) as pool:
            list(pool.map(read_from, range(0, len(values), step)))
    return out


def _fill_converted(out: Tensor, file: FileIO, path: Path, stored: torch.dtype) -> None:
    """Fill a flat tensor with values that a file holds in another dtype, a chunk at a time.

    A chunk is converted in small pieces, which stay in a core's cache and on this thread.
    """
    if out.dtype == stored:
        fill(out, file, path)
        return
    chunk = torch.empty(min(CHUNK // stored.itemsize, len(out)), dtype=stored)
    for done in range(0, len(out), max(1, len(chunk))):
        part = chunk[: len(out) - done]
        fill(part, file, path)
        into = out[done : done + len(part)]
        torch._foreach_copy_(into.split(SERIAL), part.split(SERIAL))


def reading_threads() -> int:
    """Return how many threads read a tensor: those of all usable cores, or this one.

    Next to a CPU that computes (in a thread of its own) one must do: more would compete with it.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main and not torch.cuda.is_initialized():
        return 1
    return max(1, min(MOST_THREADS, int(usable_cores())))


def stream_plain(opened: OpenedFile, info: TensorInfo, start: int) -> Iterator[Tensor]:
    """Yield the values of a tensor whose bytes begin at `start`, see `TensorSource.stream`."""
    count = math.prod(info.shape)
    buffer = torch.empty(min(count, VALUES), dtype=info.dtype)
    with opened.at(start) as file:
        for done in range(0, count, VALUES):
            piece = buffer[: count - done]
            fill(piece, file, opened.path)
            yield piece


def stream_memory(value: Tensor) -> Iterator[Tensor]:
    """Yield the values of a tensor in memory, see `TensorSource.stream`."""
    return iter(value.flatten().split(VALUES))


def stream_packed(packed: Packed) -> Iterator[Tensor]:
    """Yield the values of a packed tensor in order, in float32: 1-D, about `VALUES` at a time."""
    return packed.stream(VALUES)


# safetensors


@dataclass(frozen=True)
class SafetensorsFile(TensorSource):
    """One `.safetensors` file.

    Data is read, not mapped: a file that shrinks meanwhile is an error, not a crash.
    """

    file: OpenedFile
    starts: Mapping[str, int]  # where each tensor's bytes begin in the file

    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        rows: slice | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        return read_plain(self.file, self.tensors[name], self.starts[name], dtype, rows, out)

    def stream(self, name: str) -> Iterator[Tensor]:
        return stream_plain(self.file, self.tensors[name], self.starts[name])


def open_safetensors(path: Path) -> SafetensorsFile:
    """Read and check the header of a safetensors file.

    Layout: 8 bytes little-endian length n, n bytes of JSON {name: {dtype, shape, data_offsets}},
        then the data without gaps.

    Raises:
        RequestError: naming the file, for a truncated, oversized, inconsistent or foreign file.
    """
    opened = OpenedFile.of(path)
    size, broken = opened.size, f"{path} is not a safetensors file, or its header is damaged"
    with opened_raw(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > HEADER_LIMIT:
            raise RequestError(f"{broken}; {AGAIN}")
        if 8 + length > size:
            raise RequestError(
                f"{path} is cut off: its header of {length:,} bytes does not fit into {size:,};"
                f" {AGAIN}"
            )
        text = file.read(length)
    try:
        header = _json_object(text)
        _refuse_unread(path, header)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is not an object")
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not all text")
        tensors, starts, end = _layout(header)
    except _UnreadError:
        raise
    except ValueError as error:
        raise RequestError(f"{broken} ({error}); {AGAIN}") from None
    if 8 + length + end != size:
        state = "cut off" if 8 + length + end > size else "longer than it should be"
        raise RequestError(
            f"{path} is {state}: {size:,} bytes, and its header describes {8 + length + end:,};"
            f" {AGAIN}"
        )
    refuse_odd_names(path, tensors)
    starts = {name: 8 + length + start for name, start in starts.items()}
    return SafetensorsFile(path, tensors, opened, starts, files=[path], metadata=metadata)


class _UnreadError(RequestError):
    """A sound file, in a format that wanflow does not read."""


def _refuse_unread(path: Path, header: dict[str, Any]) -> None:
    for name, entry in header.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if isinstance(dtype, str) and dtype in UNREAD:
            raise _UnreadError(
                f"{path} holds {UNREAD[dtype]} ({name} has the dtype {dtype!r}), which wanflow does"
                " not read; take an fp8 file with float32 scales, GGUF, or one of 16 or 32 bits"
            )


def _layout(header: dict[str, Any]) -> tuple[dict[str, TensorInfo], dict[str, int], int]:
    """Return infos, first bytes and total bytes in a header; ValueError for gaps or overlaps."""
    tensors: dict[str, TensorInfo] = {}
    starts: dict[str, int] = {}
    spans = []
    if len(header) > MOST_TENSORS:
        raise ValueError(f"it names {len(header):,} tensors, and at most {MOST_TENSORS:,} are read")
    for name, entry in header.items():
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise ValueError(f"{name} is not described")
        dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {dtype!r}; known are {', '.join(DTYPES)}")
        if not (_counts(shape) and _counts(span) and len(span) == 2):
            raise ValueError(f"{name} has a shape or offsets that are not lists of counts")
        if impossible(shape):
            raise ValueError(f"{name} has an impossible shape")
        info = TensorInfo(tuple(shape), DTYPES[dtype])
        if span[1] - span[0] != info.nbytes:
            raise ValueError(f"{name} takes {info.nbytes:,} bytes and has {span[1] - span[0]:,}")
        tensors[name], starts[name] = info, span[0]
        spans.append((span[0], span[1]))
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError("its tensors overlap or leave gaps")
        end = stop
    return tensors, starts, end


def _counts(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MOST_SIDES
        and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
    )
