"""A process' rows of a weight that is shared out over several (`fsdp.share_out`): which they are,
and how they are put in place.

Apart from `fsdp`, whose imports take half a second, because every run asks and few have such
weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def rows_of(leaf: nn.Module) -> list[nn.Parameter]:
    """What a matmul has for each of its output features, but for the bias: its weight, or packed
    data and their scales.

    Of these each process keeps some rows; everything else is whole on all.
    """
    if not hasattr(leaf, "in_features"):
        return []
    own = leaf.named_parameters(recurse=False)
    return [
        value
        for name, value in own
        if name != "bias" and value.ndim and len(value) == leaf.out_features
    ]


def share(value: Tensor, size: int) -> int:
    """Bytes of a tensor that one of `size` processes keeps, as FSDP cuts it: as many rows on all,
    the last ones filled up.
    """
    return -(-len(value) // size) * value[0].nbytes


def own_rows(holder: nn.Module, key: str) -> slice | None:
    """The rows of a tensor that this process keeps, as FSDP cuts them; None where all of it is
    kept.

    Args:
        holder, key: the module and the tensor's name there; a packed or rounded weight goes by the
            rows of its data.
    """
    parameter: Any = getattr(holder, key, None)
    if parameter is None:
        parameter = getattr(holder, "data", None)
    if not is_shared(parameter):
        return None
    mesh, rows = parameter.device_mesh, len(parameter)
    share = -(-rows // mesh.size())
    start = min(rows, share * mesh.get_local_rank())
    return slice(start, min(rows, start + share))


def place(holder: nn.Module, key: str, value: Tensor, device: torch.device | str) -> None:
    """Put a value, or this process' rows of it, in its place in a module."""
    parameter: Any = getattr(holder, key)
    if is_shared(parameter):
        parameter.to_local().copy_(value)
    else:
        setattr(holder, key, nn.Parameter(value.to(device), requires_grad=False))


def is_shared(parameter: object) -> bool:
    """Whether it is a DTensor."""
    return hasattr(parameter, "device_mesh")
