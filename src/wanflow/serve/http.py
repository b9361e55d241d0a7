"""Offer the videos API: routes only; what they do is in `service`, what they take in `wire`."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from wanflow import __version__
from wanflow.config import RequestError
from wanflow.serve.bodies import read_fields
from wanflow.serve.errors import Refusal
from wanflow.serve.events import EVERY_S, Events
from wanflow.serve.fields import FIELDS, NOTHING
from wanflow.serve.guard import Guard
from wanflow.serve.jobs import StoreError
from wanflow.serve.metrics import Metrics
from wanflow.serve.retention import Retention
from wanflow.serve.schemas import Deleted, Failure, ModelList, Video, VideoList, form, submission
from wanflow.serve.service import Service, missing
from wanflow.serve.wire import media_type
from wanflow.untrusted import printable, shown

T = TypeVar("T")
PAGE = Path(__file__).parent / "page"
DOCUMENT = Path(__file__).parent / "openapi.json"
THREADS = 8  # that ask the store
READERS = 4  # that read submissions, and wait for a plan
KEY = re.compile(r"[!-~]{1,255}")
ID = re.compile(r"video_[0-9a-f]{32}")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".png": "image/png",
    ".webp": "image/webp",
    ".woff2": "font/woff2",
    ".txt": "text/plain; charset=utf-8",
}
CHANGES = ("/remix", "/edits", "/extensions")  # routes that OpenAI had
Variant = Literal["video", "thumbnail", "spritesheet"]
BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": submission()},
            "multipart/form-data": {"schema": form()},
        },
    }
}


def refused(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the failures of a route, for the document."""
    return {status: {"model": Failure} for status in (*statuses, 401, 403, 503)}


def answered(media: str) -> dict[int | str, dict[str, Any]]:
    """Return the success of a route that answers with bytes, for the document."""
    return {200: {"content": {media: {"schema": {"type": "string", "format": "binary"}}}}}


def create_app(
    service: Service,
    token: str = "",
    log: bool = False,
    leaving: Callable[[], bool] = lambda: False,
    every_s: float = 60.0,
) -> FastAPI:
    """Return the application.

    Args:
        service: what it calls.
        token: that clients must send; "" for none.
        log: whether each request becomes a line of the log.
        leaving: whether the process shall end, which ends streams of events.
        every_s: between two looks of the retention.
    """
    threads = ThreadPoolExecutor(THREADS, "store")
    readers = ThreadPoolExecutor(READERS, "reader")

    async def run(call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, partial(call, *args))

    async def read(call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(readers, partial(call, *args))

    metrics = Metrics(service)
    background = (metrics.watch, Retention(service, every_s).watch)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(watch(run)) for watch in background]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        threads.shutdown(wait=False, cancel_futures=True)
        readers.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="wanflow",
        version=__version__,
        description="The videos API: a prompt, or a picture and a prompt, becomes a video.",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan,
    )
    app.add_middleware(Guard, token=token, log=log)
    _add_failures(app)
    events = Events(service, run, leaving)
    _add_videos(app, service, run, read, leaving)
    _add_files(app, service, run)
    _add_events(app, service, run, events)
    _add_server(app, service, run, metrics)
    _add_page(app)
    return app


def checked(id: str, param: str = "video_id") -> str:
    """Return the id of a job; Refusal for what no job has, which no database need see."""
    if not ID.fullmatch(id):
        raise missing(re.sub("[^ -~]", "?", id[:60]), param)
    return id


async def submitted(request: Request, service: Service, read: Any) -> Any:
    """Return the job of a submission."""
    key = request.headers.get("idempotency-key")
    if key is not None and not KEY.fullmatch(key):
        words = "Idempotency-Key must be 1 to 255 visible ASCII characters"
        raise Refusal(400, words, "invalid_key")
    given, in_form = await read_fields(request, service.limits.body)
    return await read(service.submit, given, in_form, key)


