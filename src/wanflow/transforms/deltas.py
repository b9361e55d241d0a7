"""Deltas of a weight, as values: LoRA, LoHa, LoKr, differences, replacements and DoRA.

Each class has `fits(shape)`, from shapes alone, and those that are added to the weight `dense`: the
float32 tensor of that shape. `changed` applies any of them. Sizes: out, in of the weight; r, the
rank; kernel, of a convolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TypeAlias

import torch
from torch import Tensor

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class LowRank:
    """LoRA: scale * up @ down.

    up [out, r, ...], down [r, in, *kernel]; with mid [r, r, *kernel] (LoCon) down is [r, in, ...].
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0
    mid: Tensor | None = None

    def fits(self, shape: Shape) -> bool:
        if self.mid is None:
            return _product_shape(self.up, self.down, None) == (shape[0], math.prod(shape[1:]), 0)
        ends = math.prod(self.up.shape[2:]) == 1 == math.prod(self.down.shape[2:])
        product = _product_shape(self.up.flatten(1).mT, self.down.flatten(1), self.mid)
        return ends and product == (shape[0], shape[1], math.prod(shape[2:]))

    def dense(self, shape: Shape) -> Tensor:
        up = self.up.flatten(1) if self.mid is None else self.up.flatten(1).mT
        return _product(self.scale * up.float(), self.down.flatten(1), self.mid).reshape(shape)


