"""Who may ask: API keys, hosts and origins, sizes of bodies, rates

One ASGI middleware before everything else, so that no route can forget it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hartist.serving.errors import ApiError, reply_to

OPEN_PATHS = ("/healthz", "/readyz")
"""What a load balancer asks needs no key."""


@dataclass(frozen=True)
class AccessRules:
    keys: tuple[str, ...] = ()
    """Any of these opens the API (`Authorization: Bearer KEY`) and the page (as the password); none: no key needed."""
    hosts: tuple[str, ...] = ()
    """Names by which the server may be called; none: any. Against pages that point their own name at this machine."""
    max_body: int = 1 << 20
    max_upload: int = 12 << 20
    """Bytes of a body on the page's own paths, which take pictures."""
    images_per_minute: int = 0
    """Per key, or address where there are no keys; 0: no limit."""
    body_seconds: float = 30.0
    """Time to send a body in."""


class Access:
    """ASGI middleware that refuses what the rules don't allow."""

    def __init__(self, app: ASGIApp, rules: AccessRules) -> None:
        self.app, self.rules = app, rules
        self._digests = [_digest(key) for key in rules.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            if scope["path"] not in OPEN_PATHS:  # probes call a server by its address
                self._check_host(headers)
            self._check_origin(headers)
            scope["hartist_client"] = self._client(scope, headers)
            limit = self.rules.max_body if scope["path"].startswith("/v1/") else self.rules.max_upload
            self._check_length(headers, limit)
        except ApiError as error:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await reply_to(error)(scope, receive, send)
            return
        if scope["type"] == "http":
            receive = _limited(receive, limit, self.rules.body_seconds)
        await self.app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        if self.rules.hosts and _hostname(headers.get("host", "")) not in self.rules.hosts:
            raise ApiError(403, "this host name is not served here; the operator can allow it with --allow-host")

    def _check_origin(self, headers: Headers) -> None:
        """A page of another site may not use a visitor's browser to ask."""
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host", ""):
            raise ApiError(403, "requests from other sites are not allowed", code="foreign_origin")

    def _client(self, scope: Scope, headers: Headers) -> str:
        """Whose rate this counts against. Raises ApiError without a right key."""
        address = scope["client"][0] if scope.get("client") else "local"
        if not self._digests or scope["path"] in OPEN_PATHS:
            return str(address)
        given = _digest(_credential(headers))
        # All are compared, in constant time: how long it takes tells nothing about the keys.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if not any(matches):
            raise ApiError(401, "a valid API key is needed (Authorization: Bearer …)", code="invalid_api_key")
        return given.hex()[:16]

    def _check_length(self, headers: Headers, limit: int) -> None:
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length[:20]) > limit:
            raise ApiError(413, f"the body may have {limit} bytes", code="body_too_large")


def _limited(receive: Receive, limit: int, seconds: float) -> Receive:
    """Bodies are counted as they come in, and must be there in time."""
    seen, complete = 0, False
    end = time.monotonic() + seconds

    async def counted() -> Message:
        nonlocal seen, complete
        if complete:
            return await receive()  # waits for the client to go away
        try:
            async with asyncio.timeout(max(0.0, end - time.monotonic())):
                message = await receive()
        except TimeoutError:
            raise ApiError(408, f"the body was not sent within {seconds:g} s", code="body_too_slow") from None
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if seen > limit:
                raise ApiError(413, f"the body may have {limit} bytes", code="body_too_large")
        return message

    return counted


def _credential(headers: Headers) -> str:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":  # what a browser sends after it has asked for a password
        try:
            return base64.b64decode(value, validate=True).decode("utf-8", "replace").partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return value.strip() if scheme.lower() == "bearer" else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _hostname(host: str) -> str:
    """Without its port."""
    return urlsplit(f"//{host}").hostname or ""


class Rates:
    """How many images a client has asked for in the last minute: a bucket that fills steadily."""

    def __init__(self, images_per_minute: int, clients: int = 10_000) -> None:
        self.images_per_minute, self.clients = images_per_minute, clients
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, client: str, images: int, now: float | None = None) -> None:
        """Count `images` against a client. Raises ApiError 429 with the seconds to wait."""
        if not self.images_per_minute:
            return
        now = time.monotonic() if now is None else now  # not the clock: it may be set
        full = float(self.images_per_minute)
        level, then = self._buckets.pop(client, (full, now))
        level = min(full, level + (now - then) * full / 60)
        if len(self._buckets) >= self.clients:
            self._buckets.pop(next(iter(self._buckets)))  # who has been quiet for longest
        if images > level:
            self._buckets[client] = (level, now)
            wait = math.ceil((min(images, full) - level) * 60 / full)
            raise ApiError(
                429,
                f"{self.images_per_minute} images a minute are allowed; try again in {wait} s",
                code="rate_limit_exceeded",
                retry_after=max(1, wait),
            )
        self._buckets[client] = (level - images, now)


def require_key_outside(host: str, keys: Sequence[str], allow_anonymous: bool) -> str | None:
    """What is wrong with serving at `host` with these keys, if anything."""
    if host in ("127.0.0.1", "::1", "localhost") or keys or allow_anonymous:
        return None
    return f"{host} can be reached from other machines; set HARTIST_API_KEY, or pass --allow-anonymous"
