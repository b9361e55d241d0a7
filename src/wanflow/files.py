"""Write files and folders under temporary names, and publish them only when they are complete.

What is being written for `NAME` is called `NAME.xxxxxxxx.part`, next to it. A crash leaves such a
leftover and never half a file under the final name.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


class DiskError(OSError):
    """A full or failing disk, with the file that could not be written."""

    def __str__(self) -> str:
        return str(self.strerror)


def disk_error(error: OSError, path: Path) -> DiskError | None:
    """Return an error that names the file and a way out, if the disk is at fault."""
    if isinstance(error, DiskError) or error.errno not in DISK_TROUBLE:
        return error if isinstance(error, DiskError) else None
    reason = f"the disk is full or failing ({error.strerror}) while writing {path}"
    return DiskError(error.errno, f"{reason}; free some space or choose another folder")


def temporary(path: Path) -> Path:
    """Return a new name next to `path`, random so that two processes never share it."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")


@contextmanager
def atomic_path(path: Path, *, overwrite: bool, spare: Path | None = None) -> Iterator[Path]:
    """Yield a temporary name to write a file or folder under; publish it when the block ends.

    The folders above `path` are made. After an exception the temporary file or folder is removed.

    Args:
        path: the name to publish.
        overwrite: replace what is there.
        spare: another name for work of hours, if `path` appears meanwhile; the error names it.

    Raises:
        FileExistsError: for a `path` that exists at the end, without `overwrite`.
        DiskError: for a full or failing disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = temporary(path)
    try:
        yield part
        try:
            publish(part, path, overwrite=overwrite)
        except FileExistsError:
            if spare is None:
                raise
            publish(part, spare, overwrite=False)
            raise FileExistsError(f"{path} appeared meanwhile; the result is {spare}") from None
    except BaseException as error:
        remove(part)
        if isinstance(error, OSError) and (full := disk_error(error, path)) is not None:
            raise full from None
        raise


def write_bytes(path: Path, data: bytes, *, overwrite: bool) -> None:
    """Write a complete file or nothing; raises what `atomic_path` raises."""
    with atomic_path(path, overwrite=overwrite) as part:
        part.write_bytes(data)


def publish(part: Path, path: Path, *, overwrite: bool) -> None:
    """Flush a finished file or folder to the disk, then rename it to `path`.

    Raises:
        FileExistsError: if `path` exists without `overwrite`, even when it appeared meanwhile.
        OSError: if a file would replace a folder, or a folder a file, and when the disk refuses.
    """
    for file in part.rglob("*") if part.is_dir() else [part]:
        if file.is_file():
            with file.open("r+b") as opened:
                fsync(opened)
    if overwrite:
        _replace(part, path)
    else:
        _rename_exclusively(part, path)
    fsync_folder(path.parent)


def _replace(part: Path, path: Path) -> None:
    """Rename over what is there: a file over a file, a folder over a folder."""
    if not (part.is_dir() and path.is_dir()):
        os.replace(part, path)
        return
    # A folder with content cannot be renamed over: move it aside, and back on failure.
    old = path.with_name(f"{path.name}.{secrets.token_hex(4)}.old")
    path.rename(old)
    try:
        part.rename(path)
    except BaseException:
        old.rename(path)
        raise
    remove(old)


def _rename_exclusively(part: Path, path: Path) -> None:
    """Rename to a name that is free, or that of an empty folder, and replace nothing."""
    if part.is_dir():
        if os.name == "nt" and path.is_dir() and not any(path.iterdir()):
            path.rmdir()  # elsewhere the system renames over an empty folder, and over no other
        try:
            part.rename(path)
        except OSError:
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
            raise
        return
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # no hard links on this file system: reserve the name, then replace it
        path.open("xb").close()
        os.replace(part, path)
    else:
        part.unlink()


def fsync(file: IO[bytes]) -> None:
    """Wait until the disk has a file's bytes, so that a full disk is reported here."""
    file.flush()
    os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Wait until the disk has a folder's entries, where the system supports it."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete a file or a folder with its content; a missing one is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
