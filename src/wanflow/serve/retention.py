"""Delete finished jobs that are too old, or too many for the disk; the oldest first."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

from wanflow.files import remove
from wanflow.request import PICTURES
from wanflow.serve.jobs import FINAL, STATES, Job, State, StoreError
from wanflow.serve.service import Service
from wanflow.serve.sweep import sweep

logger = logging.getLogger("wanflow")
PAGE = 500  # jobs at a look
UNUSED_S = 3600.0  # a picture may belong to a submission that is not kept yet


class Retention:
    """Keeps a data folder within the limits of its server."""

    def __init__(self, service: Service, every_s: float) -> None:
        self._service, self._every_s = service, every_s

    async def watch(self, run: Callable[..., Awaitable[Any]]) -> None:
        """Look, for ever."""
        while True:
            try:
                await run(self.look)
            except StoreError:
                pass  # it is away for a while
            except OSError as error:
                logger.warning("old videos could not be deleted: %s", error)
            await asyncio.sleep(self._every_s)

    def look(self, now: float | None = None) -> list[str]:
        """Delete what goes now; return the ids."""
        limits, data = self._service.limits, self._service.data
        now = time.time() if now is None else now
        sizes, gone = self._sizes(), []
        total = sum(sizes.values())
        for job in self._jobs(FINAL):
            old = now - (job.completed_at or job.created_at) > limits.keep_days * 86_400
            many = total > limits.keep_gb * 1e9 and job.id in sizes
            if not old and not many:
                continue
            if self._service.store.delete(job.id) is not None:
                data.forget(job.id)
                total -= sizes.pop(job.id, 0)
                gone.append(job.id)
        self._forget_pictures(now)
        sweep(self._service.store, data, now - limits.keep_days * 86_400)
        return gone

    def _jobs(self, states: tuple[State, ...]) -> Iterator[Job]:
        """Yield jobs, the oldest submission first."""
        after: str | None = None
        while True:
            page = self._service.store.page(after, PAGE, newest_first=False, states=states)
            yield from page
            if len(page) < PAGE:
                return
            after = page[-1].id

    def _sizes(self) -> dict[str, int]:
        """Return the bytes of each job's files."""
        sizes: dict[str, int] = {}
        for folder in ("videos", "states", "previews"):
            for file in (self._service.data.path / folder).glob("video_*"):
                with suppress(OSError):
                    id = file.name.partition(".")[0]
                    sizes[id] = sizes.get(id, 0) + file.stat().st_size
        return sizes

    def _forget_pictures(self, now: float) -> None:
        """Delete pictures that no job has, but for new ones."""
        files = list((self._service.data.path / "pictures").glob("*.png"))
        if not files:
            return
        used = {str(job.request.get(name)) for job in self._jobs(STATES) for name in PICTURES}
        for file in files:
            with suppress(OSError):
                if file.stem not in used and now - file.stat().st_mtime > UNUSED_S:
                    remove(file)
