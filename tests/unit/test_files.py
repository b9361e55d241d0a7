"""Publishing files and folders: complete or not at all, and nothing replaced unasked."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from wanflow.files import atomic_path, publish, temporary, write_bytes
from wanflow.outputs import leftovers


def make(path: Path, content: str, folder: bool) -> None:
    """A file, or a folder with a file two levels down, that holds `content`."""
    if folder:
        (path / "inner").mkdir(parents=True)
        path = path / "inner" / "file"
    path.write_text(content)


def content(path: Path) -> str:
    return (path / "inner" / "file" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_it_appears_complete(tmp_path: Path, folder: bool, overwrite: bool) -> None:
    target = tmp_path / "new" / "target.tar.gz"
    with atomic_path(target, overwrite=overwrite) as part:
        assert part.parent == target.parent and part.name.startswith(target.name + ".")
        make(part, "whole", folder)
        assert not target.exists() and leftovers(target) == [part]
    assert content(target) == "whole" and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("folder", [False, True])
def test_overwrite_never_replaces_another_kind(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "target"
    make(target, "old", not folder)
    with pytest.raises(OSError, match="directory"), atomic_path(target, overwrite=True) as part:
        make(part, "new", folder)
    assert content(target) == "old" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("folder", [False, True])
def test_overwrite_replaces(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "target"
    make(target, "old", folder)
    with atomic_path(target, overwrite=True) as part:
        make(part, "new", folder)
    assert content(target) == "new" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("folder", [False, True])
def test_nothing_is_replaced_without_overwrite(
    tmp_path: Path, folder: bool, before: bool, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    target = tmp_path / "target"
    with pytest.raises(FileExistsError), atomic_path(target, overwrite=False) as part:
        make(part, "new", folder)
        make(target, "old", before)
    assert content(target) == "old" and list(tmp_path.iterdir()) == [target]


def no_links(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_links)
    write_bytes(tmp_path / "target", b"whole", overwrite=False)
    assert (tmp_path / "target").read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [tmp_path / "target"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with atomic_path(target, overwrite=False) as part:
        make(part, "new", folder=True)
    assert content(target) == "new"


@pytest.mark.parametrize("folder", [False, True])
def test_an_exception_leaves_what_was_there(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "target"
    make(target, "old", folder)
    with pytest.raises(KeyboardInterrupt), atomic_path(target, overwrite=True) as part:
        make(part, "half", folder)
        raise KeyboardInterrupt
    assert content(target) == "old" and list(tmp_path.iterdir()) == [target]


def test_a_rename_that_fails_puts_the_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "target", Path.rename
    make(target, "old", folder=True)

    def failing(self: Path, to: Path) -> Path:
        if self.suffix == ".part":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"), atomic_path(target, overwrite=True) as part:
        make(part, "new", folder=True)
    assert content(target) == "old" and list(tmp_path.iterdir()) == [target]


def test_the_disk_has_the_bytes_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(tmp_path / "target", b"whole", overwrite=True)
    assert not list(tmp_path.iterdir())


def test_temporary_names(tmp_path: Path) -> None:
    target = tmp_path / "a.mp4"
    assert temporary(target) != temporary(target)
    part = temporary(target)
    part.write_bytes(b"x")
    (tmp_path / "a.mp4.0123456789ab.part").touch()  # of a download
    (tmp_path / "b.mp4.01234567.part").touch()
    assert leftovers(target) == [part] and not leftovers(tmp_path / "none" / "a.mp4")
    publish(part, target, overwrite=False)
    assert not leftovers(target)


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling"])
def test_work_of_hours_goes_to_the_spare_name(tmp_path: Path, folder: bool, kind: str) -> None:
    target, spare = tmp_path / "target", tmp_path / "target-2"
    (tmp_path / "elsewhere").mkdir()
    with (
        pytest.raises(FileExistsError, match="target appeared meanwhile; the result is .*target-2"),
        atomic_path(target, overwrite=False, spare=spare) as part,
    ):
        make(part, "new", folder)
        if kind in ("file", "folder"):
            make(target, "old", kind == "folder")
        else:
            target.symlink_to(tmp_path / ("elsewhere" if kind == "link" else "nowhere"))
    assert content(spare) == "new"
    assert target.is_symlink() if kind in ("link", "dangling") else content(target) == "old"
    assert len(list(tmp_path.iterdir())) == 3 and not list((tmp_path / "elsewhere").iterdir())


def test_a_full_disk_names_the_file_and_a_way_out(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"^the disk is full .* writing .*target; free") as caught,
        atomic_path(tmp_path / "target", overwrite=False) as part,
    ):
        part.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())
