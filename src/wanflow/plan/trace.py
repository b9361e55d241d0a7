"""What the real code would allocate and compute, seen by running it on tensors that have no memory.

Fake *CPU* tensors: on those the fused attention stays one operation, as on a GPU, while on fake
CUDA or meta tensors it falls apart into a score matrix of 900 GB. Every storage counts once, from
the operation that makes it until nothing refers to it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Kind = Literal["matmul", "quantised", "attention", "convolution"]
DEVICE = torch.ops.prim.device.default


@dataclass(frozen=True)
class Held:
    """A storage that is alive: its bytes, and the operation that made it, with the shape that came
    of it.
    """

    nbytes: int
    made_by: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.nbytes / 1e9:8.3f} GB  {self.made_by} {list(self.shape)}"


@dataclass
class Work:
    """What a stretch of code computes: FLOPs by kind, in float32 and in lower precision apart, and
    the bytes moved by everything else.
    """

    flops: Counter[tuple[Kind, bool]] = field(default_factory=Counter)  # bool: in float32
    # bytes read and written by what is neither matmul, attention nor convolution; each operation by
    # itself, unfused
    traffic: int = 0
    kernels: int = 0

    def total(self) -> int:
        return sum(self.flops.values())

    def scaled(self, factor: float) -> Work:
        flops = Counter({key: round(value * factor) for key, value in self.flops.items()})
        return Work(flops, round(self.traffic * factor), round(self.kernels * factor))

    def __add__(self, other: Work) -> Work:
        flops = Counter(self.flops)
        flops.update(other.flops)
        return Work(flops, self.traffic + other.traffic, self.kernels + other.kernels)


@dataclass(frozen=True)
class Traced:
    """What a stretch takes beside its weights, in bytes, what it computes, and the largest storages
    at its peak.

    sent: bytes that this process sends to others, by what they are; messages: in how many
        collectives.
    """

    beside: int
    work: Work
    top: tuple[Held, ...] = ()
    sent: Mapping[str, int] = field(default_factory=dict)
    messages: int = 0


class Trace(TorchDispatchMode):
    """Counts while it is on. `live` and `peak` are bytes; `mark` begins a new stretch, of which the
    peak and the work are asked for.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.work = Work()
        self._held: dict[int, tuple[weakref.ref[Any], Held]] = {}
        self._at_peak: tuple[Held, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is DEVICE:
            return out
        inputs = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        made = [value for value in tree_iter(out) if isinstance(value, Tensor)]
        for value in made:
            self._see(value, func)
        self._count(func, args, kwargs or {}, inputs, made)
        return out

    def mark(self) -> None:
        """Forget peak and work so far; what is alive stays counted."""
        self.peak, self.work, self._at_peak = (
            self.live,
            Work(),
            tuple(held for _, held in self._held.values()),
        )

    def top(self, count: int = 12) -> list[Held]:
        """The largest that was alive at the peak."""
        return sorted(self._at_peak, key=lambda held: -held.nbytes)[:count]

    def _see(self, value: Tensor, func: Any) -> None:
        storage = value.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        known = self._held.get(key)
        if known is not None and known[1].nbytes == nbytes:
            return
        if known is not None:  # resized
            self.live -= known[1].nbytes
        held = Held(nbytes, str(func).removeprefix("aten."), tuple(value.shape))
        self._held[key] = (weakref.ref(storage, lambda _: self._gone(key)), held)
        self.live += nbytes
        if self.live > self.peak:
            self.peak = self.live
            self._at_peak = tuple(held for _, held in self._held.values())

    def _gone(self, key: int) -> None:
        self.live -= self._held.pop(key)[1].nbytes

    def _count(
        self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], made: list[Tensor]
    ) -> None:
        kind = KINDS.get(func.overloadpacket)
        if kind is not None:
            flops = _flops(kind, func.overloadpacket, args, kwargs, made[0])
            self.work.flops[kind, made[0].dtype == torch.float32] += flops
            self.work.kernels += 1
        elif not func.is_view and func not in FREE:
            self.work.traffic += sum(_nbytes(value) for value in (*inputs, *made))
            self.work.kernels += 1


aten = torch.ops.aten
FREE = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten._unsafe_view.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.detach.default,
}
KINDS: dict[Any, Kind] = {
    aten.mm: "matmul",
    aten.addmm: "matmul",
    aten.bmm: "matmul",
    aten.baddbmm: "matmul",
    aten._scaled_mm: "quantised",
    aten._int_mm: "quantised",
    aten._scaled_dot_product_flash_attention_for_cpu: "attention",
    aten._scaled_dot_product_flash_attention: "attention",
    aten._scaled_dot_product_efficient_attention: "attention",
    aten._scaled_dot_product_cudnn_attention: "attention",
    aten.convolution: "convolution",
}


def _nbytes(value: Tensor) -> int:
    """Bytes that reading a tensor moves: a broadcast one is read once."""
    return (
        value.dtype.itemsize
        * torch.Size(n for n, step in zip(value.shape, value.stride(), strict=True) if step).numel()
    )


def _flops(kind: Kind, packet: Any, args: Any, kwargs: Any, out: Tensor) -> int:
    """Two for every multiplication with its addition."""
    if kind == "convolution":
        x, weight, transposed = args[0], args[1], args[6]
        # Each input (transposed) or output value meets every tap of its group once.
        per_value = weight[0].numel() if not transposed else weight.shape[1] * weight[0, 0].numel()
        return 2 * (x if transposed else out).numel() * per_value
    if kind == "attention":
        q, k, v = args[:3]
        return 2 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (q.shape[3] + v.shape[3])
    first = args[1] if packet in (aten.addmm, aten.baddbmm) else args[0]
    return 2 * out.numel() * first.shape[-1]


@contextmanager
def fake() -> Iterator[Trace]:
    """Inside, tensors have no memory and a trace is on."""
    with torch.no_grad(), FakeTensorMode(), Trace() as trace:
        yield trace


def materialise(module: nn.Module, but: Collection[str] = ()) -> int:
    """Give a module on meta fake parameters, in the dtypes it is laid out in, and leave those named
    in `but`, by the end of their names;
    returns their bytes. To be called inside `fake`.
    """
    total = 0
    for name, parameter in list(module.named_parameters()):
        if any(name.endswith(f".{end}") for end in but):
            continue
        owner, _, leaf = name.rpartition(".")
        value = nn.Parameter(
            torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False
        )
        setattr(module.get_submodule(owner), leaf, value)
        total += value.nbytes
    return total
