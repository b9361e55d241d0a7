"""Adapters on a loaded model: LoRA and its relatives, fused into a weight or live beside it.

A `Change` is a value: what one file does to one parameter. `changed` applies it to a weight, for
fusing. `Adapters` attaches whole files to a model and keeps them apart from it: their strengths
move, and they come off again, without the model being loaded anew.

A matmul's weight is never touched: its leaf is wrapped in `Adapted`, which adds the low-rank
product to the leaf's output, so any base works, packed ones too. Small tensors (biases, norms,
modulation, the patch embedding) are overwritten and their originals kept.

Strength is a tensor that compiled code reads, so changing it compiles nothing, 0 included: 0 times
a finite product adds exactly nothing, so no flag is needed to give the base's output bit for bit.
`remove` frees the memory and unwraps, which is other code: compiled blocks compile once more,
unless they ran bare before; `set_strength(name, 0)` is the removal that they do not notice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanflow.config import RequestError
from wanflow.models.dit import Linear32

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class LowRank:
    """LoRA: scale * up @ down. up [out, r, ...], down [r, in, *kernel]; with mid [r, r, *kernel]
    (LoCon) down is [r, in, ...].
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0
    mid: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Hadamard:
    """LoHa: scale * (w1_a @ w1_b) * (w2_a @ w2_b), [out, r] and [r, in] each; with t1, t2 [r, r,
    *kernel] they are [r, out], [r, in].
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float = 1.0
    t1: Tensor | None = None
    t2: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Kronecker:
    """LoKr: scale * kron(w1, w2). Each is whole, or the product of itself and its `_b`; with t2 [r,
    r, *kernel] w2 is [r, out2].
    """

    w1: Tensor
    w2: Tensor
    scale: float = 1.0
    w1_b: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Difference:
    """Added as it is."""

    value: Tensor


@dataclass(frozen=True, eq=False)
class Replacement:
    """The weight itself; at strength s the weight is s of the way there."""

    value: Tensor


@dataclass(frozen=True, eq=False)
class Decomposed:
    """DoRA: magnitude * (W + inner) / norm(W + inner), rows of which have the norm [out] or [out,
    1], or columns: [1, in].
    """

    inner: Additive
    magnitude: Tensor


Additive: TypeAlias = LowRank | Hadamard | Kronecker | Difference
WeightDelta: TypeAlias = Additive | Replacement | Decomposed


# values


def shape_error(change: WeightDelta, shape: Shape) -> str | None:
    """Why a change cannot apply to a weight of this shape; None if it can, and then it makes
    nothing larger than the weight.
    """
    if isinstance(change, Decomposed):
        if len(shape) < 2:
            return f"a magnitude does not fit {list(shape)}"
        sides = [
            tuple(shape[:1]),
            (shape[0], *[1] * (len(shape) - 1)),
            (1, *shape[1:2], *[1] * (len(shape) - 2)),
        ]
        if tuple(change.magnitude.shape) not in sides:
            return f"magnitude {list(change.magnitude.shape)} does not fit {list(shape)}"
        return shape_error(change.inner, shape)
    if isinstance(change, Difference | Replacement):
        value = tuple(change.value.shape)
        fits = [side for side in value if side != 1] == [side for side in shape if side != 1]
        return None if fits else f"shape {list(value)} does not fit {list(shape)}"
    parts = [tuple(part.shape) for part in _tensors(change)]
    if len(shape) < 2 or any(len(part) < 2 or 0 in part for part in parts):
        return f"factors {', '.join(map(str, map(list, parts)))} make no {list(shape)}"
    if isinstance(change, LowRank):
        fits = _lowrank_fits(change, shape)
    else:
        fits = (
            _hadamard_fits(change, shape)
            if isinstance(change, Hadamard)
            else _kronecker_fits(change, shape)
        )
    return (
        None
        if fits
        else f"shape {' x '.join(str(list(part)) for part in parts)} does not fit {list(shape)}"
    )


def _tensors(change: WeightDelta) -> list[Tensor]:
    values = [getattr(change, field.name) for field in fields(change)]
    return [value for value in values if isinstance(value, Tensor)]


def _made(a: Tensor, b: Tensor, core: Tensor | None) -> tuple[int, int, int] | None:
    """(out, in, kernel) of what two factors make; kernel 0 where it stands within `in`. None where
    they do not meet.
    """
    if core is None:
        return (
            (a.shape[0], math.prod(b.shape[1:]), 0)
            if a.shape[1] == b.shape[0] and math.prod(a.shape[2:]) == 1
            else None
        )
    meets = core.shape[:2] == (a.shape[0], b.shape[0]) and a.ndim == b.ndim == 2
    return (a.shape[1], b.shape[1], math.prod(core.shape[2:])) if meets else None


def _lowrank_fits(change: LowRank, shape: Shape) -> bool:
    up, down, mid = change.up, change.down, change.mid
    if mid is None:
        return _made(up, down, None) == (shape[0], math.prod(shape[1:]), 0)
    ends = math.prod(up.shape[2:]) == 1 == math.prod(down.shape[2:])
    return ends and _made(up.flatten(1).mT, down.flatten(1), mid) == (
        shape[0],
        shape[1],
        math.prod(shape[2:]),
    )


def _hadamard_fits(change: Hadamard, shape: Shape) -> bool:
    wanted = {(shape[0], math.prod(shape[1:]), 0), (shape[0], shape[1], math.prod(shape[2:]))}
    return {
        _made(change.w1_a, change.w1_b, change.t1),
        _made(change.w2_a, change.w2_b, change.t2),
    } <= wanted


def _kronecker_fits(change: Kronecker, shape: Shape) -> bool:
    """Sizes alone decide: of the two factors, rows multiply to `out`, and columns with the kernel
    to the rest.
    """
    one = (
        (change.w1.shape[0], math.prod(change.w1.shape[1:]), 0)
        if change.w1_b is None
        else _made(change.w1, change.w1_b, None)
    )
    two = (
        (change.w2.shape[0], math.prod(change.w2.shape[1:]), 0)
        if change.w2_b is None
        else _made(change.w2, change.w2_b, change.t2)
    )
    if one is None or two is None or (change.t2 is not None and change.w2_b is None):
        return False
    # The kernel belongs to the second factor, and the first divides the inputs.
    columns = one[1] * two[1] * (two[2] or 1)
    return (
        one[0] * two[0] == shape[0] and columns == math.prod(shape[1:]) and shape[1] % one[1] == 0
    )


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """a @ b; or, around a core, a [r, out], core [r, s, *kernel], b [s, in] -> [out, in,
    *kernel].
    """
    if core is None:
        return a.float().flatten(1) @ b.float().flatten(1)
    return torch.einsum("rs...,ro,si->oi...", core.float(), a.float(), b.float())


def delta(change: Additive, shape: Shape) -> Tensor:
    """What a change adds to a weight of this shape, float32. The change must fit it (`misfit`)."""
    if isinstance(change, Difference):
        return change.value.float().reshape(shape)
    if isinstance(change, LowRank):
        up = change.up.flatten(1) if change.mid is None else change.up.flatten(1).mT
        return _product(change.scale * up.float(), change.down.flatten(1), change.mid).reshape(
            shape
        )
    if isinstance(change, Hadamard):
        one = _product(change.scale * change.w1_a.float(), change.w1_b, change.t1).reshape(shape)
        return one * _product(change.w2_a, change.w2_b, change.t2).reshape(shape)
    one = (
        change.w1.float().flatten(1)
        if change.w1_b is None
        else _product(change.w1, change.w1_b, None)
    )
    two = change.w2.float() if change.w2_b is None else _product(change.w2, change.w2_b, change.t2)
    return torch.kron(change.scale * one, two.flatten(1)).reshape(shape)


def changed(weight: Tensor, change: WeightDelta, strength: float | Tensor) -> Tensor:
    """The weight under a change: float32 in, float32 out, same shape; at strength 0 the weight
    itself, in value.

    The change must fit the weight (`misfit`), and lie on its device.
    """
    shape = tuple(weight.shape)
    if isinstance(change, Replacement):
        return torch.lerp(weight, change.value.float().reshape(shape), strength)
    if not isinstance(change, Decomposed):
        return weight + strength * delta(change, shape)
    whole = weight + delta(change.inner, shape)
    by_column = change.magnitude.ndim > 1 and change.magnitude.shape[0] == 1 != shape[0]
    kept = 1 if by_column else 0
    norm = torch.linalg.vector_norm(
        whole, dim=[n for n in range(len(shape)) if n != kept], keepdim=True
    )
    gain = change.magnitude.float().reshape(norm.shape) / (
        norm + (norm == 0)
    )  # a row of zeros stays one
    return torch.lerp(weight, whole * gain, strength)


# leaves


class LoRAWeights(nn.Module):
    """A change held ready: its tensors as parameters (frozen; a trainer thaws `up` and `down`), and
    its strength, [] float32.

    Low-rank factors are held in `dtype`, with the scale in `up`; whole weights too; other factors
    in float32, since what is made of them is rounded once more.
    """

    up: Tensor  # of LowRank
    down: Tensor
    strength: Tensor

    def __init__(
        self, change: WeightDelta, strength: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        if isinstance(change, LowRank):
            change = replace(change, up=change.scale * change.up.float(), scale=1.0)
            if change.mid is not None and math.prod(change.mid.shape[2:]) == 1:
                change = LowRank(change.up.flatten(1) @ change.mid.float().flatten(1), change.down)
            if change.mid is None:
                change = LowRank(change.up.flatten(1), change.down.flatten(1))
        elif not isinstance(change, Difference | Replacement):
            dtype = torch.float32
        self.kind: type[Any] = type(change)
        self.names = tuple(item.name for item in fields(change))
        for name in self.names:
            value = getattr(change, name)
            if isinstance(value, Tensor):
                # A copy even where nothing is converted: the file's tensors may be another slot's
                # too.
                value = nn.Parameter(
                    value.detach().to(device, dtype, copy=True).contiguous(), requires_grad=False
                )
            elif isinstance(value, Additive):
                value = LoRAWeights(value, 1.0, dtype, device)
            setattr(self, name, value)
        self.register_buffer(
            "strength", torch.tensor(strength, dtype=torch.float32, device=device), persistent=False
        )

    def change(self) -> WeightDelta:
        """The change, of this slot's own tensors."""
        values = [getattr(self, name) for name in self.names]
        return cast(
            WeightDelta,
            self.kind(
                *[value.change() if isinstance(value, LoRAWeights) else value for value in values]
            ),
        )


