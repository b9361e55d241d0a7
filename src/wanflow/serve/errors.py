"""Answer every failure in one shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from wanflow.config import plain

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """An answer that is no success: its status, words for a person, a code for a program."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
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
