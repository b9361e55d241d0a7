"""What killed and late attempts leave is swept; what belongs to a job, or may, stays."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from wanflow.serve import line
from wanflow.serve.folder import DataFolder
from wanflow.serve.jobs import Job, new_id
from wanflow.serve.limits import Limits
from wanflow.serve.local import LocalStore
from wanflow.serve.retention import Retention
from wanflow.serve.sweep import FOLDERS, sweep

PART = ".mp4.1a2b3c4d.part"


def write(data: DataFolder, *names: str) -> None:
    for name in names:
        folder = "states" if ".latent" in name else "videos" if name.count(".") > 1 else "previews"
        file = data.path / folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x")


def names(data: DataFolder) -> set[str]:
    return {file.name for folder in FOLDERS for file in (data.path / folder).glob("*")}


def test_only_what_nobody_needs_goes(tmp_path: Path) -> None:
    store, data = LocalStore(tmp_path), DataFolder(tmp_path)
    done, failed, working, unknown = (new_id() for _ in range(4))
    for id in (done, failed, working):
        store.submit(Job(id, {}))
        job = store.claim("worker")
        assert job is not None and job.id == id
        if id == done:
            store.finish(job, "completed", {"file": f"{id}.1.mp4"})
        elif id == failed:
            store.finish(job, "failed", error={"code": "bad", "message": "it is bad"})
    kept = [f"{done}.1.mp4", f"{done}.1.thumbnail.webp"]
    kept += [f"{working}.1{PART}", f"{working}.latent.safetensors", f"{working}.webp"]
    kept += [f"{unknown}.1.mp4"]  # perhaps of a store that was moved away
    late = [f"{done}.2.mp4", f"{done}.1{PART}", f"{done}.latent.safetensors", f"{done}.webp"]
    late += [f"{failed}.1.mp4", f"{failed}.latent.safetensors", f"{failed}.1{PART}"]
    write(data, *kept, *late, "notes.txt.mine.here")
    assert sorted(sweep(store, data, time.time() - 60)) == sorted(late)
    assert names(data) == {*kept, "notes.txt.mine.here"}
    old = time.time() - 3600
    os.utime(data.path / "videos" / f"{unknown}.1.mp4", (old, old))
    assert sweep(store, data, time.time() - 60) == [f"{unknown}.1.mp4"]
    store.close()


def test_folders_of_killed_workers_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gone, here = 2**30, os.getpid()  # no process has a number so large
    begun = [f"{line.FOLDER}{number}" for number in (f"{gone}-old", f"{here}-old", f"{gone}-new")]
    folders = [tmp_path / name for name in (*begun, "mine")]
    for folder in folders:
        folder.mkdir()
        (folder / "gang").touch()
    for folder in (folders[0], folders[1], folders[3]):  # or the clock has jumped
        os.utime(folder, (time.time() - line.LEFT_S - 60,) * 2)
    line.remove_left()
    assert [folder.exists() for folder in folders] == [False, sys.platform == "linux", True, True]


def test_the_server_sweeps(tmp_path: Path) -> None:
    from helpers.serving import Serving

    serving = Serving(tmp_path)
    store, data = serving.store, serving.data
    job, _ = store.submit(Job(new_id(), {}))
    store.cancel(job.id)
    write(data, f"{job.id}.latent.safetensors", f"{new_id()}.1.mp4")
    Retention(serving.service, 60).look(time.time())
    assert not any(name.startswith(job.id) for name in names(data))
    assert len(names(data)) == 1
    days = Limits().keep_days
    Retention(serving.service, 60).look(time.time() + (days + 1) * 86_400)
    assert not names(data)
