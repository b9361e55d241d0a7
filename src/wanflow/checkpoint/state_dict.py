"""Walk the pickle of a state dict: dicts, text, numbers and places of tensors. Nothing is called.

torch.load with `weights_only` runs no code of a file, but calls codecs, hashes nested tuples and
allocates what a pickle asks for. Here only the opcodes and globals that torch.save writes for a
state dict are known. Work and memory are bounded by the length of the pickle.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

LONGEST = 4 << 20  # bytes of a pickle; that of a text encoder has 0.04 MB
MOST_STEPS = 1 << 21
MOST_SIDES = 8
LARGEST = 1 << 63

# Names in `torch` -> dtype. A storage without a dtype of its own counts bytes.
STORAGES: dict[str, torch.dtype | None] = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.storage.UntypedStorage": None,
}
DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
# Values that a training checkpoint may hold beside tensors, and that mean nothing here.
OTHERS = ("torch.Tensor", "torch.nn.parameter.Parameter")


class Foreign(ValueError):
    """A pickle holds more than a state dict."""


@dataclass(frozen=True)
class Storage:
    """A record of the zip: `count` values of a dtype, or bytes where there is none."""

    key: str
    dtype: torch.dtype | None
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in a storage, in values of its dtype."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Named:
    """A global, by its name."""

    name: str


def walk(data: bytes) -> Any:
    """Return what a pickle describes.

    Raises:
        Foreign: for a global or a step that no state dict has; it is in words.
        ValueError: for a damaged one.
    """
    if len(data) > LONGEST:
        raise Foreign(f"a pickle of {len(data):,} bytes")
    machine = _Machine()
    for count, (opcode, value, _) in enumerate(pickletools.genops(data)):
        if count >= MOST_STEPS:
            raise Foreign(f"a pickle of more than {MOST_STEPS:,} steps")
        if opcode.name == "STOP":
            (result,) = machine.stack
            return result
        step = STEPS.get(opcode.name)
        if step is None:
            raise Foreign(f"a pickle with the step {opcode.name}")
        step(machine, value)
    raise ValueError("it has no end")


class _Machine:
    """The stack of a pickle and what it remembers."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        if not self.stack or (self.marks and len(self.stack) <= self.marks[-1]):
            raise ValueError("it takes more than it has")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise ValueError("it lacks a mark")
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise Foreign(f"an object that is no {kind.__name__}")
        return self.stack[-1]

    def push(self, value: Any) -> None:
        if type(value) is int and not -LARGEST <= value < LARGEST:
            raise Foreign("a number of more than 64 bits")
        self.stack.append(value)

    def push_global(self, name: str) -> None:
        if name not in STORAGES and name not in DTYPES and name not in OTHERS and name not in CALLS:
            raise Foreign(name)
        self.stack.append(Named(name))

    def remember(self, index: int | None) -> None:
        if not self.stack:
            raise ValueError("it remembers nothing")
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError("it recalls what it does not have")
        self.stack.append(self.memo[index])

    def take(self, count: int) -> None:
        """Push the last `count` values as a tuple."""
        self.stack.append(tuple(self.pop() for _ in range(count))[::-1])

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a global has no name")
        self.push_global(f"{module}.{name}")

    def put(self, pairs: list[Any]) -> None:
        """Put pairs into the dict below; its keys are text or numbers, whose hash is cheap."""
        held = self.top(dict)
        if len(pairs) % 2:
            raise ValueError("a key has no value")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) not in (str, int):
                raise Foreign(f"a dict with keys of the kind {type(key).__name__}")
            held[key] = value

    def build(self) -> None:
        """Set attributes of a dict (OrderedDict's `_metadata`), which mean nothing here."""
        self.pop()
        self.top(dict)

    def load_storage(self) -> None:
        match self.pop():
            case ("storage", Named(kind), str(key), str(), int(count)) if kind in STORAGES:
                if count < 0:
                    raise ValueError("a storage of a negative size")
                self.stack.append(Storage(key, STORAGES[kind], count))
            case _:
                raise Foreign("a reference that is no storage")

    def call(self) -> None:
        args, function = self.pop(), self.pop()
        if not isinstance(function, Named) or function.name not in CALLS:
            raise Foreign(f"a call of {getattr(function, 'name', type(function).__name__)}")
        if type(args) is not tuple:
            raise ValueError("a call without arguments")
        self.stack.append(CALLS[function.name](*args[:9]))


