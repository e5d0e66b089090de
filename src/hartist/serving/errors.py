"""What goes wrong, in the shape OpenAI's clients expect; never a traceback, never an echo of the input"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from hartist.errors import UserError
from hartist.serving.tickets import DeadlineExceeded, Draining, QueueFull

log = logging.getLogger("hartist.serving")

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """An error with its status and OpenAI's fields."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(status, message)
        self.code, self.param, self.retry_after = code, param, retry_after


def as_api_error(error: Exception) -> ApiError:
    """The status and text a client gets for an exception."""
    match error:
        case ApiError():
            return error
        case QueueFull():
            return ApiError(429, str(error), code="queue_full", retry_after=error.retry_after)
        case Draining():
            return ApiError(503, str(error), code="unavailable", retry_after=5)
        case DeadlineExceeded():
            return ApiError(504, str(error), code="deadline_exceeded")
        case UserError():
            return ApiError(400, str(error), code="invalid_value")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail))
        case RequestValidationError():
            return _invalid(error)
    log.error("a request failed", exc_info=error)
    return ApiError(500, "something went wrong in the server; its log says what", code="internal_error")


def _invalid(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    place = [str(part) for part in first.get("loc", ()) if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is no valid JSON", code="invalid_json")
    name = ".".join(place)[:80].encode("ascii", "replace").decode()
    message = f"{name}: {first['msg']}" if name else str(first["msg"])
    return ApiError(400, message, code=str(first["type"]), param=name or None)


def body_of(error: ApiError) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = TYPES.get(error.status_code, "invalid_request_error" if error.status_code < 500 else "server_error")
    # A message may quote input; what no encoder accepts must not turn a refusal into a failure.
    message = str(error.detail).encode("utf-8", "replace").decode()
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}


def reply_to(error: Exception) -> JSONResponse:
    """The response for an exception."""
    known = as_api_error(error)
    headers = {"Retry-After": str(known.retry_after)} if known.retry_after else {}
    if known.status_code == 401:
        headers["WWW-Authenticate"] = 'Basic realm="hartist", charset="UTF-8"'
    return JSONResponse(body_of(known), known.status_code, headers)


def install_handlers(app: FastAPI) -> None:
    """Have every exception answered in this shape."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return reply_to(error)

    for kind in (
        ApiError,
        QueueFull,
        Draining,
        DeadlineExceeded,
        UserError,
        HTTPException,
        RequestValidationError,
        Exception,
    ):
        app.add_exception_handler(kind, handle)
