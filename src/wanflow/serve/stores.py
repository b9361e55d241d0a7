"""Open the place that keeps jobs: `--db` is the only difference between a machine and a fleet."""

from __future__ import annotations

from pathlib import Path

from wanflow.config import RequestError
from wanflow.serve.jobs import Store
from wanflow.serve.local import LocalStore


def open_store(db: str | None, folder: Path) -> Store:
    """Open the store of a fleet, `postgresql://...`, or without `db` that of a data folder.

    Raises:
        RequestError: for another address, a missing package, a folder or database unfit for jobs.
        StoreError: where the database cannot be reached.
    """
    if db is None:
        return LocalStore(folder)
    scheme, separator, _ = db.partition("://")
    if not separator or scheme not in ("postgresql", "postgres"):  # may hold a password: not shown
        raise RequestError(
            "--db: expected postgresql://USER@HOST:5432/NAME; leave it out to keep jobs in SQLite"
            " in the data folder"
        )
    try:
        from wanflow.serve.fleet import FleetStore
    except ImportError as error:
        raise RequestError(
            f"--db postgresql://... needs {error.name or 'psycopg'}; try: pip install"
            " wanflow[serve]"
        ) from None
    return FleetStore(db)