class LoRALinear(nn.Module):
    """Stands in for a leaf: the leaf's output, and what its slots add in the order they came. Input
    and output are the leaf's.
    """

    def __init__(self, leaf: nn.Module) -> None:
        super().__init__()
        self.leaf = leaf
        self.slots = nn.ModuleDict()

    @property
    def compute_dtype(self) -> torch.dtype:
        if isinstance(self.leaf, Linear32):
            return torch.float32
        return cast(torch.dtype, getattr(self.leaf, "compute_dtype", None) or self.weight.dtype)

    @property
    def weight(self) -> Tensor:
        """The leaf's own, where it has one."""
        return cast(Tensor, self.leaf.weight)

    @property
    def bias(self) -> Tensor | None:
        return cast("Tensor | None", self.leaf.bias)

    def forward(self, x: Tensor) -> Tensor:
        slots = cast("list[LoRAWeights]", list(self.slots.values()))
        if any(slot.kind is not LowRank for slot in slots):
            return self._through_weight(x, slots)
        y: Tensor = self.leaf(x)
        h = x.to(self.compute_dtype)
        for slot in slots:
            # Strength goes to the narrow side, and the sum into the matmul: a wide temporary is 2
            # GB at 720p.
            narrow = F.linear(h, slot.down.to(h.dtype)) * slot.strength
            wide = torch.addmm(
                y.reshape(-1, y.shape[-1]),
                narrow.reshape(-1, narrow.shape[-1]),
                slot.up.to(h.dtype).mT,
            )
            y = wide.view(y.shape)
        return y

    def _through_weight(self, x: Tensor, slots: Iterable[LoRAWeights]) -> Tensor:
        """For changes that need the weight they change, or are no product of thin factors: by the
        changed weight, made each time.
        """
        dtype = self.compute_dtype
        leaf: Any = self.leaf
        packed = hasattr(leaf, "dense")
        weight: Tensor = leaf.dense(torch.float32) if packed else leaf.weight.float()
        new = weight
        for slot in slots:
            new = changed(new, slot.change(), slot.strength)
        h = x.to(dtype)
        if (
            packed
        ):  # its own matmul may round otherwise than a plain one: only the difference is ours
            return cast(Tensor, leaf(x)) + F.linear(h, (new - weight).to(dtype))
        return F.linear(h, new.to(dtype), None if self.bias is None else self.bias.to(dtype))


