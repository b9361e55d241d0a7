"""The rows of a sharded weight (`fsdp.shard_blocks`): which are this rank's, and writing them.

Apart from `fsdp`, whose imports take half a second: every run asks, and few runs shard weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def rows_of(leaf: nn.Module) -> list[nn.Parameter]:
    """Return a matmul's parameters with a row per output feature: weight, or data and scales.

    Each rank holds some of these rows. Everything else, the bias too, is complete on all ranks.
    """
    if not hasattr(leaf, "in_features"):
        return []
    return [
        value
        for name, value in leaf.named_parameters(recurse=False)
        if name != "bias" and value.ndim and len(value) == leaf.out_features
    ]


def shard_bytes(value: Tensor, size: int) -> int:
    """Return the bytes of one of `size` shards; FSDP pads the last ones to an equal length."""
    return -(-len(value) // size) * value[0].nbytes


def own_rows(holder: nn.Module, key: str) -> slice | None:
    """Return the rows of a tensor that this rank holds; None where it holds all.

    Args:
        holder, key: the module and the tensor's name in it. A packed or rounded weight has the
            rows of its data.
    """
    parameter: Any = getattr(holder, key, None)
    if parameter is None:
        parameter = getattr(holder, "data", None)
    if not is_sharded(parameter):
        return None
    mesh, rows = parameter.device_mesh, len(parameter)
    length = -(-rows // mesh.size())
    start = min(rows, length * mesh.get_local_rank())
    return slice(start, min(rows, start + length))


def write_param(holder: nn.Module, key: str, value: Tensor, device: torch.device | str) -> None:
    """Write a value, or this rank's rows of it, into a module's parameter."""
    parameter: Any = getattr(holder, key)
    if is_sharded(parameter):
        parameter.to_local().copy_(value)
    else:
        setattr(holder, key, nn.Parameter(value.to(device), requires_grad=False))


def is_sharded(parameter: object) -> bool:
    """Return whether it is a DTensor."""
    return hasattr(parameter, "device_mesh")
