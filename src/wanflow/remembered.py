"""Remember what was measured on this machine, so that the next run need not measure again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanflow.config import RequestError
from wanflow.files import write_bytes
from wanflow.untrusted import read_json

if TYPE_CHECKING:
    import torch

LARGEST = 1 << 20  # bytes of a file
MOST = 256  # entries of a file; the oldest go first


class Remembered:
    """Measured values of one device with its software, in one small JSON file.

    A file that is missing, damaged or cannot be written costs a measurement and nothing else.

    Args:
        folder: where the files are; None: nothing outlives this object.
        machine: everything that makes a value invalid when it changes: the device's model, driver,
            versions of torch and its libraries.
    """

    def __init__(self, folder: str | Path | None, *machine: object) -> None:
        text = json.dumps([str(one) for one in machine])
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._file = None if folder is None else Path(folder) / f"{name}.json"
        self._machine = text
        self._values = self._read()

    def get(self, *key: object) -> Any:
        """Return the JSON value of a key, None if there is none; the caller checks its type."""
        return self._values.get(_name(key))

    def put(self, value: Any, *key: object) -> None:
        """Remember a JSON value; another process' values stay."""
        name = _name(key)
        kept = {**self._values, **self._read()}
        kept.pop(name, None)
        kept[name] = value
        self._values = dict(list(kept.items())[-MOST:])
        if self._file is None:
            return
        data = json.dumps({"machine": self._machine, "values": self._values}, indent=1)
        try:
            write_bytes(self._file, data.encode(), overwrite=True)
        except OSError:
            self._file = None  # a full or read-only disk stays one

    def _read(self) -> dict[str, Any]:
        try:
            found = {} if self._file is None else read_json(self._file, LARGEST)
        except (OSError, RequestError):
            return {}
        if not isinstance(found, dict) or found.get("machine") != self._machine:
            return {}
        values = found.get("values")
        return values if isinstance(values, dict) else {}


def of_device(folder: str | Path | None, device: torch.device) -> Remembered:
    """Return what was measured on a device of this machine, with this torch."""
    import torch

    what: tuple[object, ...] = (device.type, torch.__version__)
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device.index or 0)
        versions = (torch.version.cuda, torch.version.hip, torch.backends.cudnn.version())
        what = (*what, card.name, card.total_memory, card.major, card.minor, *versions)
    return Remembered(folder, *what)


def _name(key: tuple[object, ...]) -> str:
    return " ".join(str(part) for part in key)
