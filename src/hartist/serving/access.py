"""Who may ask: API keys, hosts and origins, sizes of bodies, rates

One ASGI middleware before everything else, so that no route can forget it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hartist.errors import UserError
from hartist.serving.errors import ApiError, reply_to
from hartist.serving.tickets import Draining, QueueFull

LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN_PATHS = ("/healthz", "/readyz")
"""What a load balancer asks needs no key."""
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([\w.-]+))(?::\d{0,5})?", re.ASCII | re.IGNORECASE)
"""A name or an address, and perhaps a port: nothing that could turn the URL of a picture into another one."""


@dataclass(frozen=True)
class AccessRules:
    keys: tuple[str, ...] = ()
    """Any of these opens the API (`Authorization: Bearer KEY`) and the page (as the password); none: no key needed."""
    hosts: tuple[str, ...] = ()
    """Names by which the server may be called; none: any. Against pages that point their own name at this machine."""
    max_body: int = 1 << 20
    max_upload: int = 12 << 20
    """Bytes of a body on the page's own paths, which take pictures."""
    max_bodies: int = 256 << 20
    """Bytes of the bodies of all requests that are under way."""
    images_per_minute: int = 0
    """Per key, or address where there are no keys; 0: no limit."""
    body_seconds: float = 30.0
    """Time to send a body in."""


class Access:
    """ASGI middleware that refuses what the rules don't allow."""

    def __init__(self, app: ASGIApp, rules: AccessRules) -> None:
        self.app, self.rules = app, rules
        self._digests = [_digest(key.encode("utf-8", "surrogateescape")) for key in rules.keys]
        self._hosts = {host.lower() for host in rules.hosts}
        self._bodies = 0
        """Bytes of those that are under way."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            host = headers.get("host", "")
            if scope["path"] not in OPEN_PATHS:  # probes call a server by its address
                self._check_host(host)
            self._check_origin(headers.get("origin"), host)
            scope["hartist_client"] = self._client(scope, headers)
            limit = self.rules.max_body if scope["path"].startswith("/v1/") else self.rules.max_upload
            self._check_length(headers, limit)
            if not scope["query_string"].isascii():  # whoever decodes it would stumble
                raise ApiError(400, "the query has bytes that must be written as %XX", code="invalid_query")
        except ApiError as error:
            scope["query_string"] = b""  # a page's link holds a prompt, which is not for the log
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await reply_to(error)(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
            return
        body = _Body(self, receive, limit)
        try:
            await self.app(scope, body.receive, send)
        finally:
            self._bodies -= body.bytes

    def count(self, new: int) -> None:
        """So many more bytes of a body are in memory. Raises ApiError if there is no room for them."""
        if self._bodies + new > self.rules.max_bodies:
            raise ApiError(503, "too much is being sent at once; try again", code="busy", retry_after=5)
        self._bodies += new

    def _check_host(self, host: str) -> None:
        name = HOST.fullmatch(host)
        if host and name is None:
            raise ApiError(400, "the Host header names no host", code="invalid_host")
        if self._hosts and (name is None or (name[1] or name[2]).lower() not in self._hosts):
            raise ApiError(403, "this host name is not served here; the operator can allow it with --allow-host")

    def _check_origin(self, origin: str | None, host: str) -> None:
        """A page of another site may not use a visitor's browser to ask."""
        if origin is not None and (not host or origin.lower().partition("://")[2] != host.lower()):
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


class _Body:
    """A request's body, counted as it comes in; it must be there in time."""

    def __init__(self, access: Access, receive: Receive, limit: int) -> None:
        self.access, self._receive, self.limit = access, receive, limit
        self.bytes, self.complete = 0, False
        self.end = time.monotonic() + access.rules.body_seconds

    async def receive(self) -> Message:
        """The next message. Raises ApiError for a body that is too large or too slow."""
        if self.complete:
            return await self._receive()  # waits for the client to go away
        try:
            async with asyncio.timeout(max(0.0, self.end - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            seconds = self.access.rules.body_seconds
            raise ApiError(408, f"the body was not sent within {seconds:g} s", code="body_too_slow") from None
        if message["type"] == "http.request":
            new = len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
            if self.bytes + new > self.limit:
                raise ApiError(413, f"the body may have {self.limit} bytes", code="body_too_large")
            self.access.count(new)
            self.bytes += new
        return message


def _credential(headers: Headers) -> bytes:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":  # what a browser sends after it has asked for a password
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except ValueError:
            return b""
    return value.strip(" ").encode("latin-1") if scheme.lower() == "bearer" else b""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Rates:
    """How many images a client has asked for in the last minute: a bucket that fills steadily."""

    def __init__(self, images_per_minute: int, clients: int = 10_000) -> None:
        self.images_per_minute, self.clients = images_per_minute, clients
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, client: str, images: int, now: float | None = None) -> None:
        """Count `images` against a client. Raises ApiError: 429 with the seconds to wait, 400 if waiting is no use."""
        if not self.images_per_minute:
            return
        if images > self.images_per_minute:
            message = f"{self.images_per_minute} images a minute are allowed; ask for no more at once"
            raise ApiError(400, message, code="rate_limit_too_low", param="n")
        now = time.monotonic() if now is None else now  # not the clock: it may be set
        full = float(self.images_per_minute)
        level, then = self._buckets.pop(client, (full, now))
        level = min(full, level + (now - then) * full / 60)
        if len(self._buckets) >= self.clients:
            self._buckets.pop(next(iter(self._buckets)))  # who has been quiet for longest
        if images > level:
            self._buckets[client] = (level, now)
            wait = math.ceil((images - level) * 60 / full)
            raise ApiError(
                429,
                f"{self.images_per_minute} images a minute are allowed; try again in {wait} s",
                code="rate_limit_exceeded",
                retry_after=max(1, wait),
            )
        self._buckets[client] = (level - images, now)

    @contextlib.contextmanager
    def charged(self, client: str, images: int) -> Iterator[None]:
        """Count `images` as `take` does, unless it turns out within that the server has no room for them."""
        self.take(client, images)
        try:
            yield
        except (QueueFull, Draining):
            if client in self._buckets:
                level, then = self._buckets[client]
                self._buckets[client] = (level + images, then)
            raise


def outside(host: str, allowed: Sequence[str]) -> str | None:
    """Why other machines can ask a server that listens at `host` and allows these names; None if they can't.

    A name that isn't this machine's own is one that a proxy passes on.
    """
    if host not in LOOPBACK:
        return f"{host} can be reached from other machines"
    named = [name for name in allowed if name.lower() not in LOOPBACK]
    return f"--allow-host {named[0]} lets other machines ask, by a proxy" if named else None


def read_keys(text: str | None) -> tuple[str, ...]:
    """The keys in HARTIST_API_KEY, separated by commas. Raises UserError if it is set, but to none."""
    keys = tuple(key.strip() for key in (text or "").split(",") if key.strip())
    if text is not None and not keys:
        raise UserError("HARTIST_API_KEY is set but holds no key; give one, or unset it to serve without")
    return keys
