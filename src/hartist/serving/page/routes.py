"""Which of Gradio's many routes exist here: those the page asks for, with plain values only

Gradio can also take uploads, serve files, fetch addresses that a request names and answer for other applications.
None of that is needed, so none of it can be reached.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from starlette.routing import Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hartist.serving.errors import ApiError, reply_to

PATHS = {
    "GET": re.compile(
        r"/|/config|/theme\.css|/manifest\.json|/favicon\.ico|/assets/[\w./-]+|/static/[\w./-]+|/gradio_api/queue/data"
    ),
    "POST": re.compile(r"/gradio_api/queue/join"),
}
SESSION = re.compile(r"[A-Za-z0-9]{1,64}")

HEADERS = {
    # Whatever a prompt or a link may hold: the browser asks no other host for anything, no other site frames the page.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "referrer-policy": "same-origin",  # links hold prompts
    "x-content-type-options": "nosniff",
}


class PageRoutes(Mount):
    """The page at `/`; paths that aren't its own are left to the API."""

    def __init__(self, app: ASGIApp, functions: set[int]) -> None:
        """`functions` are the numbers of the events that a browser may trigger."""
        super().__init__("/", app)
        self.functions = functions

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        method = "GET" if scope.get("method") == "HEAD" else scope.get("method", "")
        if scope["type"] != "http" or method not in PATHS or not PATHS[method].fullmatch(scope["path"]):
            return Match.NONE, {}
        return super().matches(scope)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["path"] == "/gradio_api/queue/join":
                receive = _replay(self._checked(await _body(receive)), receive)
            if scope["path"] != "/gradio_api/queue/data":
                scope["query_string"] = b""  # a link's values are read by the page, which sends them as such
        except ApiError as error:
            await reply_to(error)(scope, receive, send)
            return
        await super().handle(scope, receive, _with_headers(send))

    def _checked(self, body: bytes) -> bytes:
        """An event as JSON with what the page sends and nothing else. Raises ApiError.

        Gradio opens a path or an address wherever it finds an object that looks like a file; the form has only plain
        values, and a picture comes as an event's own data.
        """
        try:
            event: Any = json.loads(body)
            data, function, session = event["data"], event["fn_index"], event["session_hash"]
        except (ValueError, TypeError, LookupError, RecursionError):
            raise ApiError(400, "this is no event of the page", code="invalid_event") from None
        more = event.get("event_data") or {}
        trigger = event.get("trigger_id")
        if not (
            isinstance(data, list)
            and isinstance(more, dict)
            and all(_is_plain(value) for value in (trigger, *data, *more.values()))
            and type(function) is int
            and function in self.functions
            and isinstance(session, str)
            and SESSION.fullmatch(session)
        ):
            raise ApiError(400, "this is no event of the page", code="invalid_event")
        kept = {"data": data, "event_data": more, "fn_index": function, "session_hash": session, "trigger_id": trigger}
        return json.dumps(kept).encode()


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ApiError(499, "the client has gone")
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A body again, then whatever comes."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return first.pop() if first else await receive()

    return replayed


def _with_headers(send: Send) -> Send:
    async def extended(message: Message) -> None:
        if message["type"] == "http.response.start":
            extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        await send(message)

    return extended
