"""Connections that do nothing must not keep others out

uvicorn waits without limit for a request to come and for a reply to be taken, and a process may have only so many
sockets. Here a connection has some seconds to send a head, and some in which it takes nothing of a reply; and when
there are too many, those that have owed the rest of a request for longest are closed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class SilentConnections:
    """Connections of one server of which no whole request has come, the longest silent first."""

    def __init__(self, seconds: float, most: int, read_seconds: float) -> None:
        self.seconds, self.most, self.read_seconds = seconds, most, read_seconds
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
    """uvicorn's HTTP/1.1 with time limits for a request's head and for a reply that isn't read."""

    guard: SilentConnections

    def connection_made(self, transport: Any) -> None:  # uvloop's is no asyncio.Transport
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._await_request()

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is None or self.cycle.response_complete:
            return
        if self.cycle is not before and not self.flow.write_paused:
            self._unwatch()  # the head is there; the application has its own limit for the body
        if not self.cycle.more_body:
            self.guard.remove(self)

    def send_400_response(self, msg: str) -> None:
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:  # what follows a request's head is no body
            cycle.disconnected = True  # its answer could not be sent any more
            cycle.message_event.set()
            if cycle.response_started:
                self.close()
                return
        super().send_400_response(msg)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle is None or self.cycle.response_complete:
            self._await_request()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def close(self) -> None:
        """Hang up without another word."""
        self._forget()
        with contextlib.suppress(Exception):
            self.transport.abort()

    def _await_request(self) -> None:
        self._watch()
        self.guard.add(self)

    def _watch(self) -> None:
        """Hang up if nothing happens for some seconds: no head comes, and nothing of a reply is taken."""
        self._unwatch()
        unsent = self.transport.get_write_buffer_size()
        seconds = self.guard.read_seconds if unsent else self.guard.seconds
        self._timer = asyncio.get_running_loop().call_later(seconds, self._late, unsent)

    def _late(self, unsent: int) -> None:
        if self.transport.get_write_buffer_size() < unsent:
            self._watch()  # a slow reader, but one that reads
        else:
            self.close()

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _forget(self) -> None:
        self._unwatch()
        self.guard.remove(self)


def guarded_protocol(seconds: float = 15.0, most: int = 512, read_seconds: float = 60.0) -> type[Any]:
    """A protocol class for one server (`uvicorn.Config(http=…)`).

    `seconds` to send a request's head in, `read_seconds` in which some of a reply must be taken, and at `most` so many
    connections that have not sent a whole request.
    """
    return type("GuardedProtocol", (GuardedProtocol,), {"guard": SilentConnections(seconds, most, read_seconds)})
