"""Say which weights `fsdp.shard_blocks` shards by rows, and what a shard takes.

Apart from `fsdp`, whose imports take half a second, for the plan.
"""

from __future__ import annotations

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