# a model's adapters


@dataclass
class _Attached:
    """One adapter: its slots on leaves and its changes of small tensors, by parameter name."""

    key: str  # what its slots are called; names may hold dots
    strength: float
    slots: dict[str, LoRAWeights] = field(default_factory=dict)
    patches: dict[str, LoRAWeights] = field(default_factory=dict)


class Adapters:
    """All adapters of one model, applied in the order they were attached.

    Attach after the weights are in place: wrapped leaves have other parameter names. Tensors go to
    their leaf's device.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._attached: dict[str, _Attached] = {}
        self._originals: dict[str, Tensor] = {}  # of the small tensors that adapters change
        self._count = 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._attached)

    @property
    def strengths(self) -> dict[str, float]:
        return {name: attached.strength for name, attached in self._attached.items()}

    def slots(self, name: str) -> Mapping[str, LoRAWeights]:
        """An adapter's live slots, by parameter name: what a trainer trains, and writes to a
        file.
        """
        return dict(self._find(name).slots)

    def attach(self, name: str, changes: Mapping[str, WeightDelta], strength: float = 1.0) -> None:
        """Apply changes, by the parameter names of the official model; all of them or none.

        Raises:
            RequestError: for a name in use, a strength that is not finite, a parameter that is not
                there, a shape that does not fit.
        """
        if name in self._attached:
            raise RequestError(
                f"an adapter named {name!r} is attached already; remove it first, or give this one"
                " another name"
            )
        _refuse_odd(strength)
        for key, change in changes.items():
            fault = shape_error(change, self._shape(key))
            if fault:
                raise RequestError(f"adapter {name!r}: {key}: {fault}")
        if any(parameter.is_meta for parameter in self.model.parameters()):
            raise RuntimeError(
                "adapters are attached to loaded weights, and some of this model's are on meta"
            )
        self._count += 1
        attached = self._attached[name] = _Attached(str(self._count), strength)
        for key, change in changes.items():
            if _is_leaf_weight(self._owner(key), key):
                attached.slots[key] = self._slot(key, change, attached)
            else:
                parameter = self._parameter(key)
                attached.patches[key] = LoRAWeights(
                    change, strength, torch.float32, parameter.device
                )
                self._originals.setdefault(key, parameter.detach().clone())
        self._patch(attached.patches)

    def set_strength(self, name: str, value: float) -> None:
        """Change how strongly an adapter applies; nothing compiles anew.

        Raises:
            RequestError: for an adapter that is not there, or a value that is not finite.
        """
        attached = self._find(name)
        _refuse_odd(value)
        if value == attached.strength:
            return
        attached.strength = value
        for slot in attached.slots.values():
            # in place: compiled code holds this tensor, and each slot has its own once a model
            # has moved
            slot.strength.fill_(value)
        self._patch(attached.patches)

    def remove(self, name: str) -> None:
        """Take an adapter off: the model is what it was without it, bit for bit.

        Raises:
            RequestError: for an adapter that is not there.
        """
        attached = self._find(name)
        del self._attached[name]
        for key in attached.slots:
            path = key.rpartition(".")[0]
            adapted = cast(LoRALinear, self.model.get_submodule(path))
            del adapted.slots[attached.key]
            if not len(adapted.slots):
                self._swap(path, adapted.leaf)
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

    def _slot(self, key: str, change: WeightDelta, attached: _Attached) -> LoRAWeights:
        path = key.rpartition(".")[0]
        adapted = self.model.get_submodule(path)
        if not isinstance(adapted, LoRALinear):
            adapted = LoRALinear(adapted)
            self._swap(path, adapted)
        home = next(
            (t.device for t in (*adapted.leaf.parameters(), *adapted.leaf.buffers())),
            torch.device("cpu"),
        )
        slot = LoRAWeights(change, attached.strength, adapted.compute_dtype, home)
        adapted.slots[attached.key] = slot
        return slot

    def _swap(self, path: str, module: nn.Module) -> None:
        parent, _, child = path.rpartition(".")
        module.train(self.model.get_submodule(path).training)
        setattr(self.model.get_submodule(parent), child, module)

    @torch.no_grad()
    def _patch(self, keys: Iterable[str]) -> None:
        """Write small tensors anew, from their originals and every adapter that has a word on
        them.
        """
        for key in keys:
            parameter, original = self._parameter(key), self._originals[key]
            value = original.to(parameter.device).float()
            for attached in self._attached.values():
                if key in attached.patches and attached.strength:
                    value = changed(
                        value, attached.patches[key].to(value.device).change(), attached.strength
                    )
            parameter.copy_(value)


def _is_leaf_weight(owner: nn.Module, key: str) -> bool:
    return (
        key.endswith(".weight") and hasattr(owner, "in_features") and hasattr(owner, "out_features")
    )


def _refuse_odd(strength: float) -> None:
    if not math.isfinite(strength):
        raise RequestError(f"an adapter's strength is a finite number, not {strength}")
