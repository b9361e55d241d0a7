"""Check and claim the outputs of a run before its work begins, and name those without a name.

A claim on `NAME` is a lock of the system on `NAME.claim`, next to it. The system ends it with the
process that holds it, so a killed run blocks nobody; the file it leaves behind is taken over. No
placeholder stands under `NAME` itself: a crash would leave an empty video there.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from wanflow.config import RequestError
from wanflow.files import temporary
from wanflow.units import file_size
from wanflow.untrusted import printable

if TYPE_CHECKING:
    from filelock import BaseFileLock

CLAIM = ".claim"
# Bytes of a prompt in a file name. With the rest, and with the endings of what is derived from it,
# such as `.latent.safetensors.01234567.part`, a name stays below the 255 that file systems allow.
LONGEST_WORDS = 120
LONGEST_PROMPT = 50  # letters of it


class Taken(RequestError):
    """Another run holds the name of an output."""


class Claims:
    """The output names that this process holds until the `with` block ends, or `close`."""

    def __init__(self) -> None:
        self._held: dict[Path, BaseFileLock] = {}

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self, path: Path) -> None:
        """Claim a name; one that this process holds already stays held.

        Raises:
            Taken: if another run holds it.
            RequestError: if its folder cannot be written, or its name is too long.
        """
        from filelock import FileLock, Timeout

        name = _claim_of(path)
        if name in self._held:
            return
        lock = FileLock(name, thread_local=False)  # an abort is saved by another thread
        try:
            with suppress(FileNotFoundError):
                temporary(path).lstat()  # refuses a name that is too long with its ending
            _refuse_foreign(name)
            lock.acquire(timeout=0.2)  # a claim that ends at this moment costs one retry
            name.write_text(f"{os.getpid()}\n")
        except Timeout:
            if not name.exists():  # some file systems, such as /proc, say so only in this way
                raise RequestError(f"cannot write {path}; choose another folder") from None
            raise Taken(
                f"{path} is being made by another run{_holder(name)}; wait for it, or choose"
                " another name"
            ) from None
        except OSError as error:
            lock.release()
            raise RequestError(
                f"cannot write {path}: {error.strerror}; choose another folder"
            ) from None
        self._held[name] = lock

    def take_free(self, names: Iterator[tuple[Path, ...]]) -> Path:
        """Claim the first group of names of which none exists or is held; return its first one.

        Raises:
            RequestError: if the folder cannot be written.
        """
        for group in names:
            if any(os.path.lexists(path) for path in group):
                continue
            before = set(self._held)
            try:
                for path in group:
                    self.take(path)
                return group[0]
            except Taken:
                for name in self._held.keys() - before:
                    self._release(name)
        raise AssertionError("names never end")

    def give_back(self, path: Path) -> None:
        """Give one name back, if it is held."""
        if _claim_of(path) in self._held:
            self._release(_claim_of(path))

    def close(self) -> None:
        """Give every name back."""
        for name in list(self._held):
            self._release(name)

    def _release(self, name: Path) -> None:
        lock = self._held.pop(name)
        with suppress(OSError):  # Windows deletes no open file; an old claim blocks nobody
            name.unlink(missing_ok=True)  # while it is locked, so that nobody's is deleted
        lock.release()


def _claim_of(path: Path) -> Path:
    if path.name in ("", ".."):
        raise RequestError(f"{path} is no name of a new file or folder; give one")
    try:
        str(path).encode()
        os.fsencode(path)
    except UnicodeEncodeError:  # the library of safetensors could not read a state back
        raise RequestError(
            f"{printable(path)} is no UTF-8 name; choose another, or set PYTHONUTF8=1 where the"
            " locale has no UTF-8"
        ) from None
    path = Path(os.path.abspath(path))
    return path.with_name(path.name + CLAIM)


def _refuse_foreign(name: Path) -> None:
    """Raise RequestError for a file that has a claim's name and is none: it would be deleted."""
    if name.is_symlink() or (name.exists() and not _process(name).isdigit()):
        raise RequestError(f"{name} is in the way and no claim of ours; rename it")


def _process(name: Path) -> str:
    """Return the process in a claim; "0" where it has not been written yet."""
    with name.open("rb") as file:
        return file.read(20).decode("ascii", "replace").strip() or "0"


def _holder(name: Path) -> str:
    """Return who holds a claim, in words, as far as its file says so."""
    try:
        process = _process(name)
    except OSError:
        process = "0"
    who = f"process {process}, " if process.isdigit() and int(process) else ""
    return f" ({who}its claim is {name})"


def bytes_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that holds `path`, or will hold it."""
    place = path.absolute()
    while not os.path.exists(place):  # also false for a name that is too long
        place = place.parent
    return shutil.disk_usage(place).free


def refuse_without_room(path: Path, needed: int, what: str) -> None:
    """Raise RequestError unless the disk that will hold `path` has `needed` bytes free."""
    free = free_bytes(path)
    if needed > free:
        raise RequestError(
            f"{path}: {what} needs {file_size(needed)}, and the disk has {file_size(free)} free;"
            " free some, or choose a folder on another disk"
        )


def leftovers(path: Path) -> list[Path]:
    """Return what interrupted writers of `path` left, or running ones are writing."""
    ours = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}\.part")
    if not path.parent.is_dir():
        return []
    return sorted(file for file in path.parent.iterdir() if ours.fullmatch(file.name))


def automatic_names(
    model: str, size: tuple[int, int], prompt: str, seed: int, when: datetime, suffix: str
) -> Iterator[Path]:
    """Yield file names that every system accepts; the second differs from the first in a number.

    Such as `t2v-A14B_1280x720_a-red-circle_seed7_20261123-214509.mp4`. Of the prompt a name has the
    first 50 letters and digits, of any script.
    """
    model = re.sub(r"[^A-Za-z0-9]+", "-", model).strip("-")
    parts = (model, f"{size[0]}x{size[1]}", slug(prompt), f"seed{seed}", f"{when:%Y%m%d-%H%M%S}")
    stem = "_".join(part for part in parts if part)
    yield Path(stem + suffix)
    for number in count(2):
        yield Path(f"{stem}-{number}{suffix}")


def slug(prompt: str) -> str:
    """Return the beginning of a prompt: letters, their marks, and digits, joined by hyphens."""
    plain = unicodedata.normalize("NFKC", prompt[: 20 * LONGEST_PROMPT]).lower()
    kept = (letter if unicodedata.category(letter)[0] in "LMN" else "-" for letter in plain)
    code = sys.getfilesystemencoding()  # ASCII in a locale without UTF-8
    named = "".join(kept).encode(code, "ignore").decode(code)
    words = re.sub("-+", "-", named).strip("-")[:LONGEST_PROMPT]
    return words.encode()[:LONGEST_WORDS].decode(errors="ignore").rstrip("-")
