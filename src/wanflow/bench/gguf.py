"""Write a GGUF file of Q8_0 blocks, so that reading and multiplying them can be checked."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import Tensor

from wanflow.checkpoint.containers import TensorSource
from wanflow.checkpoint.gguf import STRING, TYPES

ALIGN = 32  # bytes; where GGUF places tensors, unless its header says another number
BLOCK = 32  # values of Q8_0 that share a scale
NUMBERS = {kind: number for number, kind in TYPES.items()}


def q8_0(weight: Tensor) -> Tensor:
    """Round a weight [out, in] to blocks: uint8 [out, in / 32 * 34], a float16 scale before 32."""
    blocks = weight.float().unflatten(-1, (-1, BLOCK))
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).half()
    codes = (blocks / scale.float().clamp_min(1e-30)).round_().clamp_(-127, 127).to(torch.int8)
    return torch.cat([scale.view(torch.uint8), codes.view(torch.uint8)], -1).flatten(-2)


def write_q8_0(source: TensorSource, file: Path) -> None:
    """Write an expert: matmul weights of whole blocks as Q8_0, the rest in float32."""
    header, data, offset = bytearray(), list[bytes](), 0
    for name, info in source.tensors.items():
        packed = len(info.shape) == 2 and info.shape[-1] % BLOCK == 0 and name.startswith("blocks.")
        value = source.read(name, torch.float32)
        stored = (q8_0(value) if packed else value).contiguous().view(torch.uint8)
        content = bytes(stored.numpy().tobytes())
        sides = info.shape[::-1]
        kind = NUMBERS["Q8_0" if packed else "F32"]
        header += (
            _string(name) + struct.pack("<I", len(sides)) + struct.pack(f"<{len(sides)}Q", *sides)
        )
        header += struct.pack("<IQ", kind, offset)
        data.append(content + bytes(-len(content) % ALIGN))
        offset += len(data[-1])
    head = b"GGUF" + struct.pack("<IQQ", 3, len(source.tensors), 1)
    head += _string("general.architecture") + struct.pack("<I", STRING) + _string("wan")
    head += bytes(header)
    with file.open("wb") as out:
        out.write(head + bytes(-len(head) % ALIGN))
        out.writelines(data)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()
