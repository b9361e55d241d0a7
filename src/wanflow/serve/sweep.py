"""Delete the files that killed attempts leave, and those of attempts that woke up too late."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from wanflow.files import remove
from wanflow.serve.folder import DataFolder
from wanflow.serve.jobs import Store

FOLDERS = ("videos", "states", "previews")


def sweep(store: Store, data: DataFolder, before: float) -> list[str]:
    """Delete what no job has any more; return the names of the files.

    A job in progress keeps all files. A job in a final state keeps its result.
    Files without a job stay until they are old: the store of jobs may be a new one, beside videos
    of an earlier one.

    Args:
        store: of jobs.
        data: where the files are.
        before: seconds since 1970; what was written earlier is old.
    """
    left: dict[str, list[Path]] = {}
    for folder in FOLDERS:  # files first: what an attempt writes after this look stays
        for file in (data.path / folder).glob("video_*"):
            left.setdefault(file.name.partition(".")[0], []).append(file)
    gone = []
    for id, files in left.items():
        job = store.get(id)
        if job is not None and not job.final:
            continue
        result = Path(str(job.result.get("file", ""))).stem if job else ""
        for file in files:
            with suppress(OSError):
                if job is None:
                    kept = file.stat().st_mtime >= before
                else:
                    ours = bool(result) and file.name.startswith(f"{result}.")
                    kept = ours and file.suffix != ".part"
                if not kept:
                    remove(file)
                    gone.append(file.name)
    return gone