def _add_videos(
    app: FastAPI, service: Service, run: Any, read: Any, leaving: Callable[[], bool]
) -> None:
    @app.post(
        "/v1/videos",
        responses={200: {"model": Video}, **refused(400, 404, 408, 409, 413, 415, 429)},
        openapi_extra=BODY,
    )
    async def create_video(request: Request) -> JSONResponse:
        """Submit a job. Idempotency-Key: a repeated submission returns the first one's job."""
        job = await submitted(request, service, read)
        return JSONResponse(await run(service.kept, job))

    @app.post(
        "/v1/videos/sync",
        responses={
            **answered("video/mp4"),
            500: {"model": Failure},
            **refused(400, 404, 408, 409, 413, 415, 429),
        },
        openapi_extra=BODY,
    )
    async def create_video_and_wait(request: Request) -> Response:
        """Submit a job and wait for its video; a client that goes away cancels it."""
        job = await submitted(request, service, read)
        while True:
            found, video, _ = await run(service.one, job.id)
            if found.final:
                break
            if await request.is_disconnected():
                await run(service.cancel, job.id)
                return Response(status_code=499)
            if leaving():
                words = f"the server ends; video {job.id} is kept: ask for it when it is back"
                raise Refusal(503, words, "server_ends", retry_s=5)
            await asyncio.sleep(EVERY_S)
        headers = {"X-Video-Id": job.id}
        if video["status"] == "completed":
            path = await run(service.file, job.id, "video")
            return FileResponse(path, media_type=media_type(path.name), headers=headers)
        error = video["error"] or {"code": "cancelled", "message": f"{job.id} was cancelled"}
        status = 409 if video["status"] == "cancelled" else 500
        raise Refusal(status, error["message"], error["code"])

    @app.get("/v1/videos", responses={200: {"model": VideoList}, **refused(400, 404)})
    async def list_videos(
        after: Annotated[str | None, Query(description="the last id of the page before")] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> JSONResponse:
        """List jobs, the newest first unless order is asc."""
        after = None if after is None else checked(after, "after")
        data, more = await run(service.page, after, limit, order == "desc")
        ids = [one["id"] for one in data]
        first, last = (ids[0], ids[-1]) if ids else (None, None)
        return JSONResponse(
            {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more}
        )

    @app.get("/v1/videos/{video_id}", responses={200: {"model": Video}, **refused(404)})
    async def get_video(video_id: str) -> JSONResponse:
        """Return a job, also one that failed: it has an error."""
        return JSONResponse((await run(service.one, checked(video_id)))[1])

    @app.delete("/v1/videos/{video_id}", responses={200: {"model": Deleted}, **refused(404, 409)})
    async def delete_video(video_id: str) -> JSONResponse:
        """Delete a job and its files; one at work is cancelled first."""
        id = checked(video_id)
        until = time.monotonic() + DELETE_S
        while not await run(service.delete, id):
            if time.monotonic() > until:
                raise Refusal(
                    409,
                    f"video {id} is still at work; it is being cancelled: delete it again in a"
                    " moment",
                    "not_cancelled_yet",
                    retry_s=5,
                )
            await asyncio.sleep(EVERY_S)
        return JSONResponse({"id": id, "object": "video.deleted", "deleted": True})

    @app.post("/v1/videos/{video_id}/cancel", responses={200: {"model": Video}, **refused(404)})
    async def cancel_video(video_id: str) -> JSONResponse:
        """Cancel a job; one at work stops within a step."""
        return JSONResponse(await run(service.cancel, checked(video_id)))


DELETE_S = 30.0  # for a job at work to be cancelled


class Content(FileResponse):
    """A file; 304 for a client that has it; a wrong Range is answered in the shape of failures."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = Headers(scope=scope)
        known = {
            tag.strip().removeprefix("W/") for tag in asked.get("if-none-match", "").split(",")
        }
        # Units that are not bytes are to be ignored.
        if not asked.get("range", "bytes").strip().lower().startswith("bytes"):
            kept = [(name, value) for name, value in scope["headers"] if name != b"range"]
            scope = {**scope, "headers": kept}
        refused = False

        async def sending(message: Message) -> None:
            nonlocal refused
            starts = message["type"] == "http.response.start"
            if starts and message["status"] in (200, 206) and {"*", self.headers["etag"]} & known:
                refused = True
                kept = ("etag", "last-modified", "cache-control")
                headers = {name: self.headers[name] for name in kept}
                await Response(status_code=304, headers=headers)(scope, receive, send)
            elif starts and message["status"] in (400, 416):
                refused = True
                words = "Range: the file has no such bytes; ask for bytes=FIRST-LAST within it"
                answer = Refusal(message["status"], words, "invalid_range", "range").response()
                answer.headers["Content-Range"] = f"bytes */{self.headers['content-length']}"
                await answer(scope, receive, send)
            elif not refused:
                await send(message)

        await super().__call__(scope, receive, sending)


def _add_files(app: FastAPI, service: Service, run: Any) -> None:
    @app.get(
        "/v1/videos/{video_id}/content",
        responses={
            **answered("video/mp4"),
            206: {"description": "the range of bytes that was asked for"},
            416: {"description": "the file has no such range"},
            **refused(400, 404, 409),
        },
    )
    @app.head("/v1/videos/{video_id}/content", include_in_schema=False)
    async def get_content(video_id: str, variant: Variant = "video") -> Content:
        """Return the video, or its thumbnail or spritesheet; takes Range."""
        path = await run(service.file, checked(video_id), variant)
        kind = media_type(path.name) if variant == "video" else "image/webp"
        name = f"{video_id}{path.suffix}"
        return Content(path, media_type=kind, filename=name, headers=PRIVATE)

    @app.get("/v1/videos/{video_id}/preview", responses={**answered("image/webp"), **refused(404)})
    async def get_preview(video_id: str) -> Response:
        """Return the newest preview of a job at work."""
        path = await run(service.preview, checked(video_id))
        # At once: a worker replaces the file at any moment, so its length is that of these bytes.
        return Response(await run(path.read_bytes), media_type="image/webp")

    @app.get("/v1/videos/{video_id}/recipe", responses=refused(404, 409))
    async def get_recipe(video_id: str) -> JSONResponse:
        """Return the recipe in a video: everything needed to make it again."""
        return JSONResponse(await run(service.recipe, checked(video_id)))

    @app.get("/v1/videos/{video_id}/request", responses=refused(404))
    async def get_request(video_id: str) -> JSONResponse:
        """Return the fields to submit to make a job again, also one that failed."""
        return JSONResponse(await run(service.request, checked(video_id)))


PRIVATE = {"Cache-Control": "private, max-age=3600"}
STREAM = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def _add_events(app: FastAPI, service: Service, run: Any, events: Events) -> None:
    stream: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

    @app.get("/v1/videos/{video_id}/events", responses={**stream, **refused(404)})
    async def follow_video(video_id: str, request: Request) -> StreamingResponse:
        """Follow a job: state, progress and preview events, to its end. Takes Last-Event-ID."""
        id = checked(video_id)
        await run(service.one, id)
        last = request.headers.get("last-event-id")
        return StreamingResponse(events.one(id, last), 200, STREAM, "text/event-stream")

    @app.get("/v1/events", responses={**stream, **refused()})
    async def follow_all() -> StreamingResponse:
        """Follow all jobs: a list event, then state, progress, preview and deleted events."""
        return StreamingResponse(events.all(), 200, STREAM, "text/event-stream")


def _add_server(app: FastAPI, service: Service, run: Any, metrics: Metrics) -> None:
    @app.get("/v1/models", responses={200: {"model": ModelList}, **refused()})
    async def list_models() -> JSONResponse:
        """List the model that is served."""
        spec = await run(service.model)
        one = {"id": spec.name, "object": "model", "created": 0, "owned_by": "wanflow"}
        return JSONResponse({"object": "list", "data": [one]})

    @app.get("/v1/models/{model}", include_in_schema=False)
    async def get_model(model: str) -> JSONResponse:
        spec = await run(service.model)
        if model != spec.name:
            raise Refusal(404, f"this server has the model {spec.name}", "model_not_found", "model")
        return JSONResponse(
            {"id": spec.name, "object": "model", "created": 0, "owned_by": "wanflow"}
        )

    @app.get("/v1/settings", responses=refused())
    async def get_settings() -> JSONResponse:
        """Return what the server offers: model, sizes, defaults, presets, LoRAs, limits."""
        return JSONResponse(await run(service.settings))

    @app.get("/health", include_in_schema=False)  # as vLLM-Omni, SGLang and FastVideo have it
    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        """Say that the process lives."""
        return JSONResponse({"status": "ok"})

    @app.get("/readyz", responses={503: {"model": Failure}})
    async def readyz() -> JSONResponse:
        """Say whether a job can start: a worker is ready."""
        if not await run(service.ready):
            raise Refusal(503, "no worker is ready yet", "not_ready", retry_s=2)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}, **refused()})
    async def get_metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(await run(metrics.text), media_type=metrics.media_type)


def _add_page(app: FastAPI) -> None:
    def file(name: str) -> Response:
        path = PAGE / name
        inside = path.resolve().is_relative_to(PAGE.resolve())
        kind = TYPES.get(path.suffix)
        if not inside or kind is None or not path.is_file():
            raise Refusal(404, "there is no such file of the page", "not_found")
        return Response(path.read_bytes(), media_type=kind, headers={"Cache-Control": "no-cache"})

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        found = file("index.html")
        found.headers["Cache-Control"] = "no-store"
        return found

    @app.get("/page/{name:path}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        return file(name.replace("\0", ""))

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return Response(DOCUMENT.read_bytes(), media_type="application/json")


# Failures


def _add_failures(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refusal(_: Request, error: Refusal) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestError)
    async def invalid(_: Request, error: RequestError) -> JSONResponse:
        message = " ".join(str(error).split())
        word = re.match(r"\w*", message)
        param = word[0] if word and (word[0] in FIELDS or word[0] in NOTHING) else None
        return Refusal(400, message, "invalid_value", param).response()

    @app.exception_handler(StoreError)
    async def unreachable(_: Request, error: StoreError) -> JSONResponse:
        words = (
            "the place that keeps jobs cannot be reached; try again (with an Idempotency-Key, a"
            " submission that was kept is not made twice)"
        )
        return Refusal(503, words, "store_unavailable", retry_s=5).response()

    @app.exception_handler(RequestValidationError)
    async def wrong_query(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        words = f"{name}: {first['msg']} (got {shown(first.get('input'))})"
        return Refusal(400, words, "invalid_value", name).response()

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        asked, words = f"{request.method} {printable(request.url.path, 100)}", str(error.detail)
        if error.status_code in (404, 405):
            words = f"{asked}: there is no such route; /openapi.json lists all"
        if request.url.path.endswith(CHANGES):
            words = (
                f"{asked}: wanflow changes no video that is made; send the fields of GET"
                " /v1/videos/ID/request again, with another prompt"
            )
        found = Refusal(error.status_code, words, "no_route").response()
        found.headers.update(error.headers or {})
        return found

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> JSONResponse:
        words = "a fault of the server; its log says more"
        return Refusal(500, words, "server_error").response()
