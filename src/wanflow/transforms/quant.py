"""Quantise the Linear weights of the blocks while they load: fp8 and int8 halve them, nf4 quarters.

fp8   float8 e4m3, one float32 scale for each output row
int8  -127..127, one float32 scale for each output row
nf4   the 16 levels of QLoRA's "4-bit NormalFloat" (Dettmers et al. 2023, appendix E), one bfloat16
      scale for each 64 values of a row

A `QuantLinear` multiplies in one of the ways of `ways.py`, chosen when it is made. One scale for a
complete weight would leave int8 no bits next to an outlier. One for all tokens would make a token's
result depend on the others in its chunk (`benchmarks/quant_layers.py` has figures).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanflow.config import RequestError
from wanflow.models.dit import Linear
from wanflow.runtime import QUANTIZATIONS, Quantization
from wanflow.transforms import rounding
from wanflow.transforms.packed import fill_rows, multiply, unpack, without_conversion
from wanflow.transforms.ways import ROUNDING, Gpu, Way, choose_way

# What the largest value of a row or block becomes.
LARGEST = {"fp8": 448.0, "int8": 127.0, "nf4": 1.0}
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64  # values of a row that share a scale in nf4
# Values rounded at a time. Each takes 20 bytes of temporaries: 1.4 GB for 13824 x 5120 at once.
CHUNK, CHUNK_GPU = 1 << 20, 1 << 24


def quantizable_layers(model: nn.Module, layers: Literal["ffn", "all"]) -> list[str]:
    """Return the paths of the blocks' Linear layers to quantise: MLP, or ("all") attention too.

    Packed layers, and those that compute in float32, stay as they are.

    Raises:
        RequestError: for other `layers`.
    """
    if layers not in ("ffn", "all"):
        raise RequestError(f"quantize_layers {layers!r} is neither ffn nor all")
    found = (
        path
        for path, leaf in model.named_modules()
        if path.startswith("blocks.") and isinstance(leaf, Linear)
    )
    return [path for path in found if layers == "all" or ".ffn." in path]


def replace_with_quantised(
    model: nn.Module,
    paths: Iterable[str],
    mode: Quantization,
    dtype: torch.dtype,
    device: torch.device | str,
    way: Way | None = None,
    gpu: Gpu | None = None,
    folder: str | None = None,
) -> None:
    """Replace each of these layers by an empty `QuantLinear`, on meta if they are on meta.

    Args:
        paths: of `quantizable_layers`.
        dtype: that they compute in.
        device: where they will run, which decides the way.
        way: the way itself (tests, benchmarks).
        gpu, folder: as in `choose_way`.

    Raises:
        RequestError: for an unknown mode, or a device without its dtype.
    """
    device = torch.device(device)
    if mode not in QUANTIZATIONS:
        raise RequestError(f"quantize {mode!r} is none of {', '.join(QUANTIZATIONS)}")
    if mode == "fp8" and device.type == "mps":
        raise RequestError("quantize fp8: Apple GPUs have no float8; use --quantize int8 or nf4")
    for path in paths:
        old = model.get_submodule(path)
        if not isinstance(old, Linear):
            raise ValueError(f"{path} is a {type(old).__name__}, not a Linear layer")
        in_features, out_features = old.in_features, old.out_features
        chosen = way or choose_way(mode, dtype, device, in_features, out_features, gpu, folder)
        with torch.device(old.weight.device):
            new = QuantLinear(in_features, out_features, old.bias is not None, mode, dtype, chosen)
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, new.train(old.training))


class QuantLinear(nn.Module):
    """A matmul with a quantised weight in `compute_dtype`; the float32 bias is rounded to that.

    data: float8 or int8 [out, in]; nf4: uint8 [out, in padded to blocks / 2], the first of two
        values in the upper four bits.
    scale: float32 [out, 1]; nf4: bfloat16 [out, blocks]. bfloat16 loses nothing measurable, since
        values are rounded with the scale as stored; unlike float16 it has room for any weight's.
    levels: nf4 only: float32 [16]; a parameter, so that it moves with the leaf.

    `.to` and its relatives move the leaf between devices and convert nothing. There is no `weight`;
    `dense` returns it.
    """

    data: nn.Parameter
    scale: nn.Parameter
    levels: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        mode: Quantization,
        compute_dtype: torch.dtype,
        way: Way = "weight-only",
    ) -> None:
        super().__init__()
        known = way in get_args(Way) and way in ("weight-only", ROUNDING.get(mode))
        if not known or (way == "scaled_mm" and compute_dtype != torch.bfloat16):
            raise ValueError(f"{way} is no way to multiply {mode} in {compute_dtype}")
        self.in_features, self.out_features = in_features, out_features
        self.mode, self.compute_dtype, self.way = mode, compute_dtype, way

        def empty(dtype: torch.dtype, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)

        if mode == "nf4":
            blocks = -(-in_features // BLOCK)
            self.data = empty(torch.uint8, out_features, blocks * BLOCK // 2)
            self.scale = empty(torch.bfloat16, out_features, blocks)
            self.levels = empty(torch.float32, len(NF4))
        else:
            self.data = empty(
                torch.float8_e4m3fn if mode == "fp8" else torch.int8, out_features, in_features
            )
            self.scale = empty(torch.float32, out_features, 1)
        self.register_parameter("bias", empty(torch.float32, out_features) if bias else None)

    @torch.no_grad()
    def quantise(self, weight: Tensor) -> dict[str, Tensor]:
        """Return this leaf's parameters, but the bias, for a weight [out, in] or rows of it.

        They are on the weight's device. A few rows are quantised at a time, which keeps temporaries
        small.

        Raises:
            RequestError: where the weight has values that are not finite.
            ValueError: for a weight of another shape.
        """
        if weight.shape[1:] != (self.in_features,) or len(weight) > self.out_features:
            raise ValueError(
                f"a weight {list(weight.shape)} is not [{self.out_features}, {self.in_features}],"
                " nor rows of it"
            )
        parts = {
            name: torch.empty(len(weight), *p.shape[1:], dtype=p.dtype, device=weight.device)
            for name, p in (("data", self.data), ("scale", self.scale))
        }
        round_rows = _round_nf4 if self.mode == "nf4" else _round_row
        step = max(1, (CHUNK if weight.device.type == "cpu" else CHUNK_GPU) // self.in_features)
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            round_rows(
                weight[rows].float(), parts["data"][rows], parts["scale"][rows], LARGEST[self.mode]
            )
        if not parts["scale"].isfinite().all():  # NaN and infinities reach the scale of their row
            raise RequestError(
                f"a weight {list(weight.shape)} has values that are not finite, which {self.mode}"
                " cannot round; its file, or that of a fused LoRA, is damaged: fetch it again"
            )
        if self.mode == "nf4":
            parts["levels"] = torch.tensor(NF4, device=weight.device)
        return parts

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight [out, in], in `dtype` or `compute_dtype`."""
        return self._rows(slice(None), dtype or self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] of `compute_dtype` for x [..., in] of any float dtype.

        Where x is not finite, its token's results are not finite.
        """
        needs_gradient = torch.is_grad_enabled() and x.requires_grad  # and rounding has none
        if self.way == "weight-only" or needs_gradient:
            return multiply(x, self._rows, self.out_features, self.bias, self.compute_dtype)
        tokens = x.reshape(-1, self.in_features)
        product = rounding.multiply(tokens, self.data, self.scale, self.bias, self.compute_dtype)
        return product.view(*x.shape[:-1], self.out_features)

    def _rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        data, scale = self.data[rows], self.scale[rows]
        if self.mode == "fp8":
            return unpack("F8_E4M3", data, scale, dtype)
        fill = (
            _nf4_into(data, scale, self.levels) if self.mode == "nf4" else _int8_into(data, scale)
        )
        return fill_rows(len(data), self.in_features, dtype, data, fill)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        super()._apply(without_conversion(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return (
            f"{self.out_features} x {self.in_features}, {self.mode}, {self.way}, computes in"
            f" {self.compute_dtype}"
        )


def _round_row(weight: Tensor, data: Tensor, scale: Tensor, largest: float) -> None:
    """Round weight [n, in] float32 into data [n, in], float8 or int8, and scale [n, 1]."""
    scale.copy_(rounding.scale_of(weight, largest))
    rounded = weight / scale
    data.copy_(rounded if data.is_floating_point() else rounded.round_())


def _round_nf4(weight: Tensor, data: Tensor, scale: Tensor, largest: float) -> None:
    """Round weight [n, in] float32 into data [n, padded in / 2] and scale [n, blocks]."""
    blocks = F.pad(weight, (0, data.shape[1] * 2 - weight.shape[1])).unflatten(1, (-1, BLOCK))
    scale.copy_(rounding.scale_of(blocks, largest).squeeze(-1))
    values = blocks / scale.float().unsqueeze(-1)
    codes = torch.zeros_like(values, dtype=torch.uint8)
    # The nearest level is the number of midpoints below: 2.7 times as fast as bucketize on a CPU.
    for low, high in pairwise(NF4):
        codes += values > (low + high) / 2
    first, second = codes.flatten(1).unflatten(1, (-1, 2)).unbind(-1)
    data.copy_(first << 4 | second)


def _int8_into(data: Tensor, scale: Tensor) -> Callable[[slice, Tensor], None]:
    def fill(rows: slice, out: Tensor) -> None:
        torch.mul(data[rows], scale[rows], out=out)

    return fill


def _nf4_into(data: Tensor, scale: Tensor, levels: Tensor) -> Callable[[slice, Tensor], None]:
    # [256, 2]: the two values of each byte
    pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), 1)

    def fill(rows: slice, out: Tensor) -> None:
        values = pairs.index_select(0, data[rows].reshape(-1).int()).view(-1, scale.shape[1], BLOCK)
        out.copy_(values.mul_(scale[rows].float().unsqueeze(-1)).flatten(1)[:, : out.shape[1]])

    return fill
