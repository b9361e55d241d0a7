"""Adapters on a loaded model: LoRA and its relatives, live next to the weights.

`Adapters` attaches the deltas of files to a model and keeps them apart from it: strengths change,
and adapters come off again, while the model stays loaded.

The weight of a matmul is never touched. Its leaf is wrapped in `LoRALinear`, which adds the
low-rank product to the leaf's output, so any base does, packed ones too. Small tensors (biases,
norms, modulation, the patch embedding) are overwritten and their originals stored.

Strength is a tensor that compiled code reads, so a new value compiles nothing. That includes 0: 0
times a finite product adds exactly nothing, and the output equals the base's bit for bit. `remove`
frees the memory and unwraps, which is other code: compiled blocks compile once more, unless they
ran bare before. `set_strength(name, 0)` is the removal that compiled code does not notice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanflow.config import RequestError
from wanflow.models.dit import Linear32
from wanflow.transforms.deltas import (
    Additive,
    Difference,
    LowRank,
    Replacement,
    Shape,
    WeightDelta,
    changed,
    shape_error,
)


class LoRAWeights(nn.Module):
    """A delta on a device: its tensors as parameters, and its strength, [] float32.

    Parameters are frozen; a trainer thaws `up` and `down`. Low-rank factors are held in `dtype`,
    with the scale in `up`; differences and replacements too. Other factors are held in float32,
    because their product is rounded once more.
    """

    up: Tensor  # of LowRank
    down: Tensor
    strength: Tensor

    def __init__(
        self, delta: WeightDelta, strength: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        if isinstance(delta, LowRank):
            delta = replace(delta, up=delta.scale * delta.up.float(), scale=1.0)
            if delta.mid is not None and math.prod(delta.mid.shape[2:]) == 1:
                delta = LowRank(delta.up.flatten(1) @ delta.mid.float().flatten(1), delta.down)
            if delta.mid is None:
                delta = LowRank(delta.up.flatten(1), delta.down.flatten(1))
        elif not isinstance(delta, Difference | Replacement):
            dtype = torch.float32
        self.kind: type[Any] = type(delta)
        self.names = tuple(item.name for item in fields(delta))
        for name in self.names:
            value = getattr(delta, name)
            if isinstance(value, Tensor):
                # Copy even without a conversion: other slots may share the file's tensors.
                copy = value.detach().to(device, dtype, copy=True).contiguous()
                value = nn.Parameter(copy, requires_grad=False)
            elif isinstance(value, Additive):
                value = LoRAWeights(value, 1.0, dtype, device)
            setattr(self, name, value)
        self.register_buffer(
            "strength", torch.tensor(strength, dtype=torch.float32, device=device), persistent=False
        )

    def delta(self) -> WeightDelta:
        """Return the delta, of this module's own tensors."""
        values = [getattr(self, name) for name in self.names]
        parts = [value.delta() if isinstance(value, LoRAWeights) else value for value in values]
        return cast(WeightDelta, self.kind(*parts))


class LoRALinear(nn.Module):
    """A leaf and its LoRAs: the leaf's output plus that of each slot, in the order attached."""

    def __init__(self, leaf: nn.Module) -> None:
        super().__init__()
        self.leaf = leaf
        self.slots = nn.ModuleDict()

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that the leaf computes in."""
        if isinstance(self.leaf, Linear32):
            return torch.float32
        return cast(torch.dtype, getattr(self.leaf, "compute_dtype", None) or self.weight.dtype)

    @property
    def weight(self) -> Tensor:
        """The leaf's own, where it has one."""
        return cast(Tensor, self.leaf.weight)

    @property
    def bias(self) -> Tensor | None:
        """The leaf's own."""
        return cast("Tensor | None", self.leaf.bias)

    def forward(self, x: Tensor) -> Tensor:
        slots = cast("list[LoRAWeights]", list(self.slots.values()))
        if any(slot.kind is not LowRank for slot in slots):
            return self._through_weight(x, slots)
        y: Tensor = self.leaf(x)
        h = x.to(self.compute_dtype)
        for slot in slots:
            # Strength scales the narrow side, and the matmul adds to the leaf's output where no
            # gradient asks for it: a wide temporary takes 2 GB at 720p.
            narrow = F.linear(h, slot.down.to(h.dtype)) * slot.strength
            wide = y.reshape(-1, y.shape[-1])
            add = wide.addmm if torch.is_grad_enabled() else wide.addmm_
            y = add(narrow.reshape(-1, narrow.shape[-1]), slot.up.to(h.dtype).mT).view(y.shape)
        return y

    def _through_weight(self, x: Tensor, slots: Iterable[LoRAWeights]) -> Tensor:
        """The output of the changed weight, made for each call.

        For deltas that need the weight, or that are no product of thin factors.
        """
        dtype = self.compute_dtype
        leaf: Any = self.leaf
        packed = hasattr(leaf, "dense")
        weight: Tensor = leaf.dense(torch.float32) if packed else leaf.weight.float()
        new = weight
        for slot in slots:
            new = changed(new, slot.delta(), slot.strength)
        h = x.to(dtype)
        if packed:
            # Its own matmul may round in another way than a plain one; we add the difference.
            return cast(Tensor, leaf(x)) + F.linear(h, (new - weight).to(dtype))
        return F.linear(h, new.to(dtype), None if self.bias is None else self.bias.to(dtype))


@dataclass
class _Attached:
    """One adapter: its slots on leaves and its deltas of small tensors, by parameter name."""

    key: str  # of its slots in ModuleDicts, where names must not hold dots
    strength: float
    slots: dict[str, LoRAWeights] = field(default_factory=dict)
    patches: dict[str, LoRAWeights] = field(default_factory=dict)


