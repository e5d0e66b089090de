"""An accepted request and what becomes of it, and why a request is not accepted or not finished"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from hartist.serving.tasks import Event, Failed, Finished, Preview, Task

T = TypeVar("T", bound=Task)


class QueueFull(Exception):
    """No room for a request now."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class Draining(Exception):
    """The server takes no more requests, and has no time or no worker left for those that it has accepted."""


class DeadlineExceeded(Exception):
    """A request was not finished in time."""


@dataclass
class Ticket(Generic[T]):
    """An accepted request, with what becomes of it in `events`."""

    tasks: Sequence[T]
    waiting: deque[T]
    unfinished: set[str]
    attempts: dict[str, int] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None
    """Of the deadline. The event loop keeps it, and through it this ticket, until it is cancelled."""
    _shown: dict[str, int] = field(default_factory=dict)
    _events: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)

    async def events(self) -> AsyncIterator[Event]:
        """Events of all its tasks until each is finished or failed. Raises DeadlineExceeded or Draining."""
        left = {task.id for task in self.tasks}
        while left:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Finished | Failed):
                left.discard(event.task_id)
            yield event

    def tried(self, task: T) -> int:
        """How often an image has been begun."""
        return self.attempts.get(task.id, 0)

    def begin(self) -> T:
        """Take the next image that waits."""
        task = self.waiting.popleft()
        self.attempts[task.id] = self.tried(task) + 1
        return task

    def tell(self, event: Event) -> None:
        """Add an event. A preview is dropped if the same scale, or a later one, was shown before a worker was lost."""
        if isinstance(event, Preview):
            if event.k <= self._shown.get(event.task_id, -1):
                return
            self._shown[event.task_id] = event.k
        self._events.put_nowait(event)

    def end(self, error: Exception) -> None:
        """Whoever waits for its events gets this error."""
        self._events.put_nowait(error)

    def close(self) -> None:
        """Nothing is left to be made."""
        self.unfinished.clear()
        self.waiting.clear()
        if self.timer is not None:
            self.timer.cancel()
