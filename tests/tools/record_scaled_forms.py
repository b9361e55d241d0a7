"""Record what comfy-kitchen, ComfyUI's library for these formats, stores and reads.

`pip install comfy-kitchen==0.2.40` into an environment of its own, then run this.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from comfy_kitchen.backends.eager import quantization as eager
from safetensors.torch import save_file
from torch import Tensor

FILE = Path(__file__).parents[1] / "formats" / "scaled_forms.safetensors"


def main() -> None:
    torch.manual_seed(0)
    found: dict[str, Tensor] = {}

    def put(case: str, note: dict[str, object], want: Tensor, **tensors: Tensor) -> None:
        tensors["comfy_quant"] = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
        tensors |= {"want": want, "bias": torch.zeros(len(want))}
        found.update({f"{case}.{name}": value.contiguous() for name, value in tensors.items()})

    for case, rows, columns in (("whole", 32, 64), ("padded", 130, 68)):
        value = torch.randn(rows, columns) * 0.05
        value[3] = 0
        factor = value.abs().amax() / 2688
        data, scales = eager.quantize_nvfp4(value, factor, pad_16x=case == "padded")
        want = eager.dequantize_nvfp4(data, factor, scales, torch.float32)[:rows, :columns]
        note = {"format": "nvfp4", "orig_shape": [rows, columns]}
        put(f"nvfp4_{case}", note, want, weight=data, weight_scale=scales, weight_scale_2=factor)
    for case, rows, columns in (("whole", 32, 64), ("padded", 33, 40)):
        value = torch.randn(rows, columns) * 0.05
        value[3] = 0
        data, scales = eager.quantize_mxfp8(value, pad_32x=case == "padded")
        want = eager.dequantize_mxfp8(data, scales, torch.float32)[:rows, :columns]
        note = {"format": "mxfp8", "orig_shape": [rows, columns]}
        put(f"mxfp8_{case}", note, want, weight=data, weight_scale=scales)
    for case, quantise in (
        ("tensor", eager.quantize_int8_tensorwise),
        ("rows", eager.quantize_int8_rowwise),
    ):
        data, scale = quantise(torch.randn(8, 64) * 0.05)
        want = eager.dequantize_int8_simple(data, scale)
        put(f"int8_{case}", {"format": "int8_tensorwise"}, want, weight=data, weight_scale=scale)
    for size in (16, 64, 256):
        data, scale = eager.quantize_int8_convrot_weight(torch.randn(3, 2 * size) * 0.05, size)
        want = eager.dequantize_int8_convrot_weight(data, scale, size)
        note = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": size}
        put(f"convrot_{size}", note, want, weight=data, weight_scale=scale)
    save_file(found, FILE)


if __name__ == "__main__":
    main()
