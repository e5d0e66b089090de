"""Who gets the model next: a bounded queue, fair batches, deadlines, cancellation, another try when a worker dies

A batch takes one image of every waiting request in turn, so one image never waits for another client's ten. What
arrives while a batch is made waits for the next one, together with all else of its shape.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from hartist.errors import UserError
from hartist.serving.tasks import Event, Failed, Finished, ModelInfo, Task
from hartist.serving.tickets import DeadlineExceeded, Draining, QueueFull, Ticket
from hartist.serving.worker import WorkerLost

log = logging.getLogger("hartist.serving")

LOST = "the worker that made this picture was lost, more than once; try again later"
DRAINING = "the server is shutting down; try another one"

TRIED = 2
"""Attempts after which an image is made alone."""

T = TypeVar("T", bound=Task)


@runtime_checkable
class Backend(Protocol):
    """Something that makes batches: a worker process, or a replica elsewhere."""

    info: ModelInfo | None

    async def start(self) -> ModelInfo: ...

    async def run(self, tasks: list[Task], deliver: Callable[[Event], None]) -> None: ...

    def cancel(self, ids: list[str]) -> None: ...

    async def stop(self) -> None: ...


@dataclass(frozen=True)
class Limits:
    max_batch: int = 8
    """Images in a batch."""
    max_queue: int = 64
    """Images that may wait, of all requests."""
    deadline_seconds: float = 300.0
    """From the arrival of a request to its last image."""
    attempts: int = 3
    """How often an image is begun before a lost worker counts against it."""


@dataclass
class Statistics:
    """Counted since the start."""

    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    retried: int = 0
    workers_lost: int = 0


class Scheduler:
    """Shares backends between requests. Everything happens on the event loop's thread."""

    def __init__(self, backends: Sequence[Backend], limits: Limits | None = None) -> None:
        self.backends, self.limits = list(backends), limits or Limits()
        self.statistics = Statistics()
        self.on_batch: Callable[[int, float], None] = lambda size, seconds: None
        self.draining = False
        self.ready = 0
        """Backends with a loaded model."""
        self.fatal: str | None = None
        """Why no backend can ever be ready again, if so."""
        self._tickets: deque[Ticket[Any]] = deque()
        """Those with waiting tasks, whose turn is next first."""
        self._owners: dict[str, Ticket[Any]] = {}
        self._running: dict[str, Backend] = {}
        self._work, self._idle = asyncio.Event(), asyncio.Event()
        self._workers: list[asyncio.Task[None]] = []
        self._loops = 0
        """Backends that have, or may get back, a loaded model."""
        self._drain: asyncio.Task[None] | None = None
        self._seconds_per_image = 1.0

    # ----------------------------------------------------------------- life

    async def start(self) -> ModelInfo:
        """Load all backends. Raises UserError if the model can't be loaded."""
        infos = await asyncio.gather(*(backend.start() for backend in self.backends), return_exceptions=True)
        for info in infos:
            if isinstance(info, BaseException):
                await asyncio.gather(*(backend.stop() for backend in self.backends), return_exceptions=True)
                raise UserError(str(info)) if isinstance(info, WorkerLost) else info
        self.ready = self._loops = len(self.backends)
        self._workers = [asyncio.create_task(self._serve(backend)) for backend in self.backends]
        return infos[0]  # type: ignore[return-value]

    async def drain(self, patience: float) -> None:
        """Take no more requests; finish those accepted, for at most `patience` seconds; then stop the backends.

        Who asks for it again waits for the same end.
        """
        if self._drain is None:
            self._drain = asyncio.create_task(self._drain_once(patience))
        await asyncio.shield(self._drain)

    async def _drain_once(self, patience: float) -> None:
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while self._owners:
                    self._idle.clear()
                    await self._idle.wait()
        self._end_all(Draining(DRAINING))
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        await asyncio.gather(*(backend.stop() for backend in self.backends), return_exceptions=True)

    # ----------------------------------------------------------------- requests

    @property
    def waiting(self) -> int:
        """Images that no backend has begun."""
        return sum(len(ticket.waiting) for ticket in self._tickets)

    @property
    def running(self) -> int:
        return len(self._running)

    def submit(self, tasks: Sequence[T], arrived: float | None = None) -> Ticket[T]:
        """Accept a request whose deadline counts from `arrived`, by the event loop's clock, or from now.

        Raises QueueFull or Draining, and UserError if it could never be accepted.
        """
        if self.draining or self.fatal:
            raise Draining(self.fatal or DRAINING)
        if len(tasks) > self.limits.max_queue:
            raise UserError(f"this server takes at most {self.limits.max_queue} pictures at once; ask for fewer")
        ahead = self.waiting
        if ahead + len(tasks) > self.limits.max_queue:
            raise QueueFull(max(1, round(ahead * self._seconds_per_image / max(1, self.ready))))
        ticket = Ticket(tasks, deque(tasks), {task.id for task in tasks})
        for task in tasks:
            self._owners[task.id] = ticket
        self._enqueue(ticket)
        loop = asyncio.get_running_loop()
        end = (loop.time() if arrived is None else arrived) + self.limits.deadline_seconds
        ticket.timer = loop.call_at(end, self._expire, ticket)
        return ticket

    @contextlib.asynccontextmanager
    async def in_time(self, arrived: float) -> AsyncIterator[None]:
        """Around what a request needs before it is submitted. Raises DeadlineExceeded once its deadline is over."""
        try:
            async with asyncio.timeout_at(arrived + self.limits.deadline_seconds) as limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise self._late() from None

    def cancel(self, ticket: Ticket) -> None:
        """Give up a request: what waits is dropped, what is being made stops after its scale."""
        if not ticket.unfinished:
            return
        self.statistics.cancelled += len(ticket.unfinished)
        by_backend: dict[int, tuple[Backend, list[str]]] = {}
        for task_id in ticket.unfinished:
            backend = self._running.pop(task_id, None)
            if backend is not None:
                by_backend.setdefault(id(backend), (backend, []))[1].append(task_id)
            self._disown(task_id)
        for backend, ids in by_backend.values():
            backend.cancel(ids)
        ticket.close()
        self._forget(ticket)

    def _expire(self, ticket: Ticket) -> None:
        if ticket.unfinished:
            self._end(ticket, self._late())

    def _late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"not finished within {self.limits.deadline_seconds:g} s")

    def _end(self, ticket: Ticket, error: Exception) -> None:
        """Whoever waits for its events gets this error."""
        self.cancel(ticket)
        ticket.end(error)

    def _end_all(self, error: Exception) -> None:
        for ticket in {id(ticket): ticket for ticket in self._owners.values()}.values():
            self._end(ticket, error)

    # ----------------------------------------------------------------- backends

    async def _serve(self, backend: Backend) -> None:
        """Give a backend batch after batch, and life again when it dies."""
        while True:
            while not self._tickets:
                self._work.clear()
                await self._work.wait()
            if not await self._make(self._next_batch(backend), backend) and not await self._revive(backend):
                return

    async def _make(self, batch: list[Task], backend: Backend) -> bool:
        """Have a batch made; False if its backend was lost, whose images are put back by then."""
        started = time.monotonic()
        try:
            await backend.run(batch, self._deliver)
        except Exception as error:
            log.error("%s; %d images were under way", error, len(batch), exc_info=_unforeseen(error))
            self.statistics.workers_lost += 1
            self.ready -= 1
            self._again(batch)
            return False
        finally:
            for task in batch:
                if self._running.get(task.id) is backend:  # and not with another one, which has begun it anew
                    del self._running[task.id]
        seconds = time.monotonic() - started
        self._seconds_per_image += 0.2 * (seconds / len(batch) - self._seconds_per_image)
        self.on_batch(len(batch), seconds)
        return True

    async def _revive(self, backend: Backend) -> bool:
        """Start a backend anew, however often that takes; False if it never can be."""
        pause = 0.1
        while True:
            try:
                await backend.stop()
                await backend.start()
            except UserError as error:  # the model's files are gone or damaged: no use in going on
                log.error("a worker cannot be started again: %s", error)
                self._loops -= 1
                if not self._loops:
                    self._give_up()
                return False
            except Exception as error:  # no memory, no files to open: that may pass
                log.error("%s; another try in %.1f s", error, pause, exc_info=_unforeseen(error))
                await asyncio.sleep(pause)
                pause = min(2 * pause, 30.0)
            else:
                self.ready += 1
                return True

    def _give_up(self) -> None:
        self.fatal = (
            "no worker is left; the server's log says why"  # and where its files are, which clients need not know
        )
        self._end_all(Draining(self.fatal))

    def _next_batch(self, backend: Backend) -> list[Task]:
        """One image of every request in turn, of the shape whose turn it is; requests served go to the back.

        An image that has lost two workers already is made alone: if it is what kills them, nothing else suffers.
        """
        first = self._tickets[0]
        size = 1 if first.tried(first.waiting[0]) >= TRIED else self.limits.max_batch
        shape = first.waiting[0].shape
        chosen: list[Task] = []
        served: list[Ticket] = []
        while len(chosen) < size:
            before = len(chosen)
            for ticket in self._tickets:
                if len(chosen) == size or not ticket.waiting or ticket.waiting[0].shape != shape:
                    continue
                if chosen and ticket.tried(ticket.waiting[0]) >= TRIED:
                    continue  # till it is the first
                chosen.append(ticket.begin())
                if all(ticket is not t for t in served):
                    served.append(ticket)
            if len(chosen) == before:
                break
        for ticket in served:
            self._forget(ticket)
            if ticket.waiting:
                self._enqueue(ticket)
        for task in chosen:
            self._running[task.id] = backend
        return chosen

    def _again(self, batch: list[Task]) -> None:
        """Images whose worker died go to the front, unless they have been tried often enough."""
        for task in reversed(batch):
            ticket = self._owners.get(task.id)
            if ticket is None:
                continue
            if ticket.tried(task) >= self.limits.attempts:
                self._deliver(Failed(task.id, LOST, retry=True))
                continue
            self.statistics.retried += 1
            ticket.waiting.appendleft(task)
            self._forget(ticket)
            self._enqueue(ticket, first=True)

    def _deliver(self, event: Event) -> None:
        ticket = self._owners.get(event.task_id)
        if ticket is None:
            return  # cancelled
        if isinstance(event, Finished | Failed):
            if isinstance(event, Finished):
                self.statistics.finished += 1
            else:
                self.statistics.failed += 1
            ticket.unfinished.discard(event.task_id)
            self._running.pop(event.task_id, None)
            self._disown(event.task_id)
        ticket.tell(event)
        if not ticket.unfinished:
            ticket.close()

    def _disown(self, task_id: str) -> None:
        self._owners.pop(task_id, None)
        if not self._owners:
            self._idle.set()

    def _enqueue(self, ticket: Ticket, *, first: bool = False) -> None:
        (self._tickets.appendleft if first else self._tickets.append)(ticket)
        self._work.set()

    def _forget(self, ticket: Ticket) -> None:
        self._tickets = deque(t for t in self._tickets if t is not ticket)


def _unforeseen(error: Exception) -> Exception | None:
    """What the log gets a traceback of."""
    return None if isinstance(error, WorkerLost) else error
