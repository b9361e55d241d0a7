"""Follow jobs by server-sent events: each change once, keep-alives, an end at the final state."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from wanflow.serve.errors import Refusal
from wanflow.serve.jobs import FINAL
from wanflow.serve.service import Service

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
                _, video, written = await self.shared.ask(self._service.one, id)
            except Refusal:
                yield event("deleted", {"id": id, "object": "video.deleted", "deleted": True})
                return
            lines = []
            if written > seen and video["status"] not in FINAL:
                seen = written
                lines.append(await self._preview(video))
            if _mark(video) != mark:
                mark = _mark(video)
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
        videos = await self.shared.ask(self._service.recent, LIST)
        yield event("list", {"object": "list", "data": [video for video, _ in videos]})
        marks = {video["id"]: (_mark(video), video["status"], 0) for video, _ in videos}
        spoke = time.monotonic()
        while not self._leaving():
            videos = await self.shared.ask(self._service.recent, LIST)
            lines: list[str] = []
            for video, written in reversed(videos):
                mark, state, seen = marks.get(video["id"], ("", "", 0))
                if written > seen:
                    lines.append(await self._preview(video))
                if _mark(video) != mark:
                    lines.append(event("progress" if video["status"] == state else "state", video))
                marks[video["id"]] = _mark(video), video["status"], written
            here = {video["id"] for video, _ in videos}
            if len(here) < LIST:  # else older ones are only out of sight
                for id in [one for one in marks if one not in here]:
                    lines.append(event("deleted", {"id": id, "deleted": True}))
            marks = {id: known for id, known in marks.items() if id in here}
            if time.monotonic() - spoke > ALIVE_S and not lines:
                lines.append(": keep-alive\n\n")
            for text in filter(None, lines):
                spoke = time.monotonic()
                yield text
            await asyncio.sleep(EVERY_S)

    async def _preview(self, video: dict[str, Any]) -> str:
        """Return the event of a job's newest preview; "" where it is gone by now."""
        try:
            picture = await self._run(self._service.preview(video["id"]).read_bytes)
        except (Refusal, OSError):
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


def _mark(video: dict[str, Any]) -> str:
    """Return what is equal for equal video objects; a reader sends it back to go on."""
    return hashlib.sha256(json.dumps(video, sort_keys=True).encode()).hexdigest()[:16]
