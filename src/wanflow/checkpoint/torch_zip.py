"""Files of torch.save: a mapped dict of tensors. No code in a pickle is ever run."""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wanflow.checkpoint.containers import (
    AGAIN,
    DTYPES,
    HEADER_LIMIT,
    TensorInfo,
    TensorSource,
    reading,
    refuse_odd_names,
    refuse_unreadable,
    stream_memory,
)
from wanflow.config import RequestError

# What torch lets a pickle call, no state dict has, and allocates as much as the file asks for.
MAKERS = re.compile(rb"c[\w.]+\n(bytearray|\w+Tensor)\n")


@dataclass(frozen=True)
class TorchFile(TensorSource):
    """A dict of tensors that torch.save wrote. It stays mapped; `read` copies from the mapping."""

    mapped: Mapping[str, Tensor]

    def read(
        self, name: str, dtype: torch.dtype | None = None, rows: slice | None = None
    ) -> Tensor:
        value = self.mapped[name] if rows is None else self.mapped[name][rows]
        return value.to(
            dtype or self.tensors[name].dtype, copy=True, memory_format=torch.contiguous_format
        )

    def stream(self, name: str) -> Iterator[Tensor]:
        return stream_memory(self.mapped[name])


def open_torch(path: Path) -> TorchFile:
    """Map a `.pth`: a dict of tensors, or one inside `model_state` or `state_dict`.

    Raises:
        RequestError: naming the file, for any other content, code in the pickle included.
    """
    size = refuse_unreadable(path)
    _refuse_odd_zip(path, size)
    state = _mapped_pickle(path)
    for wrapper in ("model_state", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state:
        raise RequestError(f"{path} is not a dict of tensors but {type(state).__name__}")
    mapped: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not _plain(value):
            raise RequestError(
                f"{path}: {name!r:.300} is not a plain tensor but"
                f" {getattr(value, 'dtype', type(value).__name__)}"
            )
        # A view may repeat a few stored bytes into any shape; a copy would take all it claims.
        if value.nbytes > value.untyped_storage().nbytes():
            raise RequestError(f"{path}: {name} claims more data than the file holds; {AGAIN}")
        mapped[name] = value.detach()
    # Storages that a pickle made, and did not read, are as large as it likes.
    storages = {
        storage.data_ptr(): storage.nbytes()
        for storage in map(Tensor.untyped_storage, mapped.values())
    }
    if sum(storages.values()) > size:
        raise RequestError(f"{path} claims more data than it holds; {AGAIN}")
    refuse_odd_names(path, mapped)
    infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in mapped.items()}
    return TorchFile(path, infos, mapped, files=[path], container="torch zip")


def _mapped_pickle(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":  # torch goes by that name; an open file has none
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything at all
        called = re.search(r"GLOBAL (\S+)", str(error))
        if called:
            raise RequestError(
                f"{path} holds Python objects ({called[1]}), not only tensors, and code in weight"
                " files is never run here; use the published file, or safetensors"
            ) from None
        if "unable to mmap" in str(error):  # the system promises no more memory than it has
            raise RequestError(
                f"{path} does not fit this machine's memory; a .safetensors file of the same"
                " tensors needs far less"
            ) from None
        raise RequestError(
            f"{path} is damaged, or holds other things than tensors ({type(error).__name__});"
            f" {AGAIN}"
        ) from None


def _plain(value: Any) -> bool:
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype in DTYPES.values()
        and not value.is_nested
    )


def _refuse_odd_zip(path: Path, size: int) -> None:
    """Refuse what torch.save does not write: other containers, compression, foreign byte order."""
    try:
        with reading(path), zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                _check_entry(path, archive, entry, size)
    except zipfile.BadZipFile:
        raise RequestError(
            f"{path} is not a complete file of torch.save: cut off, of another format, or from"
            f" before torch 1.6; {AGAIN}, or save it again with a newer torch"
        ) from None
    except RequestError:
        raise
    except (ValueError, RuntimeError, EOFError, struct.error) as error:
        raise RequestError(f"{path} is damaged ({error}); {AGAIN}") from None


def _check_entry(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, size: int) -> None:
    if entry.compress_type != zipfile.ZIP_STORED:  # mapped, it reads as noise
        raise RequestError(f"{path} is a compressed zip, which torch does not write; {AGAIN}")
    if entry.file_size != entry.compress_size or entry.header_offset + entry.file_size > size:
        raise zipfile.BadZipFile
    if not entry.filename.endswith(("/data.pkl", "/byteorder")):
        return
    if entry.file_size > HEADER_LIMIT:
        raise RequestError(
            f"{path} has an index of {entry.file_size:,} bytes, far too large; {AGAIN}"
        )
    content = archive.read(entry)
    if entry.filename.endswith("/byteorder") and content != b"little":
        raise RequestError(
            f"{path} was saved on a big-endian machine, which is not supported; save it on a"
            " little-endian one"
        )
    maker = MAKERS.search(content)
    if maker:
        raise RequestError(
            f"{path} is damaged or malicious: its pickle makes a {maker[1].decode()}; {AGAIN}"
        )
