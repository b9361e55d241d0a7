"""Write and read the files of a training: whole, and the same bytes for the same values.

The library of safetensors orders metadata at random, and hides which error the disk gave.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wanflow.checkpoint.containers import NAMES
from wanflow.config import RequestError
from wanflow.convert.write import TensorSpec, write_safetensors
from wanflow.files import atomic_path
from wanflow.untrusted import check_regular, printable


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file over what is there; raises what `atomic_path` raises."""
    entries = [
        TensorSpec(
            name,
            tuple(value.shape),
            NAMES[value.dtype],
            lambda value=value: iter([value.detach().cpu().contiguous()]),  # type: ignore[misc]
        )
        for name, value in tensors.items()
    ]
    with atomic_path(path, overwrite=True) as part:
        write_safetensors(part, entries, lambda count: None, metadata)


def is_whole(path: Path, name: str | None = None) -> bool:
    """Return whether a safetensors file is complete, and has a tensor of this name."""
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            return name is None or name in file.keys()  # noqa: SIM118 (it is no dict)
    except (OSError, SafetensorError, RequestError):
        return False


def read_tensor(path: Path, name: str) -> Tensor:
    """Return one tensor of a file.

    Raises:
        RequestError: if it is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor
    except (OSError, SafetensorError) as error:
        raise RequestError(
            f"{path} is damaged or gone ({printable(error, 80)}); remove it, and give the same"
            " command again"
        ) from None


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a training over what is there; raises what `atomic_path` raises."""
    with atomic_path(path, overwrite=True) as part, part.open("wb") as file:
        try:
            torch.save(dict(state), file)
        except RuntimeError as error:  # torch's writer hides the error of the file
            raise _cause(error) or error from None


def _cause(error: BaseException) -> OSError | None:
    """Return the error of the system that led to this one."""
    below: BaseException | None = error
    while below is not None and not isinstance(below, OSError):
        below = below.__cause__ or below.__context__
    return below


def read_state(path: Path, device: str) -> dict[str, Any]:
    """Return the state that `write_state` wrote.

    Raises:
        RequestError: if it is damaged, or no file.
    """
    check_regular(path)
    try:
        state = torch.load(path, weights_only=True, map_location=device)
        if isinstance(state, dict):
            return state
    except (RuntimeError, ValueError, EOFError, LookupError, OSError, pickle.UnpicklingError):
        pass
    raise RequestError(
        f"{path} is no state of a training, or is damaged; remove it to begin this expert again"
    )
