"""Keep weights as small in memory as in their file, and unpack them where they are used.

A `Packed` is a value: the bytes of one tensor, and their format. `PackedLinear` and
`PackedEmbedding` are leaves that hold one instead of a weight, and unpack it for each call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanflow.config import RequestError
from wanflow.models.dit import Linear32
from wanflow.transforms import ggml
from wanflow.transforms.blocks import BLOCKS, ROTATED, rotate

FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
CODES = FP8 | dict.fromkeys(("int8", *ROTATED), torch.int8)  # one code for each value
LAYOUTS = ggml.LAYOUTS | BLOCKS
KINDS = (*CODES, *LAYOUTS)

# Values unpacked at a time; each takes 10 to 20 bytes of temporaries. That is 20 MB on a CPU, and
# more is no faster: 5120 x 5120 of Q4_K, on one core, into memory at hand, take 57 ms with 2^16, 30
# with 2^18, 22 with 2^20, 34 with 2^22. A GPU needs larger ones to be busy; 300 MB there
# (estimated, not measured).
CHUNK, CHUNK_GPU = 1 << 20, 1 << 24
# Bytes of unpacked weight that a matmul with few rows takes at a time. On a CPU small pieces are
# faster than the full weight too, whose memory comes fresh from the system each time: 5120 -> 13824
# of Q4_K in bf16 takes 82 ms for one row with 16 MB, 144 with 64, 168 at once; for 512 rows 487,
# 534 and 604 (372 with a plain weight).
PIECE, PIECE_GPU = 16 << 20, 256 << 20


@dataclass(frozen=True, eq=False)
class Packed:
    """A tensor as its file stores it.

    kind: a key of `CODES` ("F8_E4M3", "int8") or of `LAYOUTS` (a GGML type, as "Q4_K"; "nvfp4").
    shape: of the unpacked tensor.
    data: codes: float8 or int8 of `shape`; blocks: uint8 [rows, bytes per row], the blocks of all
        values in order.
    scale: float32, [] or [1]; of codes also [out], [out, 1] or [out, blocks, 1], where out is the
        first side of `shape`; value = data * scale, and after that rows are rotated (`ROTATED`).

    Raises:
        RequestError: for an unknown kind, or data or scale that do not fit the shape.
    """

    kind: str
    shape: tuple[int, ...]
    data: Tensor
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        values, out = math.prod(self.shape), self.shape[0] if self.shape else 1
        _check_kind(self.kind)
        if self.kind in CODES:
            fits = self.data.dtype == CODES[self.kind] and self.data.shape == self.shape
            fits &= not math.prod(self.shape[1:]) % ROTATED.get(self.kind, 1)
        else:
            layout = LAYOUTS[self.kind]
            fits = (
                self.data.dtype == torch.uint8
                and self.data.numel() * layout.values == values * layout.nbytes
            )
        if not fits:
            raise RequestError(
                f"{self.kind} data {list(self.data.shape)} of {self.data.dtype} do not fit a tensor"
                f" {list(self.shape)}"
            )
        if self.scale is None or self.scale.numel() == 1:
            return
        count = self.scale.numel()
        if (
            self.kind not in CODES
            or not out
            or self.scale.shape[:1] != (out,)
            or count % out
            or (values // out) % max(1, count // out)
        ):
            raise RequestError(
                f"a scale {list(self.scale.shape)} does not fit a {self.kind} tensor"
                f" {list(self.shape)}"
            )

    def rows(self, rows: slice | Tensor) -> Packed:
        """Return rows of the first side, still packed: a slice (a view), or indices [n].

        Raises:
            ValueError: where a row is not a multiple of a block (its file has another shape).
        """
        data, scale = self.data, self.scale
        if self.kind in LAYOUTS:
            if math.prod(self.shape[1:]) % LAYOUTS[self.kind].values:
                raise ValueError(
                    f"a row of {list(self.shape)} is no multiple of {self.kind} blocks"
                )
            data = data.reshape(self.shape[0], data.numel() // max(1, self.shape[0]))
        if scale is not None and scale.numel() > 1:
            scale = scale[rows]
        data = _pick(data, rows)
        return replace(self, shape=(len(data), *self.shape[1:]), data=data, scale=scale)

    def dense(
        self, dtype: torch.dtype = torch.float32, rows: slice | Tensor | None = None
    ) -> Tensor:
        """Return the tensor, or rows of its first side, unpacked on the data's device.

        It is computed in float32 and rounded once to `dtype`.
        """
        if rows is not None:
            return self.rows(rows).dense(dtype)
        data = self.data
        if self.kind in CODES:
            data = data.reshape(self.shape[0] if self.shape else 1, math.prod(self.shape[1:]))
        return unpack(self.kind, data, _by_row(self.scale, len(data)), dtype).view(self.shape)

    def stream(self, values: int) -> Iterator[Tensor]:
        """Yield all values in order, in float32: 1-D, about `values` of them at a time."""
        packed, count = self, math.prod(self.shape)
        if not self.shape or not count:
            yield self.dense().flatten()
            return
        if self.kind in LAYOUTS:  # blocks follow one another in any shape
            layout = LAYOUTS[self.kind]
            blocks = self.data.reshape(-1, layout.nbytes)
            packed = replace(self, shape=(count // layout.values, layout.values), data=blocks)
        step = max(1, values // math.prod(packed.shape[1:]))
        for start in range(0, packed.shape[0], step):
            yield packed.dense(rows=slice(start, start + step)).flatten()


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise RequestError(f"packed weights of kind {kind}: expected one of {', '.join(KINDS)}")


def block(kind: str) -> int:
    """Return how many values of a row are packed together; a row is a multiple of them."""
    return LAYOUTS[kind].values if kind in LAYOUTS else ROTATED.get(kind, 1)


def _pick(data: Tensor, rows: slice | Tensor) -> Tensor:
    """data[rows]; as bytes, because not every device can index float8."""
    return data[rows] if isinstance(rows, slice) else data.view(torch.uint8)[rows].view(data.dtype)


def _by_row(scale: Tensor | None, out: int) -> Tensor | None:
    """A scale as `unpack` expects it: float32, [] or [out, blocks]."""
    if scale is None:
        return None
    return scale.float().reshape(() if scale.numel() == 1 else (out, -1))


def unpack(kind: str, data: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the values [rows, values] of data: [rows, codes, or bytes of blocks].

    scale: [], or of codes [rows, blocks].
    """
    layout = LAYOUTS.get(kind)
    flat = data if layout is None else data.reshape(-1, layout.nbytes)
    columns = flat.shape[1] if layout is None else layout.values

    def fill(rows: slice, out: Tensor) -> None:
        if layout is None:
            _codes(flat[rows], scale if scale is None or scale.ndim == 0 else scale[rows], out)
            if kind in ROTATED:
                rotate(out, ROTATED[kind])
        else:
            layout.fill(flat[rows], out)
            if scale is not None:
                out.mul_(scale)

    out = fill_rows(len(flat), columns, dtype, data, fill)
    return out.view(len(data), out.numel() // max(1, len(data)))


def fill_rows(
    count: int,
    columns: int,
    dtype: torch.dtype,
    like: Tensor,
    fill: Callable[[slice, Tensor], None],
) -> Tensor:
    """Return [count, columns] of `dtype`, on `like`'s device, filled a few rows at a time.

    torch.compile gets all rows at once: it fuses the temporaries, and would unroll a loop.

    Args:
        fill: writes the float32 values of some rows.
    """
    out = torch.empty(count, columns, dtype=dtype, device=like.device)
    step = max(1, (CHUNK if like.device.type == "cpu" else CHUNK_GPU) // max(1, columns))
    if torch.compiler.is_compiling() or like.is_meta:
        step = max(1, count)
    for start in range(0, count, step):
        rows = slice(start, start + step)
        part = out[rows]
        values = part if dtype == torch.float32 else torch.empty_like(part, dtype=torch.float32)
        fill(rows, values)
        if values is not part:
            part.copy_(values)
    return out


def _codes(data: Tensor, scale: Tensor | None, out: Tensor) -> None:
    """Unpack data [n, columns] into out, float32; scale [] or [n, blocks]."""
    if data.device.type == "cpu" and data.dtype in FP8.values():
        # torch converts an e4m3 value in 3 ns here, and looks one up in a table in 0.7.
        table = torch.arange(256, dtype=torch.uint8).view(data.dtype).float()
        out.copy_(table.index_select(0, data.reshape(-1).view(torch.uint8).int()).view(out.shape))
    else:
        out.copy_(data)
    if scale is not None and scale.ndim:
        out.unflatten(1, (scale.shape[1], -1)).mul_(scale.unsqueeze(-1))
    elif scale is not None:
        out.mul_(scale)


class PackedLeaf(nn.Module):
    """A packed weight [out, in].

    Its parameters are `data` as in `Packed`, and `scale` [], [out, blocks] or None.
    There is no `weight`; `dense` returns it. `compute_dtype` is fixed when the leaf is made: `.to`
    and its relatives move it between devices and convert nothing, since a conversion would break
    float8 data and their float32 scales.

    Raises:
        RequestError: for an unknown kind.
        ValueError: where a row is not a multiple of a block.
    """

    data: nn.Parameter
    scale: nn.Parameter | None

    def __init__(self, rows: int, columns: int, kind: str, compute_dtype: torch.dtype) -> None:
        super().__init__()
        _check_kind(kind)
        self.shape = (rows, columns)
        self.kind, self.compute_dtype = kind, compute_dtype
        if columns % block(kind):
            raise ValueError(f"{columns} values are no multiple of {kind} blocks")
        if kind in CODES:
            data = torch.empty(rows, columns, dtype=CODES[kind])
        else:
            nbytes = columns // LAYOUTS[kind].values * LAYOUTS[kind].nbytes
            data = torch.empty(rows, nbytes, dtype=torch.uint8)
        self.data = nn.Parameter(data, requires_grad=False)
        self.register_parameter("scale", None)

    def expect(self, scale: tuple[int, ...] | None) -> None:
        """Make an empty scale of this shape, so that a model on meta has its final size."""
        if scale is not None:
            empty = _by_row(torch.empty(scale, device=self.data.device), self.shape[0])
            self.scale = nn.Parameter(cast(Tensor, empty), requires_grad=False)

    def parts(self, packed: Packed) -> dict[str, Tensor]:
        """Return this leaf's parameters for a tensor or rows of it, on the tensor's device.

        Raises:
            ValueError: for one of another kind or shape.
        """
        rows = packed.shape[0]
        if packed.kind != self.kind or packed.shape[1:] != self.shape[1:] or rows > self.shape[0]:
            raise ValueError(
                f"{packed.kind} {list(packed.shape)} is not {self.kind} {list(self.shape)}, nor"
                " rows of it"
            )
        scale = _by_row(packed.scale, rows)
        return {
            "data": packed.data.reshape(rows, *self.data.shape[1:]),
            **({} if scale is None else {"scale": scale}),
        }

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight [out, in], in `dtype` or `compute_dtype`."""
        return self._rows(slice(None), dtype or self.compute_dtype)

    def _rows(self, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        scale = self.scale if self.scale is None or self.scale.ndim == 0 else self.scale[rows]
        return unpack(self.kind, _pick(self.data, rows), scale, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLeaf:
        super()._apply(without_conversion(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return f"{self.shape[0]} x {self.shape[1]}, {self.kind}, computes in {self.compute_dtype}"


class PackedLinear(PackedLeaf):
    """A matmul with a packed weight in `compute_dtype`; the float32 bias is rounded to that."""

    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool, kind: str, compute_dtype: torch.dtype
    ) -> None:
        super().__init__(out_features, in_features, kind, compute_dtype)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] of `compute_dtype` for x [..., in] of any float dtype."""
        return multiply(x, self._rows, self.out_features, self.bias, self.compute_dtype)


def without_conversion(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function of `.to` and its relatives that moves tensors and keeps their dtype."""

    def move(tensor: Tensor) -> Tensor:
        new = fn(tensor)
        return new if new.dtype == tensor.dtype else tensor.to(new.device)

    return move


def features_at_a_time(x: Tensor, out_features: int, dtype: torch.dtype) -> int:
    """Return how many output features `multiply` computes at a time for x [..., in].

    All, where x has more rows than an eighth of its columns: the result is nearly as large as the
    weight, copying pieces into it costs what they save, and the matmul is long enough to hide the
    rest. For few rows pieces bound the memory too: time_projection as fp8 (5120 -> 30720, float32)
    takes 629 MB at once. torch.compile gets all.
    """
    columns = x.shape[-1]
    if torch.compiler.is_compiling() or x.numel() * 8 > columns**2:
        return out_features
    return max(1, (PIECE if x.device.type == "cpu" else PIECE_GPU) // (columns * dtype.itemsize))


def multiply(
    x: Tensor,
    weight: Callable[[slice, torch.dtype], Tensor],
    out_features: int,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return [..., out] of `dtype` for x [..., in]; `weight` unpacks some of its rows."""
    step = features_at_a_time(x, out_features, dtype)
    x = x.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if step >= out_features:
        return F.linear(x, weight(slice(None), dtype), bias)
    out = x.new_empty(*x.shape[:-1], out_features)
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        out[..., rows] = F.linear(x, weight(rows, dtype), None if bias is None else bias[rows])
    return out


class PackedEmbedding(PackedLeaf):
    """A packed table [count, size]; only the requested rows are unpacked."""

    def forward(self, ids: Tensor) -> Tensor:
        """Return [..., size] of `compute_dtype` for ids [...]."""
        return self._rows(ids.flatten(), self.compute_dtype).view(*ids.shape, self.shape[1])


def replace_with_packed(module: nn.Module, packings: Mapping[str, str], dtype: torch.dtype) -> None:
    """Replace Linear and Embedding layers by packed leaves.

    For a model on meta: the new leaves are empty, and so are their biases. A Linear32 still
    computes in float32, the others compute in `dtype`. Other parameters stay, and so do rows that
    are no multiple of a block: the loader unpacks those.

    Args:
        packings: {name of a parameter: kind}.

    Raises:
        RequestError: for an unknown kind.
    """
    leaves = {
        f"{path}.weight": path
        for path, leaf in module.named_modules()
        if path and isinstance(leaf, nn.Linear | nn.Embedding)
    }
    for name, kind in packings.items():
        old = module.get_submodule(leaves[name]) if name in leaves else None
        if not isinstance(old, nn.Linear | nn.Embedding) or old.weight.shape[1] % block(kind):
            continue
        parent, _, last = leaves[name].rpartition(".")
        new: PackedLeaf
        with torch.device(old.weight.device):
            if isinstance(old, nn.Embedding):
                new = PackedEmbedding(old.num_embeddings, old.embedding_dim, kind, dtype)
            else:
                compute = torch.float32 if isinstance(old, Linear32) else dtype
                new = PackedLinear(
                    old.in_features, old.out_features, old.bias is not None, kind, compute
                )
        setattr(module.get_submodule(parent), last, new.train(old.training))
