"""Read the body of a submission: bounded while it comes, JSON or a form, into plain values."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qsl

from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from wanflow.config import RequestError
from wanflow.serve.errors import Refusal
from wanflow.untrusted import parse_json, printable

BODY_S = 120.0  # for a body to come
MOST_FIELDS, MOST_FILES = 100, 4


async def read_fields(request: Request, limit: int) -> tuple[dict[str, Any], bool]:
    """Return the fields of a body, and whether it is a form, whose values are texts and bytes.

    Raises:
        Refusal: for a body that is too long, too slow, or of another kind.
        RequestError: for one that cannot be read.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    forms = {"multipart/form-data", "application/x-www-form-urlencoded"}
    if kind != "application/json" and kind not in forms:
        raise Refusal(
            415,
            f"content-type {printable(kind, 60)}: send application/json or multipart/form-data",
            "unknown_media",
        )
    coding = request.headers.get("content-encoding", "identity")
    if coding.strip().lower() != "identity":
        words = f"content-encoding {printable(coding, 60)}: send the body as it is"
        raise Refusal(415, words, "unknown_media")
    body = await _bytes(request, limit)
    if kind == "application/json":
        value = parse_json(body, "the body", limit)
        if not isinstance(value, dict):
            raise RequestError('the body must be a JSON object, such as {"prompt": "..."}')
        return value, False
    return _nested(await _form(request, body, kind, limit)), True


async def _bytes(request: Request, limit: int) -> bytes:
    """Return a body of at most `limit` bytes, however it is sent."""
    words = f"the body has more than {limit:,} bytes, the limit of this server"
    too_long = Refusal(413, words, "body_too_large")
    stated = request.headers.get("content-length", "")
    if stated.isdigit() and int(stated[:20]) > limit:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_long
    except TimeoutError:
        words = f"the body did not come within {BODY_S:.0f} s"
        raise Refusal(408, words, "body_too_slow") from None
    except ClientDisconnect:
        words = "the client went away before the body ended"
        raise Refusal(400, words, "client_gone") from None
    return bytes(body)


async def _form(request: Request, body: bytes, kind: str, limit: int) -> list[tuple[str, Any]]:
    if kind != "multipart/form-data":
        try:
            # Letters may stand as they are, as `curl -d prompt=...` sends them.
            pairs = parse_qsl(body.decode(), True, errors="strict", max_num_fields=MOST_FIELDS)
        except UnicodeError:
            raise RequestError("the form is not UTF-8; send it in UTF-8") from None
        except ValueError:
            raise RequestError(f"the form has more than {MOST_FIELDS} fields") from None
        return list(pairs)

    async def stream() -> AsyncIterator[bytes]:
        yield body

    try:
        parser = MultiPartParser(
            request.headers,
            _generator(stream()),
            max_files=MOST_FILES,
            max_fields=MOST_FIELDS,
            max_part_size=limit,
        )
        form = await parser.parse()
    except MultiPartException as error:
        raise RequestError(f"the form cannot be read: {printable(error.message)}") from None
    except Exception as error:  # the parser raises errors of nearly every kind
        raise RequestError(f"the form cannot be read: {type(error).__name__}") from None
    found: list[tuple[str, Any]] = []
    for name, value in form.multi_items():
        if len(found) >= MOST_FIELDS + MOST_FILES:
            raise RequestError(f"the form has more than {MOST_FIELDS} fields")
        found.append((name, value if isinstance(value, str) else await value.read()))
    await form.close()
    if "charset" not in request.headers["content-type"].lower():
        _refuse_other_letters(found, body)
    return found


def _refuse_other_letters(items: list[tuple[str, Any]], body: bytes) -> None:
    """Raise RequestError for a text that was not UTF-8: the parser takes it for Latin-1."""
    at = 0
    for name, value in items:
        if isinstance(value, str) and not value.isascii():
            at = body.find(value.encode(), at)  # one that was UTF-8 stands in the body as it is
            if at < 0:
                raise RequestError(f"{printable(name, 60)} is not UTF-8; send the form in UTF-8")


def _generator(stream: AsyncIterator[bytes]) -> Any:
    return stream


def _nested(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the fields of a form: `a[b]` is field b of object a, `a[]` an item of a list.

    Raises:
        RequestError: for a field that is given twice.
    """
    found: dict[str, Any] = {}
    for name, value in items:
        parts = re.fullmatch(r"([^\[\]]+)(?:\[([^\[\]]*)\])?", name)
        if parts is None:
            raise RequestError(f"{printable(name, 60)} is not the name of a field")
        base, inner = parts[1], parts[2]
        twice = RequestError(f"{printable(name, 60)} is given twice; give it once")
        if inner is None:
            if base in found:
                raise twice
            found[base] = value
        elif inner == "":
            items_so_far = found.setdefault(base, [])
            if not isinstance(items_so_far, list):
                raise twice
            items_so_far.append(value)
        else:
            fields = found.setdefault(base, {})
            if not isinstance(fields, dict) or inner in fields:
                raise twice
            fields[inner] = value
    return found
