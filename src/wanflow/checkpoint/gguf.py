"""Read GGUF files: GGML's tensors, packed or plain, behind a list of keys and values.

Layout, all little-endian: the bytes "GGUF", version (u32), counts of tensors and of keys (u64); for
each key its name, the type of its value (u32) and the value; for each tensor its name, the number
of its sides (u32), the sides (u64, innermost first), the type of its data (u32) and its offset
(u64, from the first multiple of the alignment after this list); then the data. A string is its
length (u64) and its bytes. An array is the type of its items (u32), their count (u64) and the
items.

The reader of the `gguf` package takes ten seconds for the tokenizer in a T5 file, and hangs on an
array that claims to be long. This reader takes a header in growing pieces, trusts no count beyond
the file's size, and skips arrays until `array` asks for one.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wanflow.checkpoint.containers import (
    AGAIN,
    DTYPES,
    OpenedFile,
    TensorInfo,
    TensorSource,
    fill,
    impossible,
    read_plain,
    refuse_odd_names,
    stream_packed,
    stream_plain,
)
from wanflow.config import RequestError, plain
from wanflow.transforms.ggml import LAYOUTS
from wanflow.transforms.packed import Packed

VERSIONS = (2, 3)
LIMIT = 32 << 20  # bytes before the data; a T5 file with its tokenizer has 7 MB
MOST = 1 << 16  # keys, tensors, bytes of a name
MOST_SIDES = 8
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."

# Types of metadata values, by number.
SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
STRING, ARRAY = 8, 9
INTEGERS = (0, 1, 2, 3, 4, 5, 10, 11)

# Types of tensors, by number.
TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
PLAIN = {kind: DTYPES[kind] for kind in ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8")}


def ggml_bytes(kind: str, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor of a GGML type.

    Raises:
        ValueError: for an unknown type, or a last side that is not a multiple of the block.
    """
    if kind in PLAIN:
        return math.prod(shape) * PLAIN[kind].itemsize
    if kind not in LAYOUTS:
        raise ValueError(f"type {kind} is unknown; known are {', '.join((*PLAIN, *LAYOUTS))}")
    layout = LAYOUTS[kind]
    if not shape or shape[-1] % layout.values:
        raise ValueError(
            f"rows of {list(shape)} are no multiple of {layout.values} values, {kind}'s block"
        )
    return math.prod(shape) // layout.values * layout.nbytes


class Array(NamedTuple):
    """The place of an array: type and number of its items, first byte, first byte after it."""

    kind: int
    length: int
    start: int
    stop: int


@dataclass(frozen=True)
class GGUFFile(TensorSource):
    """One `.gguf` file.

    Data is read, not mapped: a file that shrinks meanwhile is an error, not a crash.

    metadata: numbers, booleans, strings; of an array only its place, which `array` reads.
    starts: the first byte of each tensor in the file.
    """

    file: OpenedFile
    starts: Mapping[str, int] = field(repr=False)

    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        rows: slice | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        info = self.tensors[name]
        if not info.packing:
            return read_plain(self.file, info, self.starts[name], dtype, rows, out)
        if rows is not None and math.prod(info.shape[1:]) % LAYOUTS[info.packing].values:
            value = self.packed(name).dense(dtype or info.dtype)[rows]
        else:
            value = self.packed(name, rows).dense(dtype or info.dtype)
        return value if out is None else out.copy_(value)

    def packed(self, name: str, rows: slice | None = None) -> Packed:
        info = self.tensors[name]
        if not info.packing:
            raise KeyError(name)
        kind, layout, start = info.packing, LAYOUTS[info.packing], self.starts[name]
        if rows is not None:
            first, last, _ = rows.indices(info.shape[0])
            blocks, rest = divmod(math.prod(info.shape[1:]), layout.values)
            if rest:
                raise ValueError(f"a row of {list(info.shape)} is no multiple of {kind}'s block")
            start += first * blocks * layout.nbytes
            shape = (max(0, last - first), *info.shape[1:])
            info = replace(info, shape=shape, packed_bytes=shape[0] * blocks * layout.nbytes)
        data = torch.empty(info.packed_bytes, dtype=torch.uint8)
        with self.file.at(start) as file:
            fill(data, file, self.path)
        row = layout.nbytes  # one block, for a tensor that is stored in another shape
        if info.shape[-1] and not info.shape[-1] % layout.values:
            row *= info.shape[-1] // layout.values
        return Packed(kind, info.shape, data.view(-1, row) if len(data) else data.view(0, row))

    def stream(self, name: str) -> Iterator[Tensor]:
        info = self.tensors[name]
        if info.packing:
            return stream_packed(self.packed(name))
        return stream_plain(self.file, info, self.starts[name])

    def array(self, key: str) -> list[Any]:
        """Return the items of an array; RequestError for one that is missing or damaged."""
        place = self.metadata.get(key)
        if not isinstance(place, Array):
            raise RequestError(f"{self.path} has no list {key}; {AGAIN}")
        data = bytearray(place.stop - place.start)
        with self.file.at(place.start) as file:
            if data:
                fill(torch.frombuffer(data, dtype=torch.uint8), file, self.path)
        try:
            if place.kind != STRING:
                return [value for (value,) in SCALARS[place.kind].iter_unpack(data)]
            return _strings(data, place.length)
        except (ValueError, struct.error) as error:
            raise RequestError(f"{self.path} is damaged ({key}: {error}); {AGAIN}") from None


