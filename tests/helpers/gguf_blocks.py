"""Random blocks of packed weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from wanflow.transforms.packed import LAYOUTS

# Scales of a byte each: how many, and what they are in what nobody calls damaged.
BYTES = {"MXFP4": (1, 100, 140), "NVFP4": (4, 0, 128), "nvfp4": (1, 0, 127), "mxfp8": (1, 100, 140)}
# Where in a block its float16 stand.
HALVES = {
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}


def blocks(kind: str, rows: int, columns: int, seed: int = 0, size: float = 0.02) -> Tensor:
    """Random blocks [rows, bytes] whose scales are finite: every bit pattern of the rest occurs."""
    generator = np.random.default_rng(seed)
    values, nbytes, _ = LAYOUTS[kind]
    data = generator.integers(0, 256, (rows * columns // values, nbytes), dtype=np.uint8)
    if kind in BYTES:
        count, low, high = BYTES[kind]
        data[data & 127 == 127] = 3  # NaN among mxfp8's values
        data[:, :count] = generator.integers(low, high, (len(data), count), dtype=np.uint8)
        return torch.from_numpy(data).view(rows, -1)
    for at in HALVES.get(kind, (0,)):
        scale = generator.normal(0, size, len(data)).astype(np.float16)
        data[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    return torch.from_numpy(data).view(rows, -1)
