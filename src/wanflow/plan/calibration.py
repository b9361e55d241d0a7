"""Hold what `wanflow bench` measured on a device, in place of what the plan assumes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from wanflow.config import RequestError
from wanflow.plan.cards import Rates
from wanflow.runtime import DTYPES
from wanflow.untrusted import printable, read_json, shown

FORMAT = 1  # of the JSON object
MOST_BYTES = 1 << 22  # of the file; a whole document of `wanflow bench --check` takes 0.1 MB
RATES = ("matmul", "attention", "float32", "low", "memory", "copy", "disk", "launch")
NEW = "make a new one: wanflow bench --check --json > calibration.json"


def _measured(least: float, most: float) -> Any:
    """Declare a field that a measurement fills; the range is what any device could give."""
    return field(default=None, metadata={"range": (least, most)})


@dataclass(frozen=True)
class Calibration:
    """Rates and overheads of one device; None where nothing was measured.

    `wanflow bench --check` measures all of them, `wanflow bench` some.

    Attributes:
        device: the name that the driver gives.
        device_memory: its bytes.
        dtype: of `matmul` and `attention`.
        versions: of torch, CUDA and cuDNN.
        matmul: FLOP/s of a block's linears at 75,600 tokens.
        attention: FLOP/s of the fastest sound kernel at 75,600 tokens and the model's width.
        float32: FLOP/s of convolutions: those of a decode, over its seconds without traffic.
        low: FLOP/s of the FFN pair with fp8 or int8 weights and tokens.
        memory: bytes/s of elementwise operations in an eager block, unfused as the trace counts.
        copy: bytes/s from pinned RAM to the device.
        disk: bytes/s of reading a file that the system has not cached.
        launch: seconds of the shortest operation.
        compiled: seconds of a compiled block, as a share of the same block's in eager mode.
        context: bytes of device memory that a process takes before its first tensor.
        workspace: bytes that a decode allocates beyond its traced tensors.
        fragmentation: bytes that the allocator reserves beyond those in use, as a share of them.
    """

    device: str
    device_memory: int
    dtype: str
    versions: Mapping[str, str] = field(default_factory=dict)
    matmul: float | None = _measured(1e3, 1e18)
    attention: float | None = _measured(1e3, 1e18)
    float32: float | None = _measured(1e3, 1e18)
    low: float | None = _measured(1e3, 1e18)
    memory: float | None = _measured(1e3, 1e16)
    copy: float | None = _measured(1e3, 1e16)
    disk: float | None = _measured(1e3, 1e16)
    launch: float | None = _measured(1e-9, 1.0)
    compiled: float | None = _measured(1e-3, 1e3)
    context: int | None = _measured(0, 2**40)
    workspace: int | None = _measured(0, 2**44)
    fragmentation: float | None = _measured(0.0, 10.0)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object, without what was not measured."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return {"format": FORMAT, **known, "versions": dict(self.versions)}

    def rates(self, assumed: Rates | None) -> Rates | None:
        """Return rates with what was measured in place of what was assumed.

        None: nothing is assumed of the device, and not all was measured.
        """
        found = {name: getattr(self, name) for name in RATES if getattr(self, name) is not None}
        if not found:
            return assumed
        if assumed is not None:
            return replace(assumed, **found, source="wanflow bench")
        found = {"low": 0.0, **found}
        return Rates(**found, source="wanflow bench") if len(found) == len(RATES) else None


def read_calibration(path: Path) -> Calibration:
    """Return the calibration in a JSON file: a document of `wanflow bench`, or the object alone.

    Raises:
        RequestError: for a file that cannot be read or holds something else.
    """
    document = read_json(path, MOST_BYTES)
    if isinstance(document, dict) and "calibration" in document:
        document = document["calibration"]
    return from_json(document, path)


def from_json(value: object, source: object) -> Calibration:
    """Return the calibration of a JSON object.

    Args:
        value: as `Calibration.to_json` writes it; a value may be missing.
        source: names where it is from in messages.

    Raises:
        RequestError: for an unknown format or key, and a value of another type or out of range.
    """
    where = printable(source)
    if not isinstance(value, dict):
        raise RequestError(f"{where}: no calibration of a device; {NEW}")
    if value.get("format") != FORMAT or isinstance(value.get("format"), bool):
        found = shown(value.get("format"))
        raise RequestError(f"{where}: calibration format {found}; expected {FORMAT}; {NEW}")
    known = {one.name: one for one in fields(Calibration)}
    given = {name: one for name, one in value.items() if name != "format"}
    for name, one in given.items():
        if name not in known:
            names = ", ".join(known)
            found = shown(name)
            raise RequestError(f"{where}: calibration {found}; expected one of {names}; {NEW}")
        if "range" in known[name].metadata:
            least, most = known[name].metadata["range"]
            given[name] = _number(one, least, most, f"{where}: calibration {name}")
    given.setdefault("versions", {})
    for name, right, expected in (
        ("device", lambda one: isinstance(one, str), "the name of a device"),
        ("device_memory", lambda one: type(one) is int and 0 <= one < 2**60, "a number of bytes"),
        ("dtype", lambda one: one in DTYPES, f"one of {', '.join(DTYPES)}"),
        ("versions", _texts, "an object of texts"),
    ):
        if not right(given.get(name)):
            found = shown(given.get(name))
            raise RequestError(f"{where}: calibration {name} {found}; expected {expected}; {NEW}")
    return Calibration(**given)


def _texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _number(value: object, least: float, most: float, what: str) -> float | int:
    """Return a number within bounds; whole where its least is."""
    kinds = int if isinstance(least, int) else int | float
    right = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if not (right and isinstance(value, int | float) and least <= value <= most):
        kind = "a whole number" if isinstance(least, int) else "a number"
        raise RequestError(
            f"{what} {shown(value)}; expected {kind} from {least:g} to {most:g}; {NEW}"
        )
    return value
