"""Multiply by 8-bit weights: round tokens in one pass, multiply, scale int32 sums in one pass.

On a GPU a Triton kernel does each pass. Elsewhere, and inside torch.compile, which fuses them with
their neighbours, they are the plain expressions `rounded` and `scaled`, with the same bits. As
operators of PyTorch they count in a plan as what they move.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, library

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}  # what a row's largest value becomes
TINY = 1e-30  # the smallest scale: a row of zeros must not divide by zero
PIECE = 256 << 20  # bytes of the int32 sums that exist at a time
ROWS = 32  # int_mm on a GPU needs more than 16 rows; fewer are padded with zeros


def multiply(
    tokens: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return [n, out] of `dtype` for tokens [n, in] and a weight, as each token is rounded.

    Args:
        tokens: of any float dtype; they are rounded as they are in `dtype`.
        data, scale: the weight, float8 or int8 [out, in], and float32 [out, 1].
        bias: [out], rounded to `dtype`.
        dtype: of the result; bfloat16 for float8.
    """
    bias = None if bias is None else bias.to(dtype)
    compiling = torch.compiler.is_compiling()
    if data.dtype != torch.int8:
        codes, scales = (rounded if compiling else round_tokens)(tokens, dtype, data.dtype)
        # Hopper's fast sums have fewer bits than float32, but many more than their fp8 input.
        return torch._scaled_mm(
            codes, data.t(), scales, scale.t(), bias, out_dtype=dtype, use_fast_accum=True
        )
    if compiling:
        codes, scales = rounded(tokens, dtype, data.dtype)
        return scaled(_sums(codes, data), scales, scale, bias, dtype)
    out = torch.empty(len(tokens), len(data), dtype=dtype, device=tokens.device)
    step = max(ROWS, PIECE // (4 * len(data)) // 256 * 256)
    for start in range(0, len(tokens), step):
        part = slice(start, start + step)
        codes, scales = round_tokens(tokens[part], dtype, data.dtype)
        scale_sums(_sums(codes, data), scales, scale, bias, out[part])
    return out


def _sums(codes: Tensor, data: Tensor) -> Tensor:
    """Return the int32 sums [n, out]."""
    missing = ROWS - len(codes)
    padded = F.pad(codes, (0, 0, 0, missing)) if missing > 0 else codes
    return torch._int_mm(padded, data.t())[: len(codes)]


def scale_of(x: Tensor, largest: float) -> Tensor:
    """Return scales [..., 1] of x [..., n] that make its largest value `largest`."""
    return (x.abs().amax(-1, keepdim=True) / largest).clamp_min(TINY)


def rounded(x: Tensor, compute: torch.dtype, code: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x [n, in], as it is in the dtype `compute`, in codes [n, in] and scales [n, 1]."""
    x = x.to(compute).float()
    scale = scale_of(x, LARGEST[code])
    x = x / scale
    return (x if code.is_floating_point else x.round_()).to(code), scale


def scaled(
    sums: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return sums [n, out] int32 times rows [n, 1] and columns [out, 1], plus bias [out]."""
    product = sums.float().mul_(rows).mul_(columns.t()).to(dtype)
    return product if bias is None else product.add_(bias)


# Schemas are written out, since not every PyTorch reads them from these annotations.
@library.custom_op(
    "wanflow::round_tokens",
    mutates_args=(),
    schema="(Tensor x, ScalarType compute, ScalarType code) -> (Tensor, Tensor)",
)
def round_tokens(x: Tensor, compute: torch.dtype, code: torch.dtype) -> tuple[Tensor, Tensor]:
    """Do as `rounded`, reading x once."""
    return rounded(x, compute, code)


@round_tokens.register_kernel("cuda")
def _(x: Tensor, compute: torch.dtype, code: torch.dtype) -> tuple[Tensor, Tensor]:
    from wanflow.transforms import rounding_kernels

    x = x if x.stride(1) == 1 else x.contiguous()
    codes, scales = _empty(x, compute, code)
    with torch.cuda.device(x.device):
        rounding_kernels.round_tokens(x, codes, scales, compute, LARGEST[code], TINY)
    return codes, scales


@round_tokens.register_fake
def _empty(x: Tensor, compute: torch.dtype, code: torch.dtype) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=code, device=x.device)
    return codes, torch.empty(len(x), 1, device=x.device)


@library.custom_op(
    "wanflow::scale_sums",
    mutates_args=("out",),
    schema="(Tensor sums, Tensor rows, Tensor columns, Tensor? bias, Tensor(a!) out) -> ()",
)
def scale_sums(
    sums: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """Do as `scaled` into out [n, out], reading the sums once."""
    out.copy_(scaled(sums, rows, columns, bias, out.dtype))


@scale_sums.register_kernel("cuda")
def _(sums: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor) -> None:
    from wanflow.transforms import rounding_kernels

    with torch.cuda.device(out.device):
        rounding_kernels.scale_sums(sums, rows, columns, bias, out)


@scale_sums.register_fake
def _(sums: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor) -> None: ...
