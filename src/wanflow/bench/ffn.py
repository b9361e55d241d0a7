"""Check the feed-forward's two products in every precision and by every way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wanflow.bench.gguf import q8_0
from wanflow.bench.record import Record, Skip
from wanflow.bench.tools import Scale, distance, randn, random_weight, seconds
from wanflow.models.dit import Linear
from wanflow.runtime import Quantization
from wanflow.transforms.attention import failure
from wanflow.transforms.ggml import LAYOUTS
from wanflow.transforms.packed import PackedLinear
from wanflow.transforms.quant import QuantLinear
from wanflow.transforms.ways import Way

FORMS: tuple[tuple[Quantization, Way], ...] = (
    ("fp8", "weight-only"),
    ("int8", "weight-only"),
    ("nf4", "weight-only"),
    ("fp8", "scaled_mm"),
    ("int8", "int_mm"),
)
BOUND = {"fp8": 0.08, "int8": 0.05, "nf4": 0.25, "Q8_0": 0.05}  # relative to the largest value
BYTES = 144  # of a Q4_K block; its first four are two scales in float16


def ffn(record: Record, scale: Scale) -> None:
    """Time both products at the published number of tokens, one precision after the other."""
    dit, tokens = scale.spec.dit, scale.tokens(scale.latents[0])
    shapes = ((dit.ffn_dim, dit.dim), (dit.dim, dit.ffn_dim))
    weights = [random_weight("ffn", shape, scale.dtype, scale.device) for shape in shapes]
    x = randn((tokens, dit.dim), scale.dtype, scale.device)
    flops = 4 * tokens * dit.dim * dit.ffn_dim
    plain = nn.Sequential(*(_plain(weight) for weight in weights))
    true = plain(x)
    base = seconds(lambda: plain(x), scale.device, scale.rounds)
    name = str(scale.dtype).removeprefix("torch.")
    record.measured(f"feed-forward in {name}", _words(base, base, flops), seconds=base)
    best = 0.0
    for mode, way in FORMS:
        what = f"feed-forward in {mode}, {way}"
        with record.asking(what):
            if way != "weight-only" and not scale.cuda:
                raise Skip("needs CUDA")
            try:
                leaves = nn.Sequential(*(_rounded(one, mode, way, scale) for one in weights))
                took = _one(record, what, leaves, x, true, scale, base, flops, BOUND[mode])
            except (RuntimeError, ValueError) as error:  # a GPU without it refuses in its own way
                record.measured(what, failure(error))
                continue
            if way != "weight-only":
                best = max(best, flops / took)
            del leaves
        scale.empty()
    if best:
        record.calibrate(low=best)
    for kind in ("Q8_0", "Q4_K"):
        what = f"feed-forward in GGUF {kind}"
        with record.asking(what):
            if any(width % LAYOUTS[kind].values for width in (dit.dim, dit.ffn_dim)):
                raise Skip(f"{dit.dim} values are no whole blocks of {kind}")
            leaves = nn.Sequential(*(_packed(one, kind, scale) for one in weights))
            known = kind in BOUND
            took = _one(
                record, what, leaves, x, true if known else None, scale, base, flops,
                BOUND.get(kind, 0),
            )  # fmt: skip


def _words(took: float, base: float, flops: int) -> str:
    return f"{1e3 * took:.4g} ms, {flops / took / 1e12:.3g} TFLOP/s, {took / base:.0%} of the first"


def _one(
    record: Record, what: str, leaves: nn.Module, x: Tensor, true: Tensor | None, scale: Scale,
    base: float, flops: int, bound: float,
) -> float:  # fmt: skip
    found = leaves(x)
    took = seconds(lambda: leaves(x), scale.device, scale.rounds)
    words = _words(took, base, flops)
    numbers: dict[str, Any] = {"seconds": took, "base": base}
    if true is None:  # random blocks have no truth
        record.measured(what, words, **numbers)
        return took
    away = distance(found, true)
    expected = f"at most {bound:g} away"
    record.passed(what, away <= bound, f"{words}, {away:.2g} away", expected, error=away, **numbers)
    return took


def _plain(weight: Tensor) -> Linear:
    leaf = Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    leaf.weight = nn.Parameter(weight, requires_grad=False)
    return leaf


def _rounded(weight: Tensor, mode: Quantization, way: Way, scale: Scale) -> QuantLinear:
    with torch.device("meta"):
        leaf = QuantLinear(weight.shape[1], weight.shape[0], False, mode, scale.dtype, way)
    for key, value in leaf.quantise(weight).items():
        setattr(leaf, key, nn.Parameter(value, requires_grad=False))
    return leaf


def _packed(weight: Tensor, kind: str, scale: Scale) -> PackedLinear:
    rows, columns = weight.shape
    with torch.device("meta"):
        leaf = PackedLinear(columns, rows, False, kind, scale.dtype)
    if kind == "Q8_0":
        data = q8_0(weight)
    else:
        blocks = torch.randint(
            0,
            256,
            (rows * columns // LAYOUTS[kind].values, BYTES),
            dtype=torch.uint8,
            device=scale.device,
        )
        scales = torch.full((len(blocks), 2), 1e-3, dtype=torch.float16, device=scale.device)
        blocks[:, :4] = scales.view(torch.uint8)
        data = blocks.view(rows, -1)
    leaf.data = nn.Parameter(data, requires_grad=False)
    return leaf
