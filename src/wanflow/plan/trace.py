"""Measure what code would allocate and compute, by running it on tensors without memory.

Fake *CPU* tensors: on those the fused attention stays one operation, as on a GPU. On fake CUDA or
meta tensors it falls apart into a score matrix of 900 GB. Every storage counts once, from the
operation that makes it until the last reference is gone.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from wanflow.parallel.groups import CommStats
from wanflow.units import memory_size

Kind = Literal["matmul", "quantised", "attention", "convolution"]
DEVICE = torch.ops.prim.device.default


@dataclass(frozen=True)
class Storage:
    """A live storage: its bytes, and the operation and shape that made it."""

    nbytes: int
    made_by: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{memory_size(self.nbytes):>10}  {self.made_by} {list(self.shape)}"


@dataclass
class Work:
    """FLOPs by (kind, whether in float32), and the cost of all other operations.

    Attributes:
        traffic: bytes that elementwise operations read and write, unfused.
        kernels: the number of operations.
    """

    flops: Counter[tuple[Kind, bool]] = field(default_factory=Counter)
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

    def __sub__(self, other: Work) -> Work:
        return self + other.scaled(-1)


@dataclass(frozen=True)
class Traced:
    """The cost of a stretch of code.

    Attributes:
        activations: peak bytes besides the weights.
        top: the largest storages at the peak.
        sent: bytes that this rank sends, by content.
        messages: the number of collectives.
    """

    activations: int
    work: Work
    top: tuple[Storage, ...] = ()
    sent: Mapping[str, int] = field(default_factory=dict)
    messages: int = 0


class Trace(TorchDispatchMode):
    """Count bytes, work and communication of everything that runs inside it.

    Attributes:
        live, peak: bytes.
        stats: counts what the code under trace sends.
    """

    def __init__(self, stats: CommStats | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stats = stats or CommStats()
        self.live = self.peak = 0
        self._storages: dict[int, tuple[weakref.ref[Any], Storage]] = {}
        self._times, self._inside = 1, False
        self.mark()

    def mark(self) -> None:
        """Start a new stretch: reset the peak, work and communication."""
        self.peak, self.work = self.live, Work()
        self._at_peak = self._alive()
        self._sent, self._messages = Counter[str](), 0
        self.stats.reset()

    def count_as(self, times: int) -> None:
        """Count each operation from here on as `times` operations."""
        self._collect()
        self._times = times

    def repeat(self, module: nn.Module, times: int) -> None:
        """Count each call of a module as `times` calls."""
        module.register_forward_pre_hook(lambda *_: self.count_as(times))
        module.register_forward_hook(lambda *_: self.count_as(1))

    def as_one(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Run a function, and count it as one operation without temporaries."""
        self._inside = True
        try:
            out = func(*args, **kwargs)
        finally:
            self._inside = False
        self._add(out, func.__name__)
        moved = sum(_nbytes(value) for value in (*args, out) if isinstance(value, Tensor))
        self.work.traffic += moved * self._times
        self.work.kernels += self._times
        return out

    def result(self, weights: int) -> Traced:
        """Return the cost since the last mark; `weights` are the bytes to leave out."""
        self._collect()
        sent = {what: count for what, count in self._sent.items() if count}
        return Traced(self.peak - weights, self.work, self.top(), sent, self._messages)

    def top(self, count: int = 12) -> tuple[Storage, ...]:
        """Return the largest storages at the peak."""
        return tuple(sorted(self._at_peak, key=lambda storage: -storage.nbytes)[:count])

    def _collect(self) -> None:
        for what, count in self.stats.sent.items():
            self._sent[what] += count * self._times
        self._messages += sum(self.stats.calls.values()) * self._times
        self.stats.reset()

    def _alive(self) -> tuple[Storage, ...]:
        return tuple(storage for _, storage in self._storages.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is DEVICE or self._inside:
            return out
        inputs = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        outputs = [value for value in tree_iter(out) if isinstance(value, Tensor)]
        for value in outputs:
            self._add(value, str(func).removeprefix("aten."))
        self._count(func, args, inputs, outputs)
        return out

    def _add(self, value: Tensor, made_by: str) -> None:
        data = value.untyped_storage()
        key, nbytes = data._cdata, data.nbytes()
        known = self._storages.get(key)
        if known is not None and known[1].nbytes == nbytes:
            return
        if known is not None:  # resized
            self.live -= known[1].nbytes
        storage = Storage(nbytes, made_by, tuple(value.shape))
        self._storages[key] = (weakref.ref(data, lambda _: self._remove(key)), storage)
        self.live += nbytes
        if self.live > self.peak:
            self.peak, self._at_peak = self.live, self._alive()

    def _remove(self, key: int) -> None:
        self.live -= self._storages.pop(key)[1].nbytes

    def _count(self, func: Any, args: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        kind = KINDS.get(func.overloadpacket)
        if kind is not None:
            flops = _flops(kind, func.overloadpacket, args, outputs[0])
            self.work.flops[kind, outputs[0].dtype == torch.float32] += flops * self._times
        elif func.is_view or func in FREE:
            return
        else:
            moved = sum(_nbytes(value) for value in (*inputs, *outputs))
            self.work.traffic += moved * self._times
        self.work.kernels += self._times


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
    """Return the bytes that reading a tensor moves: broadcast dimensions are read once."""
    stored = [n for n, stride in zip(value.shape, value.stride(), strict=True) if stride]
    return value.dtype.itemsize * torch.Size(stored).numel()


def _flops(kind: Kind, packet: Any, args: Any, out: Tensor) -> int:
    """Return the FLOPs of an operation: two for each multiplication with its addition."""
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


class OneNorm(TorchFunctionMode):
    """Count an RMS norm as the one operation that it is on a GPU; a CPU has it in eight."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.rms_norm:
            return self.trace.as_one(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def fake(stats: CommStats | None = None, fused: bool = False) -> Iterator[Trace]:
    """Trace the code inside, on tensors without memory.

    Args:
        stats: counts what it sends.
        fused: as a GPU runs it, where some operations are one that are several on a CPU.
    """
    with torch.no_grad(), FakeTensorMode(), Trace(stats) as trace, ExitStack() as stack:
        if fused:
            stack.enter_context(OneNorm(trace))
        yield trace


def materialise(module: nn.Module, skip: Collection[str] = ()) -> int:
    """Give a module on meta fake parameters of its own dtypes; return their bytes.

    Call it inside `fake`. Parameters whose names end with one of `skip` stay on meta.
    """
    total = 0
    for name, parameter in list(module.named_parameters()):
        if any(name.endswith(f".{end}") for end in skip):
            continue
        owner, _, leaf = name.rpartition(".")
        value = torch.empty(parameter.shape, dtype=parameter.dtype)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
        total += value.nbytes
    return total