class Adapters:
    """The adapters of one model, applied in the order they were attached.

    Attach them to loaded weights: wrapped leaves have other parameter names. Tensors go to their
    leaf's device.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._attached: dict[str, _Attached] = {}
        self._originals: dict[str, Tensor] = {}  # of the small tensors that adapters change
        self._count = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Of the attached adapters, in order."""
        return tuple(self._attached)

    def slots(self, name: str) -> Mapping[str, LoRAWeights]:
        """Return an adapter's slots by parameter name: what a trainer trains and saves."""
        return dict(self._find(name).slots)

    def attach(self, name: str, deltas: Mapping[str, WeightDelta], strength: float = 1.0) -> None:
        """Apply deltas, by the parameter names of the official model; all of them or none.

        Raises:
            RequestError: for a name in use, a strength that is not finite, a missing parameter, or
                a shape that does not fit.
        """
        if name in self._attached:
            raise RequestError(
                f"adapter {name!r} is attached already; remove it first, or choose another name"
            )
        _check_strength(strength)
        for key, delta in deltas.items():
            error = shape_error(delta, self._shape(key))
            if error:
                raise RequestError(f"adapter {name!r}: {key}: {error}")
        if any(parameter.is_meta for parameter in self.model.parameters()):
            raise RuntimeError("adapters need loaded weights, and some of this model's are on meta")
        self._count += 1
        attached = self._attached[name] = _Attached(str(self._count), strength)
        for key, delta in deltas.items():
            if _is_leaf_weight(self._owner(key), key):
                attached.slots[key] = self._add_slot(key, delta, attached)
            else:
                parameter = self._parameter(key)
                patch = LoRAWeights(delta, strength, torch.float32, parameter.device)
                attached.patches[key] = patch
                self._originals.setdefault(key, parameter.detach().clone())
        self._patch(attached.patches)

    def set_strength(self, name: str, value: float) -> None:
        """Set an adapter's strength, without compiling again.

        Raises:
            RequestError: for an adapter that is not attached, or a value that is not finite.
        """
        attached = self._find(name)
        _check_strength(value)
        if value == attached.strength:
            return
        attached.strength = value
        for slot in attached.slots.values():
            # In place: compiled code holds this tensor, and each slot has its own after a move.
            slot.strength.fill_(value)
        self._patch(attached.patches)

    def remove(self, name: str) -> None:
        """Take an adapter off: the model equals what it was without it, bit for bit.

        Raises:
            RequestError: for an adapter that is not attached.
        """
        attached = self._find(name)
        del self._attached[name]
        for key in attached.slots:
            path = key.rpartition(".")[0]
            wrapper = cast(LoRALinear, self.model.get_submodule(path))
            del wrapper.slots[attached.key]
            if not len(wrapper.slots):
                self._replace(path, wrapper.leaf)
        self._patch(attached.patches)
        for key in attached.patches:
            if not any(key in other.patches for other in self._attached.values()):
                del self._originals[key]

    def _find(self, name: str) -> _Attached:
        if name not in self._attached:
            raise RequestError(
                f"no adapter is named {name!r}; attached are {', '.join(self._attached) or 'none'}"
            )
        return self._attached[name]

    def _owner(self, key: str) -> nn.Module:
        """The module that has a parameter: the leaf, where it is wrapped."""
        try:
            owner = self.model.get_submodule(key.rpartition(".")[0])
        except AttributeError:
            raise RequestError(f"the model has no parameter {key}") from None
        return owner.leaf if isinstance(owner, LoRALinear) else owner

    def _parameter(self, key: str) -> Tensor:
        value = getattr(self._owner(key), key.rpartition(".")[2], None)
        if not isinstance(value, Tensor):
            raise RequestError(f"the model has no parameter {key}")
        return value

    def _shape(self, key: str) -> Shape:
        owner: Any = self._owner(key)
        if _is_leaf_weight(owner, key):
            return owner.out_features, owner.in_features
        return tuple(self._parameter(key).shape)

    def _add_slot(self, key: str, delta: WeightDelta, attached: _Attached) -> LoRAWeights:
        path = key.rpartition(".")[0]
        wrapper = self.model.get_submodule(path)
        if not isinstance(wrapper, LoRALinear):
            wrapper = LoRALinear(wrapper)
            self._replace(path, wrapper)
        tensors = (*wrapper.leaf.parameters(), *wrapper.leaf.buffers())
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        slot = LoRAWeights(delta, attached.strength, wrapper.compute_dtype, device)
        wrapper.slots[attached.key] = slot
        return slot

    def _replace(self, path: str, module: nn.Module) -> None:
        parent, _, child = path.rpartition(".")
        module.train(self.model.get_submodule(path).training)
        setattr(self.model.get_submodule(parent), child, module)

    @torch.no_grad()
    def _patch(self, keys: Iterable[str]) -> None:
        """Write small tensors again, from their originals and every adapter that changes them."""
        for key in keys:
            parameter, original = self._parameter(key), self._originals[key]
            value = original.to(parameter.device).float()
            for attached in self._attached.values():
                if key in attached.patches and attached.strength:
                    delta = attached.patches[key].to(value.device).delta()
                    value = changed(value, delta, attached.strength)
            parameter.copy_(value)


def _is_leaf_weight(owner: nn.Module, key: str) -> bool:
    return (
        key.endswith(".weight") and hasattr(owner, "in_features") and hasattr(owner, "out_features")
    )


def _check_strength(strength: float) -> None:
    if not math.isfinite(strength):
        raise RequestError(f"adapter strength {strength}: expected a finite number")
