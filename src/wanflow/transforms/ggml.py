"""Unpack GGML's quantised types with torch.

Every type packs a run of values into a block of bytes: one or two float16 for the block; in longer
blocks small integers that scale parts of it; and a few bits for each value, often split over two
places. The functions fill `out` [n, values] float32 from `blocks` [n, bytes] uint8, on any device.

The float operations have the order of the `gguf` package, and where nothing fuses them (a compiler
may) the results are equal to its bit for bit. Bits are extracted by shifts with plain numbers, one
slice of `out` at a time: broadcast over a tensor of shifts the same work takes 30 times as long on
a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# The values of the 16 codes of the IQ4 types, and twice those of E2M1, the 4-bit float.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
TWICE_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte of each block: [n, 1] float32."""
    return blocks[:, at : at + 2].view(torch.float16).float()


def _signed(codes: Tensor, zero: int) -> Tensor:
    """Codes minus that of zero; uint8 wraps around to the right int8."""
    return (codes - zero).view(torch.int8)


# Blocks of 32 values. The low halves of 16 bytes are the first 16 values, the high halves the rest.


def _nibbles(packed: Tensor, out: Tensor) -> None:
    """Unpack nibbles: packed [n, 16] -> out [n, 32]."""
    out[:, :16] = packed & 15
    out[:, 16:] = packed >> 4


def _fifth_bits(packed: Tensor) -> Tensor:
    """Bits, lowest first, [n, 4] -> [n, 32] uint8, each 0 or 16."""
    # A table of 8 bytes for each byte, looked up as one integer.
    bits = torch.arange(8, device=packed.device)
    table = ((torch.arange(256, device=packed.device).unsqueeze(1) >> bits) & 1).to(
        torch.uint8
    ) << 4
    wide = table.view(torch.int64).flatten().index_select(0, packed.flatten().int())
    return wide.view(torch.uint8).view(-1, 32)


def _q5(high: Tensor, low: Tensor) -> Tensor:
    """Join high [n, 4] and low [n, 16] bits to codes of 5 bits [n, 32] uint8."""
    return _fifth_bits(high) | torch.cat([low & 15, low >> 4], 1)


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    """Scale (2 bytes), codes (16): scale * (code - 8)."""
    _nibbles(blocks[:, 2:], out)
    out.sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    """Scale (2), minimum (2), codes (16): scale * code + minimum."""
    _nibbles(blocks[:, 4:], out)
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    """Scale (2), fifth bits (4), lower bits (16): scale * (code - 16)."""
    out.copy_(_signed(_q5(blocks[:, 2:6], blocks[:, 6:]), 16)).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    """Scale (2), minimum (2), fifth bits (4), lower bits (16): scale * code + minimum."""
    out.copy_(_q5(blocks[:, 4:8], blocks[:, 8:])).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    """Scale (2), signed codes (32)."""
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_half(blocks, 0))


def look_up(codes: Tensor, values: tuple[int, ...] = IQ4_VALUES) -> Tensor:
    """Codes 0..15 -> their values, float32, in the same shape."""
    table = torch.tensor(values, dtype=torch.float32, device=codes.device)
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


