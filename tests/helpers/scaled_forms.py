"""Write weights in the forms of ComfyUI and LightX2V, and read them back one value at a time.

Nothing here is wanflow's: values are rounded by tables, and places of scales come from a formula.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
# form -> values that a row must be a multiple of, once it is padded
FORMS = {
    "nvfp4": 16,
    "mxfp8": 32,
    "int8": 1,
    "int8 rows": 1,
    "convrot": 16,
    "lightx2v int8": 1,
    "quanto": 1,
    "lightx2v nvfp4": 16,
    "lightx2v calibrated": 16,
}


def tile_place(row: Tensor, column: Tensor, columns: int) -> Tensor:
    """Where a tensor core looks for the scales of blocks, by cuBLAS's documentation."""
    tile = row // 128 * -(-columns // 4) + column // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4


def in_tiles(scales: Tensor) -> Tensor:
    """scales [rows, columns] uint8 -> as a file has them, with 7 where nobody looks."""
    rows, columns = scales.shape
    stored = torch.full((-(-rows // 128) * 128, -(-columns // 4) * 4), 7, dtype=torch.uint8)
    places = tile_place(torch.arange(rows)[:, None], torch.arange(columns), columns)
    stored.view(-1)[places] = scales
    return stored


def hadamard(size: int) -> Tensor:
    four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    matrix = four
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix


def group_of(columns: int) -> int:
    return next((size for size in (256, 64, 16) if columns % size == 0), 0)


def note(tensors: dict[str, Tensor], layer: str, **fields: Any) -> None:
    tensors[f"{layer}.comfy_quant"] = torch.tensor(
        list(json.dumps(fields).encode()), dtype=torch.uint8
    )


def written(form: str, layer: str, value: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a weight [rows, columns] in a form, and the values that they stand for."""
    if "nvfp4" in form or "calibrated" in form:
        return _nvfp4(form, layer, value)
    if form == "mxfp8":
        return _mxfp8(layer, value)
    size = group_of(value.shape[1]) if form == "convrot" else 0
    turned = value
    if size:
        turned = (value.view(len(value), -1, size) @ hadamard(size).T).reshape(value.shape)
    rows = form != "int8"
    scale = (turned.abs().amax(1, keepdim=True) if rows else turned.abs().amax()) / 127
    scale = scale.clamp(min=1e-30)
    scale = scale.bfloat16().float() if form == "quanto" else scale
    codes = (turned / scale).round().clamp(-127, 127).to(torch.int8)
    tensors = {f"{layer}.weight": codes, f"{layer}.weight_scale": scale}
    if form == "quanto":  # as optimum-quanto 0.2.7 names them
        tensors = {f"{layer}.weight._data": codes, f"{layer}.weight._scale": scale.bfloat16()}
        tensors |= {f"{layer}.{end}_scale": torch.ones(()) for end in ("input", "output")}
    meaning = codes.float() * scale
    if size:
        meaning = (meaning.view(len(value), -1, size) @ hadamard(size)).reshape(value.shape)
        note(tensors, layer, format="int8_tensorwise", convrot=True, convrot_groupsize=size)
    elif form.startswith("int8"):
        note(tensors, layer, format="int8_tensorwise", params={"per_row": rows})
    return tensors, meaning


def padded(value: Tensor, step: int) -> Tensor:
    rows, columns = value.shape
    return torch.nn.functional.pad(value, (0, -columns % step, 0, -rows % step))


def _nvfp4(form: str, layer: str, value: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    ours = form == "nvfp4"
    whole = padded(value, 16) if ours else value
    parts = whole.unflatten(1, (-1, 16))
    factor = value.abs().amax() / 2688
    scales = (parts.abs().amax(2) / 6 / factor).to(torch.float8_e4m3fn)
    by = (scales.float() * factor).unsqueeze(2)
    codes = (parts.abs() / by.clamp(min=1e-30)).clamp(max=6)
    codes = (codes.unsqueeze(3) - E2M1).abs().argmin(3).to(torch.uint8)
    meaning = (E2M1[codes.long()] * parts.sign() * by).flatten(1)[: len(value), : value.shape[1]]
    codes = (codes | (parts < 0).to(torch.uint8) << 3).flatten(1)
    first, second = codes[:, ::2], codes[:, 1::2]
    tensors = {
        f"{layer}.weight": first << 4 | second if ours else second << 4 | first,
        f"{layer}.weight_scale": in_tiles(scales.view(torch.uint8)).view(torch.float8_e4m3fn),
    }
    if ours:
        tensors[f"{layer}.weight_scale_2"] = factor
        tensors[f"{layer}.input_scale"] = torch.tensor(0.01)
        note(
            tensors, layer, format="nvfp4", full_precision_matrix_mult=True, orig_shape=value.shape
        )
    elif "calibrated" in form:
        tensors[f"{layer}.weight_global_scale"] = (1 / factor).view(1)
        tensors[f"{layer}.input_absmax"] = torch.tensor(3.0)
    else:
        tensors[f"{layer}.input_global_scale"] = torch.tensor(8.0)
        tensors[f"{layer}.alpha"] = factor / 8
    return tensors, meaning


def _mxfp8(layer: str, value: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    parts = padded(value, 32).unflatten(1, (-1, 32))
    powers = (parts.abs().amax(2) / 448).log2().ceil().clamp(min=-127)
    codes = (parts / torch.exp2(powers).unsqueeze(2)).to(torch.float8_e4m3fn)
    meaning = (codes.float() * torch.exp2(powers).unsqueeze(2)).flatten(1)
    tensors = {
        f"{layer}.weight": codes.flatten(1),
        f"{layer}.weight_scale": in_tiles((powers + 127).to(torch.uint8)).view(
            torch.float8_e8m0fnu
        ),
    }
    note(tensors, layer, format="mxfp8", orig_shape=value.shape)
    return tensors, meaning[: len(value), : value.shape[1]]


def rewritten(form: str, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A model's tensors with its matrices in a form; and the values that they stand for."""
    tensors, meaning = {}, {}
    for name, value in state.items():
        layer = name.removesuffix(".weight")
        if value.ndim != 2 or layer == name or (form == "convrot" and not group_of(value.shape[1])):
            tensors[name], meaning[name] = value.contiguous(), value.float()
            continue
        if form.startswith("lightx2v") and value.shape[1] % FORMS[form]:
            tensors[name], meaning[name] = value.contiguous(), value.float()
            continue
        new, meaning[name] = written(form, layer, value.float())
        tensors |= new
    return tensors, meaning


def rewrite(form: str, path: Path) -> None:
    """Turn a safetensors file of plain weights into one of a form."""
    save_file(rewritten(form, load_file(path))[0], path)
