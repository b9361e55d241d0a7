"""Files of torch.save: a mapped dict of tensors. No code in a pickle is ever run."""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from wanflow.checkpoint.containers import (
    AGAIN,
    DTYPES,
    HEADER_LIMIT,
    TensorInfo,
    reading,
    refuse_odd_names,
    refuse_unreadable,
    stream_memory,
)
from wanflow.config import RequestError
from wanflow.transforms.packed import Packed

# What torch lets a pickle call, no state dict has, and makes as much memory as it is told to.
MAKERS = re.compile(rb"c[\w.]+\n(bytearray|\w+Tensor)\n")


@dataclass(frozen=True)
class TorchFile:
    """A dict of tensors that torch.save wrote. It stays mapped; `read` copies out of the
    mapping.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    mapped: Mapping[str, Tensor]
    container = "torch zip"

    @property
    def files(self) -> Sequence[Path]:
        return [self.path]

    @property
    def metadata(self) -> Mapping[str, str]:
        return {}

    def read(
        self, name: str, dtype: torch.dtype | None = None, rows: slice | None = None
    ) -> Tensor:
        value = self.mapped[name] if rows is None else self.mapped[name][rows]
        return value.to(
            dtype or self.tensors[name].dtype, copy=True, memory_format=torch.contiguous_format
        )

    def packed(self, name: str, rows: slice | None = None) -> Packed:
        raise KeyError(name)  # nothing here is packed

    def stream(self, name: str) -> Iterator[Tensor]:
        return stream_memory(self.mapped[name])


def open_torch(path: Path) -> TorchFile:
    """Map a `.pth`: a dict of tensors, or one inside `model_state` or `state_dict`. Code in the
    pickle is refused, not run.

    Raises:
        RequestError: naming the file, for anything else.
    """
    size = refuse_unreadable(path)
    _refuse_odd_zip(path, size)
    try:
        if path.suffix == ".safetensors":  # torch goes by that name; an open file has none
            with path.open("rb") as file:
                state = torch.load(file, map_location="cpu", weights_only=True)
        else:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything at all
        if called := re.search(r"GLOBAL (\S+)", str(error)):
            raise RequestError(
                f"{path} holds Python objects ({called[1]}), not only tensors, and code in weight"
                " files is never run here; use the published file, or safetensors"
            ) from None
        if "unable to mmap" in str(
            error
        ):  # not the file's fault: the system promises no more memory than it has
            raise RequestError(
                f"{path} does not fit this machine's memory; a .safetensors file of the same"
                " tensors needs far less"
            ) from None
        raise RequestError(
            f"{path} is damaged, or holds something else than tensors ({type(error).__name__});"
            f" {AGAIN}"
        ) from None
    for wrapper in ("model_state", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state:
        raise RequestError(f"{path} is not a dict of tensors but {type(state).__name__}")
    mapped: dict[str, Tensor] = {}
    for name, value in state.items():
        if (
            not isinstance(name, str)
            or type(value) not in (Tensor, nn.Parameter)
            or not _stored(value)
        ):
            raise RequestError(
                f"{path}: {name!r:.300} is not a plain tensor but"
                f" {getattr(value, 'dtype', type(value).__name__)}"
            )
        # A view may repeat a few stored bytes into any shape; copied out it would take what it
        # claims.
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise RequestError(f"{path}: {name} claims more data than the file holds; {AGAIN}")
        mapped[name] = value.detach()
    # Storages that a pickle had made, not read, are as large as it likes.
    if (
        sum(
            {
                value.data_ptr(): value.nbytes()
                for value in map(Tensor.untyped_storage, mapped.values())
            }.values()
        )
        > size
    ):
        raise RequestError(f"{path} claims more data than it holds; {AGAIN}")
    refuse_odd_names(path, mapped)
    return TorchFile(
        path,
        {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in mapped.items()},
        mapped,
    )


def _stored(value: Tensor) -> bool:
    return (
        value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype in DTYPES.values()
        and not value.is_nested
    )


def _refuse_odd_zip(path: Path, size: int) -> None:
    """Refuse what torch.save does not write: other containers, compression (mapped, it reads as
    noise), foreign byte order.
    """
    try:
        with reading(path), zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise RequestError(
                        f"{path} is a compressed zip, which torch does not write; {AGAIN}"
                    )
                if (
                    entry.file_size != entry.compress_size
                    or entry.header_offset + entry.file_size > size
                ):
                    raise zipfile.BadZipFile
                if (
                    entry.filename.endswith(("/data.pkl", "/byteorder"))
                    and entry.file_size > HEADER_LIMIT
                ):
                    raise RequestError(
                        f"{path} has an index of {entry.file_size:,} bytes, far too large; {AGAIN}"
                    )
                if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                    raise RequestError(
                        f"{path} was saved on a big-endian machine, which is not read here"
                    )
                if entry.filename.endswith("/data.pkl") and (
                    maker := MAKERS.search(archive.read(entry))
                ):
                    raise RequestError(
                        f"{path} is damaged, or made to do harm: it would have {maker[1].decode()}"
                        f" made; {AGAIN}"
                    )
    except RequestError:
        raise
    except zipfile.BadZipFile:
        raise RequestError(
            f"{path} is not a whole file of torch.save: cut off, of another format, or from before"
            f" torch 1.6; {AGAIN}, or save it anew"
        ) from None
    except (ValueError, RuntimeError, EOFError, struct.error) as error:
        raise RequestError(f"{path} is damaged ({error}); {AGAIN}") from None
