"""Connections that never ask anything must not keep others out

uvicorn waits for a request's head without limit, and a process may have only so many sockets. Here a connection has
some seconds to send a head; and when there are too many, those that have been silent longest are closed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class SilentConnections:
    """Connections of one server without a request under way, the longest silent first."""

    def __init__(self, seconds: float, most: int) -> None:
        self.seconds, self.most = seconds, most
        self.silent: OrderedDict[int, GuardedProtocol] = OrderedDict()

    def add(self, connection: GuardedProtocol) -> None:
        """It waits for a request from now on."""
        self.silent[id(connection)] = connection
        while len(self.silent) > self.most:
            _, oldest = self.silent.popitem(last=False)
            oldest.close()

    def remove(self, connection: GuardedProtocol) -> None:
        self.silent.pop(id(connection), None)


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with a time limit for a request's head."""

    guard: SilentConnections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer: asyncio.TimerHandle | None = None
        self._await_head()

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and self.cycle is not None:
            self._got_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._got_head()
        super().connection_lost(exc)

    def close(self) -> None:
        """Hang up without another word."""
        self._got_head()
        with contextlib.suppress(Exception):
            self.transport.abort()

    def _await_head(self) -> None:
        self._got_head()
        self._head_timer = asyncio.get_running_loop().call_later(self.guard.seconds, self.close)
        self.guard.add(self)

    def _got_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        self.guard.remove(self)


def guarded_protocol(seconds: float = 15.0, most: int = 512) -> type[Any]:
    """A protocol class for one server (`uvicorn.Config(http=…)`)."""
    return type("GuardedProtocol", (GuardedProtocol,), {"guard": SilentConnections(seconds, most)})