@dataclass(frozen=True, eq=False)
class Hadamard:
    """LoHa: scale * (w1_a @ w1_b) * (w2_a @ w2_b), [out, r] and [r, in] each.

    With t1, t2 [r, r, *kernel] they are [r, out] and [r, in].
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float = 1.0
    t1: Tensor | None = None
    t2: Tensor | None = None

    def fits(self, shape: Shape) -> bool:
        flat = (shape[0], math.prod(shape[1:]), 0)
        with_kernel = (shape[0], shape[1], math.prod(shape[2:]))
        one = _product_shape(self.w1_a, self.w1_b, self.t1)
        two = _product_shape(self.w2_a, self.w2_b, self.t2)
        return one in (flat, with_kernel) and two in (flat, with_kernel)

    def dense(self, shape: Shape) -> Tensor:
        one = _product(self.scale * self.w1_a.float(), self.w1_b, self.t1).reshape(shape)
        return one * _product(self.w2_a, self.w2_b, self.t2).reshape(shape)


@dataclass(frozen=True, eq=False)
class Kronecker:
    """LoKr: scale * kron(w1, w2).

    A factor is complete, or the product of itself and its `_b`; with t2 [r, r, *kernel] w2 is
    [r, out2].
    """

    w1: Tensor
    w2: Tensor
    scale: float = 1.0
    w1_b: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None

    def fits(self, shape: Shape) -> bool:
        """Sizes decide: rows multiply to `out`, columns with the kernel to the rest."""
        one = _factor_shape(self.w1, self.w1_b, None)
        two = _factor_shape(self.w2, self.w2_b, self.t2)
        if one is None or two is None or (self.t2 is not None and self.w2_b is None):
            return False
        # The kernel belongs to the second factor, and the first divides the inputs.
        columns = one[1] * two[1] * (two[2] or 1)
        return (
            one[0] * two[0] == shape[0]
            and columns == math.prod(shape[1:])
            and shape[1] % one[1] == 0
        )

    def dense(self, shape: Shape) -> Tensor:
        if self.w1_b is None:
            one = self.w1.float().flatten(1)
        else:
            one = _product(self.w1, self.w1_b, None)
        two = self.w2.float() if self.w2_b is None else _product(self.w2, self.w2_b, self.t2)
        return torch.kron(self.scale * one, two.flatten(1)).reshape(shape)


@dataclass(frozen=True, eq=False)
class Difference:
    """Added as it is."""

    value: Tensor

    def fits(self, shape: Shape) -> bool:
        return _without_ones(self.value.shape) == _without_ones(shape)

    def dense(self, shape: Shape) -> Tensor:
        return self.value.float().reshape(shape)


@dataclass(frozen=True, eq=False)
class Replacement:
    """The weight itself; at strength s the weight moves a fraction s of the way to it."""

    value: Tensor

    def fits(self, shape: Shape) -> bool:
        return _without_ones(self.value.shape) == _without_ones(shape)


@dataclass(frozen=True, eq=False)
class Decomposed:
    """DoRA: magnitude * (W + inner) / norm(W + inner).

    The norm is over rows where magnitude is [out] or [out, 1], over columns where it is [1, in].
    """

    inner: Additive
    magnitude: Tensor

    def fits(self, shape: Shape) -> bool:
        """Whether the magnitude fits; the inner delta is checked apart."""
        if len(shape) < 2:
            return False
        rows, columns = (shape[0], *[1] * (len(shape) - 1)), (1, shape[1], *[1] * (len(shape) - 2))
        return tuple(self.magnitude.shape) in (shape[:1], rows, columns)


Additive: TypeAlias = LowRank | Hadamard | Kronecker | Difference
WeightDelta: TypeAlias = Additive | Replacement | Decomposed


def shape_error(delta: WeightDelta, shape: Shape) -> str | None:
    """Return why a delta cannot apply to a weight of this shape; None where it can.

    A delta that fits makes no tensor that is larger than the weight.
    """
    if isinstance(delta, Decomposed):
        if not delta.fits(shape):
            return f"magnitude {list(delta.magnitude.shape)} does not fit {list(shape)}"
        return shape_error(delta.inner, shape)
    parts = [getattr(delta, item.name) for item in fields(delta)]
    sides = [list(part.shape) for part in parts if isinstance(part, Tensor)]
    factors = not isinstance(delta, Difference | Replacement)
    if factors and (len(shape) < 2 or any(len(side) < 2 or 0 in side for side in sides)):
        return f"factors {', '.join(map(str, sides))} make no {list(shape)}"
    if delta.fits(shape):
        return None
    return f"shape {' x '.join(map(str, sides))} does not fit {list(shape)}"


def changed(weight: Tensor, delta: WeightDelta, strength: float | Tensor) -> Tensor:
    """Return the weight under a delta, float32 both; at strength 0 equal to the weight itself.

    The delta must fit the weight (`shape_error`), and be on its device.
    """
    shape = tuple(weight.shape)
    if isinstance(delta, Replacement):
        return torch.lerp(weight, delta.value.float().reshape(shape), strength)
    if not isinstance(delta, Decomposed):
        return weight + strength * delta.dense(shape)
    full = weight + delta.inner.dense(shape)
    by_column = delta.magnitude.ndim > 1 and delta.magnitude.shape[0] == 1 != shape[0]
    side = 1 if by_column else 0
    norm = torch.linalg.vector_norm(
        full, dim=[n for n in range(len(shape)) if n != side], keepdim=True
    )
    # A row of zeros stays one.
    gain = delta.magnitude.float().reshape(norm.shape) / (norm + (norm == 0))
    return torch.lerp(weight, full * gain, strength)


def _without_ones(shape: Shape) -> list[int]:
    return [side for side in shape if side != 1]


def _product_shape(a: Tensor, b: Tensor, core: Tensor | None) -> tuple[int, int, int] | None:
    """(out, in, kernel) of two factors' product; None where they do not meet.

    Kernel 0: it is part of `in`.
    """
    if core is None:
        meets = a.shape[1] == b.shape[0] and math.prod(a.shape[2:]) == 1
        return (a.shape[0], math.prod(b.shape[1:]), 0) if meets else None
    meets = core.shape[:2] == (a.shape[0], b.shape[0]) and a.ndim == b.ndim == 2
    return (a.shape[1], b.shape[1], math.prod(core.shape[2:])) if meets else None


def _factor_shape(a: Tensor, b: Tensor | None, core: Tensor | None) -> tuple[int, int, int] | None:
    if b is None:
        return (a.shape[0], math.prod(a.shape[1:]), 0)
    return _product_shape(a, b, core)


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """Return a @ b; around a core [r, s, *kernel], a [r, out] and b [s, in] as a full weight."""
    if core is None:
        return a.float().flatten(1) @ b.float().flatten(1)
    return torch.einsum("rs...,ro,si->oi...", core.float(), a.float(), b.float())
