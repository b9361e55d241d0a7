"""Answer every failure in one shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any, Literal

from starlette.responses import JSONResponse

from wanflow.config import plain

# Of refusals, then of jobs; the page has words for each.
Code = Literal[
    "body_too_large",
    "body_too_slow",
    "client_gone",
    "cross_site",
    "disk_full",
    "does_not_fit",
    "file_missing",
    "idempotency_conflict",
    "invalid_key",
    "invalid_range",
    "invalid_token",
    "invalid_value",
    "model_not_found",
    "no_preview",
    "no_route",
    "no_worker",
    "not_cancelled_yet",
    "not_found",
    "not_ready",
    "picture_missing",
    "queue_full",
    "server_ends",
    "server_error",
    "store_unavailable",
    "unknown_media",
    "wrong_host",
    "bad_output",
    "cancelled",
    "failed",
    "invalid_request",
    "out_of_memory",
    "worker_failed",
]
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """An answer that is no success: its status, words for a person, a code for a program."""

    def __init__(
        self,
        status: int,
        message: str,
        code: Code,
        param: str | None = None,
        retry_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_s = retry_s

    def response(self) -> JSONResponse:
        """Return the answer."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "")
        headers: dict[str, str] = {}
        if self.retry_s is not None:
            headers["Retry-After"] = str(max(1, round(self.retry_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        error: dict[str, Any] = {
            "message": plain(self.message),
            "type": kind or "server_error",
            "param": self.param,
            "code": self.code,
        }
        return JSONResponse({"error": error}, self.status, headers)
