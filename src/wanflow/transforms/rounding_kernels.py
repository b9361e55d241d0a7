"""Triton kernels that round tokens to 8 bits and scale the int32 sums of their product.

Importing this file imports Triton. Conversions to bfloat16 and float8 are written out: the bits are
the same on every GPU and in Triton's interpreter, whose own conversions do not round to nearest.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

ROWS, COLUMNS = 8, 512  # sums that one program scales


@triton.jit  # type: ignore[misc, untyped-decorator, unused-ignore]
def _bfloat16(values):  # type: ignore[no-untyped-def]
    """Float32 rounded to bfloat16, to nearest and even, still as float32; NaN stays NaN."""
    bits = values.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where(values == values, rounded.to(tl.float32, bitcast=True), values)


@triton.jit  # type: ignore[misc, untyped-decorator, unused-ignore]
def _e4m3(values):  # type: ignore[no-untyped-def]
    """The codes of float8 e4m3 of float32 values of up to 448, as int32; of NaN any code."""
    bits = values.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 steps are 2^-9, which is the last bit of a float32 next to 2^14.
    shifted = size.to(tl.float32, bitcast=True) + 16384.0
    small = shifted.to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)


@triton.jit  # type: ignore[misc, untyped-decorator, unused-ignore]
def _round_row(  # type: ignore[no-untyped-def]
    x, codes, scales, columns, stride, largest, tiny, BFLOAT16: tl.constexpr,
    FLOAT16: tl.constexpr, FLOAT8: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Round one row, which stays in registers between its maximum and its division."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    inside = at < columns
    values = tl.load(x + row * stride + at, inside, 0).to(tl.float32)
    if BFLOAT16:
        values = _bfloat16(values)
    if FLOAT16:
        values = values.to(tl.float16).to(tl.float32)
    # As integers, sizes have the order of the floats, and NaN is above all.
    sizes = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    most = tl.reduce(sizes, 0, tl.standard._elementwise_max).to(tl.float32, bitcast=True)
    scale = tl.div_rn(most, largest)
    scale = tl.where(scale < tiny, tiny, scale)
    tl.store(scales + row, scale)
    values = tl.div_rn(values, scale)
    if FLOAT8:
        code = _e4m3(values)
    else:  # next to 1.5 * 2^23 the last bit of a float32 is 1
        code = (values + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    tl.store(codes + row * columns + at, code.to(codes.dtype.element_ty), inside)


@triton.jit  # type: ignore[misc, untyped-decorator, unused-ignore]
def _scale_sums(  # type: ignore[no-untyped-def]
    sums, rows, columns, bias, out, height, width, stride, BFLOAT16: tl.constexpr,
    BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Scale a tile of sums by its rows and columns, round, and add the bias, which rounds again."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < height) & (column < width)
    values = tl.load(sums + row * width + column, inside, 0).to(tl.float32)
    values *= tl.load(rows + row, row < height, 0)
    values *= tl.load(columns + column, column < width, 0)
    values = _bfloat16(values) if BFLOAT16 else values.to(out.dtype.element_ty).to(tl.float32)
    if BIAS:
        values += tl.load(bias + column, column < width, 0).to(tl.float32)
        if BFLOAT16:
            values = _bfloat16(values)
    tl.store(out + row * stride + column, values.to(out.dtype.element_ty), inside)


def round_tokens(
    x: Tensor, codes: Tensor, scales: Tensor, compute: torch.dtype, largest: float, tiny: float
) -> None:
    """Round x [n, in], with rows in one piece, into codes [n, in] and scales [n, 1]."""
    columns, other = x.shape[1], x.dtype != compute
    _round_row[(len(x),)](
        x,
        codes.view(torch.uint8) if codes.is_floating_point() else codes,
        scales,
        columns,
        x.stride(0),
        largest,
        tiny,
        BFLOAT16=other and compute == torch.bfloat16,
        FLOAT16=other and compute == torch.float16,
        FLOAT8=codes.is_floating_point(),
        SIZE=triton.next_power_of_2(columns),
        num_warps=8 if columns > 2048 else 4,
    )


def scale_sums(
    sums: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """Scale sums [n, out] int32 by rows [n, 1] and columns [out, 1] into out [n, out]."""
    height, width = sums.shape
    _scale_sums[(triton.cdiv(height, ROWS), triton.cdiv(width, COLUMNS))](
        sums,
        rows,
        columns,
        bias,
        out,
        height,
        width,
        out.stride(0),
        BFLOAT16=out.dtype == torch.bfloat16,
        BIAS=bias is not None,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
