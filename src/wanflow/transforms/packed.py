"""Weights that stay as small in memory as in their file: fp8 with a scale, GGUF blocks; unpacked where they are used.

A `Packed` is a value: the bytes of one tensor and how to read them. `PackedLinear` and `PackedEmbedding` are leaves that hold one in
place of a weight and unpack it for each call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanflow.config import RequestError

ROWS = 1 << 22  # values unpacked at a time: what is in between never takes more than a few tens of megabytes


@dataclass(frozen=True)
class Packed:
    """A tensor as it lies in its file.

    kind: "F8_E4M3", "F8_E5M2", or a GGML type's name ("Q4_K").
    shape: of the tensor this stands for.
    data: fp8: float8 of `shape`; GGML: uint8 [rows, bytes per row], rows = product of all sides but the last.
    scale: fp8 only: float32, [] or [out, 1] or [out, blocks, 1]; value = data * scale.
    """

    kind: str
    shape: tuple[int, ...]
    data: Tensor
    scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)