def _strings(data: bytearray, count: int) -> list[str]:
    found, at = [], 0
    for _ in range(count):
        end = at + 8 + int.from_bytes(data[at : at + 8], "little")
        if at + 8 > len(data) or end > len(data):
            raise ValueError("its lengths have changed")
        found.append(data[at + 8 : end].decode())
        at = end
    return found


def open_gguf(path: Path) -> GGUFFile:
    """Read and check the header of a GGUF file, without its tensors and arrays.

    Raises:
        RequestError: naming the file, for a truncated, inconsistent or foreign file, or tensors of
            an unknown type.
    """
    opened = OpenedFile.of(path)
    with opened.at(0) as file:
        try:
            return _open(opened, _Header(file, opened.size))
        except RequestError:
            raise
        except _CutOff as error:
            raise RequestError(
                f"{path} is cut off, or its header is damaged ({error}); {AGAIN}"
            ) from None
        except ValueError as error:
            raise RequestError(
                f"{path} is not a GGUF file, or its header is damaged ({error}); {AGAIN}"
            ) from None


class _CutOff(ValueError):
    """The header describes more than the file has."""


class _Header:
    """The first bytes of a file, read on demand: at most twice what was asked for."""

    def __init__(self, file: FileIO, size: int) -> None:
        self.file, self.size = file, size
        self.data, self.at = b"", 0

    def need(self, count: int) -> None:
        """Read until the next `count` bytes are in memory; ValueError for a shorter file."""
        end = self.at + count
        if end > self.size:
            raise _CutOff(f"it needs byte {min(end, 1 << 63):,} of {self.size:,}")
        if end > LIMIT:
            raise ValueError(f"it is longer than {LIMIT:,} bytes")
        goal = min(max(end, 2 * len(self.data), 1 << 16), self.size, LIMIT)
        while len(self.data) < end:
            piece = self.file.read(goal - len(self.data))
            if not piece:
                raise _CutOff(f"it ends at byte {len(self.data):,}")
            self.data += piece

    def take(self, form: struct.Struct) -> Any:
        self.need(form.size)
        (value,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return value

    def u32(self) -> int:
        return int(self.take(SCALARS[4]))

    def u64(self) -> int:
        return int(self.take(SCALARS[10]))

    def count(self, what: str, most: int, each: int) -> int:
        """Read a count of things of at least `each` bytes."""
        count = self.u64()
        if count > most:
            raise ValueError(f"it claims {count:,} {what}")
        self.need(count * each)
        return count

    def string(self, what: str, most: int = LIMIT) -> str:
        length = self.count(f"bytes of {what}", most, 1)
        text = self.data[self.at : self.at + length]
        self.at += length
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{what} is no UTF-8 text") from None

    def array(self) -> Array:
        """Skip an array and return its place."""
        kind = self.u32()
        if kind != STRING and kind not in SCALARS:
            raise ValueError(
                "it holds lists of lists"
                if kind == ARRAY
                else f"it holds values of an unknown type {kind}"
            )
        count = self.count("items of a list", LIMIT, 8 if kind == STRING else SCALARS[kind].size)
        start = self.at
        if kind == STRING:
            self._skip_strings(count)
        else:
            self.at += count * SCALARS[kind].size
        return Array(kind, count, start, self.at)

    def _skip_strings(self, count: int) -> None:
        # The one long loop of a header: 256,384 turns for UMT5's words, hence only locals.
        length_at = SCALARS[10].unpack_from
        while count:
            self.need(8)
            data, at, turn = self.data, self.at, 0
            try:
                for turn in range(count):  # noqa: B007
                    at += 8 + length_at(data, at)[0]
                turn = count
            except (struct.error, OverflowError):  # beyond the bytes in memory, or the file
                pass
            self.at, count = at, count - turn
        self.need(0)


def _open(opened: OpenedFile, header: _Header) -> GGUFFile:
    path = opened.path
    header.need(24)
    if header.data[:4] != b"GGUF":
        raise ValueError(f"it begins {header.data[:4]!r}")
    header.at = 4
    version = header.u32()
    if version and not version & 0xFFFF:
        raise RequestError(
            f"{path} is a big-endian GGUF file; take a little-endian one, which is the usual form"
        )
    if version not in VERSIONS:
        raise RequestError(
            f"{path} is a GGUF file of version {version}; versions"
            f" {' and '.join(map(str, VERSIONS))} are supported"
        )
    # At least: a name's length, sides, type, place; a name's length, type, value.
    tensors, keys = header.count("tensors", MOST, 24), header.count("keys", MOST, 13)
    metadata = _metadata(header, keys)
    entries = _entries(header, tensors)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {alignment!r}")
    first = -(-header.at // alignment) * alignment
    unread = {
        entry.kind: name
        for name, entry in entries.items()
        if entry.kind not in PLAIN and entry.kind not in LAYOUTS
    }
    if unread:
        types = ", ".join(f"{kind} ({name})" for kind, name in unread.items())
        raise RequestError(
            f"{path} has tensors of the unsupported type {types}; supported are"
            f" {', '.join((*PLAIN, *LAYOUTS))}"
        )
    infos, spans = {}, []
    for name, entry in entries.items():
        nbytes = ggml_bytes(entry.kind, entry.shape)
        if entry.start % alignment:
            raise ValueError(f"{name} begins off the alignment of {alignment}")
        if first + entry.start + nbytes > header.size:
            raise _CutOff(
                f"{name} ends at byte {min(first + entry.start + nbytes, 1 << 63):,} of"
                f" {header.size:,}"
            )
        shape = _original(header, metadata.get(ORIGINAL_SHAPE + name), name, entry.shape)
        packed = entry.kind in LAYOUTS
        infos[name] = (
            TensorInfo(shape, torch.float32, entry.kind, nbytes)
            if packed
            else TensorInfo(shape, PLAIN[entry.kind])
        )
        spans.append((entry.start, entry.start + nbytes, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start < end:
            raise ValueError(f"{name} overlaps another tensor")
        end = stop
    refuse_odd_names(path, infos)
    architecture = metadata.get("general.architecture")
    words = plain(architecture) if isinstance(architecture, str) else ""
    return GGUFFile(
        path,
        infos,
        opened,
        {name: first + entry.start for name, entry in entries.items()},
        files=[path],
        container=f"GGUF of {words or 'no architecture'}",
        metadata=metadata,
    )


def _metadata(header: _Header, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = header.string("a key", MOST)
        if key in metadata:
            raise ValueError(f"the key {key!r} is given twice")
        kind = header.u32()
        if kind == ARRAY:
            metadata[key] = header.array()
        elif kind == STRING:
            metadata[key] = header.string(key)
        elif kind in SCALARS:
            metadata[key] = header.take(SCALARS[kind])
        else:
            raise ValueError(f"{key} has an unknown type {kind}")
    return metadata


class _Entry(NamedTuple):
    kind: str
    shape: tuple[int, ...]  # as stored, outermost side first
    start: int  # from the first byte of all data


def _entries(header: _Header, count: int) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for _ in range(count):
        name = header.string("a tensor's name", MOST)
        if name in entries:
            raise ValueError(f"the tensor {name!r} is given twice")
        rank = header.u32()
        if rank > MOST_SIDES:
            raise ValueError(f"{name} has {rank:,} sides")
        shape = tuple(header.u64() for _ in range(rank))[::-1]
        if impossible(shape):
            raise ValueError(f"{name} has an impossible shape")
        kind = header.u32()
        entries[name] = _Entry(TYPES.get(kind, f"number {kind}"), shape, header.u64())
    return entries


def _original(header: _Header, place: Any, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the original shape of a tensor that ComfyUI's converter reshaped.

    It does so for 5-D tensors, and for rows that are not a multiple of the block.
    """
    if place is None:
        return shape
    if not isinstance(place, Array) or place.kind not in INTEGERS or place.length > MOST_SIDES:
        raise ValueError(f"the original shape of {name} is no list of sides")
    original = tuple(
        value for (value,) in SCALARS[place.kind].iter_unpack(header.data[place.start : place.stop])
    )
    if (
        min(original, default=1) < 0
        or math.prod(original) != math.prod(shape)
        or impossible(original)
    ):
        raise ValueError(f"{name} is stored as {list(shape)} and was {list(original)}")
    return original
