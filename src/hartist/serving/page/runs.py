"""What each open page has under way: one run at a time, which Stop, another run or leaving the page ends"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import gradio as gr

from hartist.serving.pauses import with_pauses
from hartist.serving.scheduler import Scheduler
from hartist.serving.tasks import Event, Task

TICK_SECONDS = 1.0
"""How often a run without news is looked at; a page that was left is noticed then."""


@dataclass(frozen=True)
class Visitor:
    """An open page: who it counts against, and Gradio's name for it."""

    client: str
    session: str

    @classmethod
    def of(cls, request: gr.Request) -> Visitor:
        """Whoever sends a request; `Access` has let them in."""
        scope = request.request.scope if request.request is not None else {}
        return cls(scope.get("hartist_client", "local"), request.session_hash or "")


class Stopped(Exception):
    """A run was ended from outside, by a newer one if `superseded`."""

    def __init__(self, superseded: bool) -> None:
        super().__init__()
        self.superseded = superseded


@dataclass
class Runs:
    """The runs of all open pages."""

    scheduler: Scheduler
    _stops: dict[Visitor, asyncio.Event] = field(default_factory=dict)

    def stop(self, visitor: Visitor) -> None:
        """End what a page has under way, if anything."""
        if visitor in self._stops:
            self._stops[visitor].set()

    async def follow(
        self, visitor: Visitor, tasks: Sequence[Task], arrived: float | None = None
    ) -> AsyncGenerator[Event | None, None]:
        """Events of tasks until all are done, and None now and then. However this ends, the tasks end with it.

        Raises Stopped, and what `Scheduler.submit` and `Ticket.events` raise.
        """
        ticket = self.scheduler.submit(tasks, arrived)
        self.stop(visitor)
        stop = self._stops[visitor] = asyncio.Event()
        stopped = asyncio.ensure_future(stop.wait())
        try:
            async with aclosing(with_pauses(ticket.events(), TICK_SECONDS, stopped)) as events:
                async for event in events:
                    if stopped.done():
                        raise Stopped(self._stops.get(visitor) is not stop)
                    yield event
        finally:
            stopped.cancel()
            self.scheduler.cancel(ticket)
            if self._stops.get(visitor) is stop:
                del self._stops[visitor]
