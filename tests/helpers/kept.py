"""Count what autograd keeps of a forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


@contextmanager
def kept_by_autograd(model: nn.Module) -> Iterator[dict[int, int]]:
    """Yield {address: bytes}, filled by what a backward needs besides the model's parameters."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    held: dict[int, int] = {}
    keep = []  # or an address would be used again

    def pack(value: Tensor) -> Tensor:
        if value.data_ptr() not in own:
            held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            keep.append(value)
        return value

    with saved_tensors_hooks(pack, lambda value: value):
        yield held