# What torch.save calls


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *_: Any, dtype: torch.dtype | None = None
) -> StoredTensor:
    sides = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)
    if not isinstance(storage, Storage) or not sides or len(shape) > MOST_SIDES:
        raise ValueError("a tensor without a place")
    if any(type(value) is not int or value < 0 for value in (offset, *shape, *strides)):
        raise ValueError("a tensor with a negative place")
    found = dtype or storage.dtype
    if found is None:
        raise ValueError("a tensor without a dtype")
    return StoredTensor(storage, found, offset, shape, strides)


def _typed_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> StoredTensor:
    if not isinstance(dtype, Named) or dtype.name not in DTYPES:
        raise ValueError("a tensor without a dtype")
    return _tensor(storage, offset, shape, strides, dtype=DTYPES[dtype.name])


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _ordered_dict(*args: Any) -> dict[Any, Any]:
    if args:
        raise Foreign("an OrderedDict of another form")
    return {}


def _subclass(function: Any, kind: Any, args: Any, *_: Any) -> Any:
    known = isinstance(function, Named) and function.name in TENSORS
    if not known or not isinstance(kind, Named) or type(args) is not tuple:
        raise Foreign("a subclass of Tensor")
    return TENSORS[function.name](*args[:9])


def _size(sides: Any = ()) -> tuple[Any, ...]:
    return tuple(sides) if isinstance(sides, list | tuple) else ()


TENSORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
CALLS: dict[str, Callable[..., Any]] = {
    **TENSORS,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _size,
    "torch.device": lambda *_: Named("a device"),
    "torch.serialization._get_layout": lambda *_: Named("a layout"),
    "torch._utils._rebuild_sparse_tensor": lambda *_: Named("a sparse tensor"),
}


# What each opcode does


def _global(machine: _Machine, value: str) -> None:
    machine.push_global(value.replace(" ", ".", 1))


def _append(machine: _Machine, value: Any) -> None:
    item = machine.pop()
    machine.top(list).append(item)


def _set_item(machine: _Machine, value: Any) -> None:
    last = machine.pop()
    machine.put([machine.pop(), last])


def _extend(machine: _Machine, value: Any) -> None:
    items = machine.pop_to_mark()
    machine.top(list).extend(items)


def _dict(machine: _Machine, value: Any) -> None:
    pairs = machine.pop_to_mark()
    machine.push({})
    machine.put(pairs)


Step = Callable[[_Machine, Any], None]
PUSHED = (
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 UNICODE BININT BININT1 BININT2 INT LONG LONG1 LONG4"
    " BINFLOAT FLOAT"
)
STEPS: dict[str, Step] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, value: None),
    **dict.fromkeys(PUSHED.split(), _Machine.push),
    "NONE": lambda machine, value: machine.push(None),
    "NEWTRUE": lambda machine, value: machine.push(True),
    "NEWFALSE": lambda machine, value: machine.push(False),
    "EMPTY_DICT": lambda machine, value: machine.push({}),
    "EMPTY_LIST": lambda machine, value: machine.push([]),
    "EMPTY_TUPLE": lambda machine, value: machine.push(()),
    "MARK": lambda machine, value: machine.marks.append(len(machine.stack)),
    "DICT": _dict,
    "LIST": lambda machine, value: machine.push(machine.pop_to_mark()),
    "TUPLE": lambda machine, value: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, value: machine.take(1),
    "TUPLE2": lambda machine, value: machine.take(2),
    "TUPLE3": lambda machine, value: machine.take(3),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.remember),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.recall),
    "GLOBAL": _global,
    "STACK_GLOBAL": lambda machine, value: machine.stack_global(),
    "BINPERSID": lambda machine, value: machine.load_storage(),
    "REDUCE": lambda machine, value: machine.call(),
    "SETITEM": _set_item,
    "SETITEMS": lambda machine, value: machine.put(machine.pop_to_mark()),
    "APPEND": _append,
    "APPENDS": _extend,
    "BUILD": lambda machine, value: machine.build(),
}
