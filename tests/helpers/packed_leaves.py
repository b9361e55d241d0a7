"""Fill packed leaves, as the loader does."""

from __future__ import annotations

from typing import cast

from torch import nn

from wanflow.transforms.packed import Packed, PackedLeaf


def fill_packed(leaf: nn.Module, packed: Packed) -> None:
    """Set a leaf's parameters to a tensor's; ValueError for one of another kind or shape."""
    leaf = cast(PackedLeaf, leaf)
    parts = leaf.parts(packed)
    leaf.data = nn.Parameter(parts["data"], requires_grad=False)
    leaf.scale = nn.Parameter(parts["scale"], requires_grad=False) if "scale" in parts else None
