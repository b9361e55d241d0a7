"""The kernels that round tokens and scale sums: the same bits as the plain expressions, and code
for every generation of GPU.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.common import scales_rows
from torch import Tensor

from wanflow.plan.trace import fake, materialise
from wanflow.transforms import rounding
from wanflow.transforms.quant import QuantLinear

with_rows = pytest.mark.skipif(
    not scales_rows(), reason="no fp8 product with a scale for each row on a CPU"
)

NAME = "wanflow.transforms.rounding_kernels"
CODES = (torch.float8_e4m3fn, torch.int8)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The kernels in Triton's interpreter, which runs them on a CPU."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


def tokens(rows: int, columns: int) -> Tensor:
    """Normal values of many sizes, large channels, a row of zeros, one of halves, tiny ones."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    x *= torch.logspace(-9, 4, rows).unsqueeze(1)
    x[:, ::50] *= 40
    x[0], x[1], x[2] = 0, torch.arange(columns) / 2, 1e-38
    return x


def bits(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_has_the_bits_of_the_expression(
    kernels: Any, compute: torch.dtype, code: torch.dtype
) -> None:
    for rows, columns in ((33, 643), (3, 1), (5, 5120), (3, 13824)):
        for given in {compute, torch.float32}:
            x = tokens(rows, columns).clamp(-6e4, 6e4).to(given)
            want, scales = rounding.rounded(x, compute, code)
            got, its = torch.empty_like(want), torch.empty_like(scales)
            kernels.round_tokens(x, got, its, compute, rounding.LARGEST[code], rounding.TINY)
            assert torch.equal(its, scales) and torch.equal(bits(got), bits(want))


def test_every_float8_is_met_and_ties_go_to_even(kernels: Any) -> None:
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (every[1:] + every[:-1]) / 2
    near = torch.stack([ties, ties.nextafter(ties + 1), ties.nextafter(ties - 1)]).flatten()
    x = torch.cat([every, -every, near, -near]).unsqueeze(0)  # the largest is 448: the scale is 1
    got, its = torch.empty(x.shape, dtype=torch.float8_e4m3fn), torch.empty(1, 1)
    kernels.round_tokens(x, got, its, torch.float32, 448.0, rounding.TINY)
    assert its.item() == 1 and torch.equal(bits(got), bits(x.to(torch.float8_e4m3fn)))


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_has_such_a_scale(
    kernels: Any, code: torch.dtype, value: float
) -> None:
    x = tokens(9, 643).bfloat16()
    want, _ = rounding.rounded(x, torch.bfloat16, code)
    x[4, 77] = value
    _, scales = rounding.rounded(x, torch.bfloat16, code)
    got, its = torch.empty_like(want), torch.empty_like(scales)
    kernels.round_tokens(x, got, its, torch.bfloat16, rounding.LARGEST[code], rounding.TINY)
    assert torch.equal(its.nan_to_num(7, 8), scales.nan_to_num(7, 8)) and not its[4].isfinite()
    others = torch.arange(9) != 4
    assert torch.equal(bits(got)[others], bits(want)[others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("biased", [True, False])
def test_scaling_has_the_bits_of_the_expression(
    kernels: Any, dtype: torch.dtype, biased: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, width in ((33, 1030), (1, 8), (17, 5120)):
        sums = torch.randint(-(1 << 27), 1 << 27, (rows, width), generator=generator).int()
        scales = torch.rand(rows, 1, generator=generator) * 1e-4
        columns = torch.rand(width, 1, generator=generator) * 1e-3
        bias = torch.randn(width, generator=generator).to(dtype) if biased else None
        scales[rows // 2] = float("nan") if rows > 1 else 1e-4
        want = rounding.scaled(sums, scales, columns, bias, dtype)
        out = torch.full((rows + 2, width), 7.0, dtype=dtype)
        kernels.scale_sums(sums, scales, columns, bias, out[1:-1])
        assert torch.equal(out[1:-1].nan_to_num(5), want.nan_to_num(5))
        assert (out[[0, -1]] == 7).all()  # nothing beside its part was written


@with_rows
def test_a_layer_by_the_kernels(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs, in pieces: the operators' CPU versions go to the interpreted kernels."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(48, 160, generator=generator), torch.randn(48, generator=generator)
    x = torch.randn(75, 160, generator=generator)
    for mode, way in (("fp8", "scaled_mm"), ("int8", "int_mm")):
        leaf = QuantLinear(160, 48, True, mode, torch.bfloat16, way)  # type: ignore[arg-type]
        for name, value in {**leaf.quantise(weight), "bias": bias}.items():
            setattr(leaf, name, torch.nn.Parameter(value, requires_grad=False))
        want = leaf(x)

        def round_tokens(x: Tensor, compute: Any, code: Any) -> tuple[Tensor, Tensor]:
            codes, scales = torch.empty(x.shape, dtype=code), torch.empty(len(x), 1)
            largest = rounding.LARGEST[code]
            kernels.round_tokens(x, codes, scales, compute, largest, rounding.TINY)
            return codes, scales

        with monkeypatch.context() as patch:
            patch.setattr(rounding, "round_tokens", round_tokens)
            patch.setattr(rounding, "scale_sums", kernels.scale_sums)
            patch.setattr(rounding, "PIECE", 1)  # 32 tokens at a time
            assert torch.equal(leaf(x), want)


def test_kernels_become_code_for_every_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PTX and machine code by the compilers in Triton's wheel, which need no GPU."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # HOME may not be writable
    from triton.backends.compiler import GPUTarget  # type: ignore[import-not-found, unused-ignore]
    from triton.compiler import ASTSource, compile  # type: ignore[import-not-found, unused-ignore]

    sys.modules.pop(NAME, None)
    real: Any = importlib.import_module(NAME)
    numbers = dict.fromkeys(("columns", "stride"), "i32") | dict.fromkeys(
        ("largest", "tiny"), "fp32"
    )
    for capability in (80, 89, 90, 100, 120):
        target = GPUTarget("cuda", capability, 32)
        for code, float8 in (("*u8", True), ("*i8", False)):
            chosen = {"BFLOAT16": True, "FLOAT16": False, "FLOAT8": float8, "SIZE": 256}
            pointers = {"x": "*fp32", "codes": code, "scales": "*fp32"}
            constant = dict.fromkeys(chosen, "constexpr")
            source = ASTSource(real._round_row, pointers | numbers | constant, constexprs=chosen)
            made = compile(source, target=target).asm
            assert "div.rn" in made["ptx"] and made["cubin"]
        tile = {"BFLOAT16": True, "BIAS": True, "ROWS": 8, "COLUMNS": 128}
        floats = {"sums": "*i32", "rows": "*fp32", "columns": "*fp32", "bias": "*bf16"}
        given = {**floats, "out": "*bf16"} | dict.fromkeys(("height", "width", "stride"), "i32")
        source = ASTSource(
            real._scale_sums, given | dict.fromkeys(tile, "constexpr"), constexprs=tile
        )
        made = compile(source, target=target).asm
        assert "fma" not in made["ptx"] and made["cubin"]  # a fused one would round otherwise


@pytest.mark.parametrize(("mode", "way"), [("fp8", "scaled_mm"), ("int8", "int_mm")])
def test_bytes_beside_a_product(mode: Any, way: Any) -> None:
    count, columns, width = 75_600, 5120, 13824  # 1280*720x81
    for given in (torch.bfloat16, torch.float32):
        with torch.device("meta"):
            leaf = QuantLinear(columns, width, True, mode, torch.bfloat16, way)
        with fake() as trace:
            weights = materialise(leaf)
            x = torch.empty(count, columns, dtype=given)
            trace.mark()
            leaf(x)
        read, scales = x.nbytes + count * columns, 4 * count
        summed = 6 * count * width if mode == "int8" else 0
        small = 0.002 * (read + summed)  # scales of columns and biases, once a piece
        assert read + scales + summed <= trace.work.traffic <= read + 2 * scales + summed + small
        assert trace.work.total() == 2 * count * columns * width
        # besides input, weight and result: codes, or a piece of codes and sums
        beside = trace.peak - x.nbytes - weights - 2 * count * width
        assert beside < 1.01 * (count * columns if mode == "fp8" else rounding.PIECE * 1.1)
