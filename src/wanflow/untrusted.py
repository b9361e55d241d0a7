"""Read what strangers wrote: regular files only, bounded in size and depth, printed harmlessly.

Every file, answer of a server or text that this process did not write passes through here before
anything parses it.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import IO, Any

from wanflow.config import RequestError

JSON_BYTES = 64 << 20  # an index of the largest published model takes 0.2 MB
JSON_DEPTH = 64
ADDRESS = re.compile("(https?|ftp|file|s3|gs|data):", re.IGNORECASE)  # a Path drops a slash
LONGEST_TEXT = 300  # characters of a stranger's text that a message shows


def printable(text: object, longest: int = LONGEST_TEXT) -> str:
    """Return a text without control characters, lone surrogates or marks that turn its direction.

    Spaces of every kind, line breaks included, become one space; a longer text ends in `...`.
    """
    words = " ".join(str(text)[: 4 * longest].split())
    shown = "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in words
    )
    return shown if len(shown) <= longest else shown[: longest - 3] + "..."


def shown(value: object) -> str:
    """Return a value as Python writes it, short and printable."""
    try:
        return printable(repr(value))
    except (ValueError, RecursionError):  # of thousands of digits, or of levels
        return f"a {type(value).__name__} too long to show"


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return a path with `~` and `~name` replaced by a home folder.

    Raises:
        RequestError: for a user without a home, or a path that no system takes.
    """
    try:
        found = Path(path).expanduser()
        os.fspath(found).encode("utf-8", "surrogateescape")
    except (RuntimeError, ValueError, TypeError) as error:
        raise RequestError(f"{printable(path)}: not a usable path ({error})") from None
    if "\0" in os.fspath(found):
        raise RequestError(f"{printable(path)}: a path holds no null character")
    return found


def picture_path(file: str, name: str) -> Path:
    """Return the path of a picture, as `user_path`; RequestError for no name and an address."""
    if not file.strip():
        raise RequestError(f"{name}: an empty name; give the path of a picture")
    if ADDRESS.match(file):
        raise RequestError(
            f"{name}: {printable(file)} is an address, and only files are read; save the picture"
            " first, and give its path"
        )
    return user_path(file)


def check_regular(path: Path) -> os.stat_result:
    """Return the status of a file; opens nothing.

    Raises:
        RequestError: if it is missing, out of reach, or a folder, pipe, socket or device.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    _refuse_irregular(path, status)
    return status


def open_regular(path: Path) -> IO[bytes]:
    """Open a file for reading; a pipe without a writer does not hang, a device is not read.

    Raises:
        RequestError: as `check_regular`.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = os.open(path, flags | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    try:
        _refuse_irregular(path, os.fstat(handle))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_bytes(path: Path, limit: int = JSON_BYTES) -> bytes:
    """Return the content of a file of at most `limit` bytes.

    Raises:
        RequestError: as `check_regular`, or if it is longer.
    """
    with open_regular(path) as file:
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise _unreadable(path, error) from None
    if len(data) > limit:
        raise RequestError(f"{printable(path)}: more than {limit:,} bytes, too long for its kind")
    return data


def read_json(path: Path, limit: int = JSON_BYTES) -> Any:
    """Return the JSON in a file; see `parse_json`."""
    return parse_json(read_bytes(path, limit), path, limit)


def parse_json(data: bytes | str, source: object, limit: int = JSON_BYTES) -> Any:
    """Return the value of a JSON text: at most `JSON_DEPTH` levels, finite numbers, no key twice.

    Args:
        data: the text.
        source: names where it is from in messages.
        limit: bytes, or characters, that it may have.

    Raises:
        RequestError: naming the source, for anything else.
    """
    where = printable(source)
    if len(data) > limit:
        raise RequestError(f"{where}: more than {limit:,} bytes of JSON")
    try:
        value = json.loads(
            data, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique
        )
    except RecursionError:
        raise RequestError(f"{where}: JSON of more than {JSON_DEPTH} levels") from None
    except ValueError as error:  # of UTF-8 too, and of numbers with thousands of digits
        raise RequestError(f"{where}: not JSON ({printable(error)})") from None
    level: list[Any] = [value]
    for _ in range(JSON_DEPTH):
        level = [
            item
            for part in level
            if isinstance(part, dict | list)
            for item in (part.values() if isinstance(part, dict) else part)
        ]
        if not level:
            return value
    raise RequestError(f"{where}: JSON of more than {JSON_DEPTH} levels")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    if math.isinf(float(text)):
        raise ValueError(f"{printable(text)} is too large a number")
    return float(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key is given twice")
    return value


def _refuse_irregular(path: Path, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise RequestError(f"{printable(path)} is a folder; give a file")
    if not stat.S_ISREG(status.st_mode):
        raise RequestError(
            f"{printable(path)} is a pipe, a socket or a device; give a regular file"
        )


def _unreadable(path: Path, error: Exception) -> RequestError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return RequestError(f"{printable(path)}: there is no such file")
    return RequestError(
        f"cannot read {printable(path)}: {getattr(error, 'strerror', None) or error}"
    )
