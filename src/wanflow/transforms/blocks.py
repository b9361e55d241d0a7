"""Unpack the block formats of ComfyUI's files: nvfp4, mxfp8, and int8 that was rotated (ConvRot).

A file keeps the scales of nvfp4 and mxfp8 in a tensor of their own, in the order of a tensor core.
Here each block begins with its scale, as GGML's do: rows can be cut, and nothing takes more memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wanflow.transforms.ggml import TWICE_E2M1, BlockLayout, look_up

# Values that are rotated together, of the forms of int8 whose rows are.
ROTATED = {f"int8_convrot{size}": size for size in (16, 64, 256)}


def _nvfp4(blocks: Tensor, out: Tensor) -> None:
    """Scale (1: E4M3), codes of E2M1 (8), of two in a byte the first in the high bits."""
    codes = torch.stack([blocks[:, 1:] >> 4, blocks[:, 1:] & 15], 2).flatten(1)
    scales = blocks[:, :1].view(torch.float8_e4m3fn).float()
    out.copy_(look_up(codes, TWICE_E2M1)).mul_(scales * 0.5)


def _mxfp8(blocks: Tensor, out: Tensor) -> None:
    """Exponent (1: 2^(exponent - 127), where 0 stands for a block of zeros), E4M3 values (32)."""
    powers = (blocks[:, :1].int() << 23).view(torch.float32)
    out.copy_(blocks[:, 1:].view(torch.float8_e4m3fn)).mul_(powers)


BLOCKS = {"nvfp4": BlockLayout(16, 9, _nvfp4), "mxfp8": BlockLayout(32, 33, _mxfp8)}


def rotate(values: Tensor, size: int) -> None:
    """Turn each run of `size` values in place by the regular Hadamard matrix, its own inverse.

    It is the Kronecker power of one with rows (1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1),
    (-1, 1, 1, 1), halved.

    Args:
        values: contiguous float32, whose count is a multiple of `size`.
    """
    matrix = four = 0.5 - torch.eye(4, device=values.device).flip(1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    values.copy_((values.view(-1, size) @ matrix).view_as(values))


def in_rows(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Return scales [rows, columns] out of a tensor core's order (cuBLAS's, for scales of blocks).

    It stores tiles of 128 rows and 4 columns, one after another; a tile as 32 rows of 16: the four
    columns of row r, of row r + 32, of row r + 64 and of row r + 96. The last tiles are padded.
    """
    tiles = scales.reshape(-(-rows // 128), -(-columns // 4), 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-(-rows // 128) * 128, -1)[:rows, :columns]