def _iq4_nl(blocks: Tensor, out: Tensor) -> None:
    """Scale (2), codes (16): scale * value of the code."""
    out.copy_(look_up(torch.cat([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1))).mul_(
        _half(blocks, 0)
    )


def _mxfp4(blocks: Tensor, out: Tensor) -> None:
    """Exponent (1), codes (16): 2^(exponent - 128) * twice the code's E2M1."""
    power = blocks[:, :1].int()
    bits = torch.where(power < 2, 0x200000 << power.clamp(max=1), (power - 1) << 23)
    codes = torch.cat([blocks[:, 1:] & 15, blocks[:, 1:] >> 4], 1)
    out.copy_(look_up(codes, TWICE_E2M1)).mul_(bits.view(torch.float32))


def _nvfp4(blocks: Tensor, out: Tensor) -> None:
    """Scales of 4 parts of 16 values (4: E4M3 without sign, 127 is 0), codes of each part (8)."""
    codes = blocks[:, 4:].unflatten(1, (4, 8))
    out.copy_(look_up(torch.cat([codes & 15, codes >> 4], 2).flatten(1), TWICE_E2M1))
    _scaled(out, (blocks[:, :4] & 127).view(torch.float8_e4m3fn).float().nan_to_num(0) * 0.5)


# Blocks of 256 values. Parts of 16 or 32 have their own scale, a small integer times the block's.


def _scaled(out: Tensor, scales: Tensor, minima: Tensor | None = None) -> None:
    """Scale out [n, 256] in place: out * scales - minima, both [n, parts]."""
    parts = out.unflatten(1, (scales.shape[1], -1))
    parts.mul_(scales.unsqueeze(-1))
    if minima is not None:
        parts.sub_(minima.unsqueeze(-1))


def _q2_k(blocks: Tensor, out: Tensor) -> None:
    """Scales and minima of 16 parts (16: low and high halves), codes (64), scale (2), minimum (2).

    Codes have 2 bits.
    """
    codes, quarters = blocks[:, 16:80].unflatten(1, (2, 32)), out.unflatten(1, (2, 4, 32))
    for n in range(4):
        quarters[:, :, n] = (codes >> 2 * n) & 3
    small = blocks[:, :16]
    _scaled(out, _half(blocks, 80) * (small & 15).float(), _half(blocks, 82) * (small >> 4).float())


def _q3_k(blocks: Tensor, out: Tensor) -> None:
    """Third bits (32), lower bits (64), scales of 16 parts (12), scale (2): code - 4.

    Of a part's scale, four bits are in the first 8 bytes and two in the last 4.
    """
    high, low, small = blocks[:, :32], blocks[:, 32:96].unflatten(1, (2, 32)), blocks[:, 96:108]
    eighths = out.unflatten(1, (8, 32))
    for n in range(8):
        code = ((low[:, n // 4] >> 2 * (n % 4)) & 3) | (((high >> n) & 1) << 2)
        eighths[:, n] = _signed(code, 4)
    lower = torch.cat([small[:, :8] & 15, small[:, :8] >> 4], 1)
    upper = torch.cat([(small[:, 8:] >> 2 * n) & 3 for n in range(4)], 1)
    _scaled(out, _half(blocks, 108) * _signed(lower | (upper << 4), 32).float())


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and minima of a Q4_K or Q5_K block's 8 parts, [n, 8] float32 each.

    They have six bits each, in 12 bytes. The first four scales are the low six bits of bytes 0-3,
    the first four minima of bytes 4-7. The others take four bits from bytes 8-11 (scales low,
    minima high), and their upper two from the tops of bytes 0-3 and 4-7.
    """
    first, second, rest = blocks[:, 4:16].unflatten(1, (3, 4)).unbind(1)
    scales = torch.cat([first & 63, (rest & 15) | ((first >> 2) & 48)], 1)
    minima = torch.cat([second & 63, (rest >> 4) | ((second >> 2) & 48)], 1)
    return _half(blocks, 0) * scales.float(), _half(blocks, 2) * minima.float()


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    """Scale (2), scale of the minima (2), scales and minima (12), codes (128)."""
    codes, parts = blocks[:, 16:].unflatten(1, (4, 32)), out.unflatten(1, (4, 2, 32))
    parts[:, :, 0] = codes & 15
    parts[:, :, 1] = codes >> 4
    _scaled(out, *_scales_and_minima(blocks))


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    """Scale (2), scale of the minima (2), scales and minima (12), fifth bits (32), lower (128)."""
    high, low = blocks[:, 16:48], blocks[:, 48:].unflatten(1, (4, 32))
    eighths = out.unflatten(1, (8, 32))
    for n in range(4):
        eighths[:, 2 * n] = (low[:, n] & 15) | (((high >> 2 * n) & 1) << 4)
        eighths[:, 2 * n + 1] = (low[:, n] >> 4) | (((high >> 2 * n + 1) & 1) << 4)
    _scaled(out, *_scales_and_minima(blocks))


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    """Lower four bits (128), upper two (64), signed scales of 16 parts (16), scale: code - 32."""
    low, high = blocks[:, :128].unflatten(1, (2, 2, 32)), blocks[:, 128:192].unflatten(1, (2, 32))
    quarters = out.unflatten(1, (2, 4, 32))
    for n in range(4):
        lower = low[:, :, n % 2] & 15 if n < 2 else low[:, :, n % 2] >> 4
        quarters[:, :, n] = _signed(lower | (((high >> 2 * n) & 3) << 4), 32)
    _scaled(out, _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float())


def _iq4_xs(blocks: Tensor, out: Tensor) -> None:
    """Scale (2), upper two bits of 8 scales (2), their lower four (4), codes (128): scale - 32."""
    codes = blocks[:, 8:].unflatten(1, (8, 16))
    out.unflatten(1, (8, 2, 16)).copy_(look_up(torch.stack([codes & 15, codes >> 4], 2)))
    lower = torch.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], 2).flatten(1)
    upper = torch.stack([(blocks[:, 2:4] >> 2 * n) & 3 for n in range(4)], 2).flatten(1)
    _scaled(out, _half(blocks, 0) * _signed(lower | (upper << 4), 32).float())


class BlockLayout(NamedTuple):
    """Values and bytes of a block, and the function that unpacks blocks."""

    values: int
    nbytes: int
    fill: Callable[[Tensor, Tensor], None]


LAYOUTS = {
    "Q4_0": BlockLayout(32, 18, _q4_0),
    "Q4_1": BlockLayout(32, 20, _q4_1),
    "Q5_0": BlockLayout(32, 22, _q5_0),
    "Q5_1": BlockLayout(32, 24, _q5_1),
    "Q8_0": BlockLayout(32, 34, _q8_0),
    "Q2_K": BlockLayout(256, 84, _q2_k),
    "Q3_K": BlockLayout(256, 110, _q3_k),
    "Q4_K": BlockLayout(256, 144, _q4_k),
    "Q5_K": BlockLayout(256, 176, _q5_k),
    "Q6_K": BlockLayout(256, 210, _q6_k),
    "IQ4_NL": BlockLayout(32, 18, _iq4_nl),
    "IQ4_XS": BlockLayout(256, 136, _iq4_xs),
    "MXFP4": BlockLayout(32, 17, _mxfp4),
    "NVFP4": BlockLayout(64, 36, _nvfp4),
}
