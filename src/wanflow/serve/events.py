"""Follow jobs by server-sent events: each change once, keep-alives, an end at the final state."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from wanflow.serve.errors import Refusal
from wanflow.serve.jobs import FINAL, StoreError
from wanflow.serve.service import Service, mark_of

T = TypeVar("T")
EVERY_S = 0.3  # between two looks at the store
ALIVE_S = 10.0  # between two keep-alives
LIST = 100  # jobs that the events of all cover

Run = Callable[..., Awaitable[Any]]  # a method of the service, in a thread


class Shared:
    """Answers equal questions that come within a moment with one look at the store."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._asked: dict[Any, tuple[float, asyncio.Future[Any]]] = {}

    async def ask(self, call: Callable[..., T], *args: Any) -> T:
        """Return what a call returns, or has returned within the last moment."""
        key, now = (call.__name__, args), time.monotonic()
        begun, future = self._asked.get(key, (0.0, None))
        if future is None or now - begun > EVERY_S:
            self._asked = {k: one for k, one in self._asked.items() if now - one[0] <= EVERY_S}
            future = asyncio.ensure_future(self._run(call, *args))
            self._asked[key] = now, future
        found: T = await asyncio.shield(future)
        return found


class Events:
    """The streams. `leaving` says whether the server ends, which ends them."""

    def __init__(self, service: Service, run: Run, leaving: Callable[[], bool]) -> None:
        self._service, self._run, self._leaving = service, run, leaving
        self.shared = Shared(run)

    async def one(self, id: str, last: str | None) -> AsyncIterator[str]:
        """Yield the changes of a job, the newest state first; a reader that has it, waits.

        Args:
            id: of the job.
            last: the id of the last event that the reader got.
        """
        state, seen, mark, spoke = "", 0, last, time.monotonic()
        while not self._leaving():
            try:
                found = await self._asked(self._service.one, id)
            except Refusal:
                yield event("deleted", {"id": id, "object": "video.deleted", "deleted": True})
                return
            lines = []
            if found is not None:
                _, video, written = found
                if written > seen and video["status"] not in FINAL:
                    seen = written
                    lines.append(await self._preview(video))
                if mark_of(video) != mark:
                    mark = mark_of(video)
                    kind = "progress" if video["status"] == state else "state"
                    lines.append(event(kind, video, mark))
                state = video["status"]
            if time.monotonic() - spoke > ALIVE_S and not lines:
                lines.append(": keep-alive\n\n")
            for text in filter(None, lines):
                spoke = time.monotonic()
                yield text
            if state in FINAL:
                return
            await asyncio.sleep(EVERY_S)

    async def all(self) -> AsyncIterator[str]:
        """Yield the newest jobs, then what changes among them."""
        known: dict[str, tuple[str, str, int]] | None = None  # of each job: mark, state, preview
        spoke = time.monotonic()
        while not self._leaving():
            lines: list[str] = []
            videos = await self._asked(self._service.recent, LIST)
            if videos is not None and known is None:
                lines.append(event("list", {"object": "list", "data": [one for one, *_ in videos]}))
                known = {video["id"]: (mark, video["status"], 0) for video, _, mark in videos}
            if videos is not None and known is not None:
                lines += [text async for text in self._changes(videos, known)]
                known = {video["id"]: (mark, video["status"], at) for video, at, mark in videos}
            if time.monotonic() - spoke > ALIVE_S and not lines:
                lines.append(": keep-alive\n\n")
            for text in filter(None, lines):
                spoke = time.monotonic()
                yield text
            await asyncio.sleep(EVERY_S)

    async def _changes(
        self, videos: list[tuple[dict[str, Any], int, str]], known: dict[str, tuple[str, str, int]]
    ) -> AsyncIterator[str]:
        """Yield what differs from what a reader knows, the oldest job first."""
        for video, written, mark in reversed(videos):
            before, state, seen = known.get(video["id"], ("", "", 0))
            if written > seen:
                yield await self._preview(video)
            if mark != before:
                yield event("progress" if video["status"] == state else "state", video)
        here = {video["id"] for video, *_ in videos}
        if len(here) < LIST:  # else older ones are only out of sight
            for id in known:
                if id not in here:
                    yield event("deleted", {"id": id, "deleted": True})

    async def _asked(self, call: Callable[..., T], *args: Any) -> T | None:
        """Return what a call returns; None while the store is away."""
        try:
            return await self.shared.ask(call, *args)
        except StoreError:
            return None

    async def _preview(self, video: dict[str, Any]) -> str:
        """Return the event of a job's newest preview; "" where it is gone by now."""
        try:
            picture = await self._run(lambda: self._service.preview(video["id"]).read_bytes())
        except (Refusal, StoreError, OSError):
            return ""
        data = base64.b64encode(picture).decode()
        return event(
            "preview",
            {
                "id": video["id"],
                "step": video["step"],
                "url": f"/v1/videos/{video['id']}/preview",
                "image": f"data:image/webp;base64,{data}",
            },
        )


def event(kind: str, document: dict[str, Any], id: str = "") -> str:
    """Return an event as the stream has it."""
    head = f"id: {id}\n" if id else ""
    return f"{head}event: {kind}\ndata: {json.dumps(document)}\n\n"
