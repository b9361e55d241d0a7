"""What a downloaded folder remembers of its files: a verified hash of each, with size and time."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Lock
from typing import Any

from wanflow.config import RequestError
from wanflow.files import write_bytes
from wanflow.untrusted import read_json

LEDGER = ".wanflow-download.json"


def _sound(name: str, entry: dict[str, Any]) -> bool:
    """Return whether an entry is of our form, and its name leads nowhere else."""
    steps = set(name.split("/"))
    return (
        not {"", ".", ".."} & steps
        and name.isprintable()
        and not set("\\:") & set(name)
        and isinstance(entry["sha256"], str)
        and type(entry["size"]) is int
        and isinstance(entry.get("from", ""), str)
    )


class Ledger:
    """The hashes of a folder's files, each with the size and the time of change it was hashed at.

    A file whose size or time (ns) differs since counts as not hashed. Safe to use from threads.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file, self._lock = folder, folder / LEDGER, Lock()
        try:
            files = read_json(self.file)["files"]
            entries = {name: entry for name, entry in files.items() if _sound(name, entry)}
        except (RequestError, KeyError, TypeError, AttributeError):
            entries = {}  # a lost or damaged ledger costs only time: its files are hashed again
        self.entries: dict[str, dict[str, Any]] = entries

    def sha256(self, name: str) -> str | None:
        """Return the hash of a file that has not changed since it was hashed."""
        entry, stat = self.entries.get(name), (self.folder / name).stat()
        if entry and (entry["size"], entry.get("mtime_ns")) == (stat.st_size, stat.st_mtime_ns):
            return str(entry["sha256"])
        return None

    def add(self, name: str, sha256: str, origin: str) -> None:
        """Remember the hash of a file, and the repository and commit (`origin`) it came from."""
        stat = (self.folder / name).stat()
        with self._lock:
            self.entries[name] = {
                "size": stat.st_size,
                "mtime_ns": stat.st_mtime_ns,
                "sha256": sha256,
                "from": origin,
            }
            text = json.dumps({"files": self.entries}, indent=1, sort_keys=True) + "\n"
            write_bytes(self.file, text.encode(), overwrite=True)
