"""A worker's pipe as an event loop sees it: a thread each way, so that the loop never waits for the other end

A connection takes one message at a time from one thread. What is sent here waits its turn in a queue, so a
cancellation can't overtake its batch, nor get into the middle of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from multiprocessing.connection import Connection
from typing import Any

log = logging.getLogger("hartist.serving")


class Channel:
    """One end of a pipe. Methods are for the event loop's thread."""

    def __init__(self, pipe: Connection) -> None:
        """Starts to read; `pipe` belongs to this object."""
        self._pipe = pipe
        self._loop = asyncio.get_running_loop()
        self._received: asyncio.Queue[Any] = asyncio.Queue()
        self._unsent: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=work, name=f"hartist-pipe-{name}", daemon=True)
            for name, work in (("reader", self._read), ("writer", self._write))
        ]
        for thread in self._threads:
            thread.start()

    def send(self, message: Any) -> None:
        """Send it after what was sent before; never waits, and never raises."""
        self._unsent.put(message)

    async def receive(self) -> Any:
        """The next message; None once there will be no more, or once something could not be sent."""
        return await self._received.get()

    async def close(self, patience: float = 5.0) -> None:
        """Let go of the pipe, whose other end is closed."""
        self._unsent.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join, patience)  # both have seen the end by now
        with contextlib.suppress(OSError):
            self._pipe.close()

    def _hand_on(self, message: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._received.put_nowait, message)

    def _read(self) -> None:
        message: Any = True
        while message is not None:
            try:
                message = self._pipe.recv()
            except (EOFError, OSError, TypeError):  # closed at either end; TypeError: closed while it was read
                message = None
            except Exception:  # what came is no message of ours
                log.exception("a worker's message could not be read")
                message = None
            self._hand_on(message)

    def _write(self) -> None:
        while (message := self._unsent.get()) is not None:
            try:
                self._pipe.send(message)
            except OSError:
                self._hand_on(None)
                return
            except Exception:
                log.exception("a message to a worker could not be sent")
                self._hand_on(None)
                return
