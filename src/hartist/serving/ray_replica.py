"""A model as a replica of a Ray Serve deployment, and what the application sees of it

Import it inside `hartist.generation.cluster.ray_running` only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from hartist.serving.model import GuardedModel, Unfit, WorkerOptions, load_pipeline, model_info
from hartist.serving.tasks import Event, ModelInfo, Task
from hartist.serving.worker import WorkerLost

log = logging.getLogger("hartist.serving")

APP, FRONT = "hartist", "Front"
"""Names of the application and of its deployment that answers requests."""


# ---------------------------------------------------------------------- the model's side


class ModelReplica:
    """A model in a process of its own, which Ray starts and watches; one batch at a time."""

    def __init__(self, options: WorkerOptions, stall_seconds: float) -> None:
        self.model = GuardedModel(*load_pipeline(options))
        self.stall_seconds = stall_seconds
        self.busy_since: float | None = None
        """When the batch under way finished its last scale."""

    async def info(self) -> ModelInfo:
        """What clients are told about the model."""
        return model_info(self.model.pipeline)

    async def check_health(self) -> None:
        """Ray asks now and then, and replaces a replica that raises: one that finishes no scale."""
        if self.busy_since is not None and time.monotonic() - self.busy_since > self.stall_seconds:
            raise RuntimeError(f"no scale was finished for {self.stall_seconds:.0f} s")

    async def make(self, tasks: list[Task], slot: int, batch: int) -> AsyncIterator[Event]:
        """The events of a batch; `slot` and `batch` say where to ask which tasks are no longer wanted."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        gone: set[str] = set()

        def send(event: Event | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        watching = asyncio.create_task(_watch(gone, slot, batch))
        working = asyncio.create_task(asyncio.to_thread(self._work, tasks, gone, send))
        try:
            while (event := await events.get()) is not None:
                yield event
        finally:
            gone.update(task.id for task in tasks)  # whoever asked may have gone
            watching.cancel()
            await asyncio.wait([working])  # the model is free again after its scale
        if isinstance(working.exception(), Unfit):
            log.error("%s: this replica ends", working.exception())
            os._exit(1)  # Ray starts another one, and the application makes anew what has no end

    def _work(self, tasks: list[Task], gone: set[str], send: Callable[[Event | None], None]) -> None:
        def cancelled() -> set[str]:
            self.busy_since = time.monotonic()
            return gone.copy()

        try:
            self.model.run(tasks, cancelled, send)
        finally:
            self.busy_since = None
            send(None)


async def _watch(gone: set[str], slot: int, batch: int) -> None:
    """Keep `gone` up to date with what the application no longer wants of a batch."""
    front = serve.get_deployment_handle(FRONT, APP)
    while ids := await front.unwanted.remote(slot, batch):
        gone.update(ids)


# ---------------------------------------------------------------------- the application's side


@dataclass
class Known:
    """What the backends of an application know together: whether there is a replica, and its model.

    Ray's autoscaler takes every call that waits for work, so only one backend at a time asks, and what the others want
    waits for the answer. A busy replica answers after its batch; till then there is none that could begin another.
    """

    handle: Any
    info: ModelInfo | None = None
    """None before the first answer, and after a loss, which may have been of the last replica."""
    _asking: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def replica(self) -> ModelInfo:
        """Wait until a replica is there, free or not. Raises WorkerLost if there is none to wait for."""
        async with self._asking:
            if self.info is None:
                with _losses():
                    self.info = await self.handle.info.remote()
            assert self.info is not None
            return self.info


@dataclass
class RayBackend:
    """The right to have one batch with Ray, on whichever replica. Methods are for the event loop's thread.

    It is ready as soon as there is any replica, for batches that wait are what makes Ray start more. The time that a
    batch takes includes that wait, so what the scheduler expects of its ready backends holds with fewer replicas too.
    """

    known: Known
    slot: int
    info: ModelInfo | None = None
    _batch: int = 0
    _unwanted: asyncio.Queue[list[str]] = field(default_factory=asyncio.Queue)

    async def start(self) -> ModelInfo:
        """Wait until there is a replica. Raises WorkerLost if there is none to wait for."""
        self.info = await self.known.replica()
        return self.info

    async def run(self, tasks: list[Task], deliver: Callable[[Event], None]) -> None:
        """Have a batch made; `deliver` is called with every event. Raises WorkerLost."""
        self._batch += 1
        unwanted: asyncio.Queue[list[str]] = asyncio.Queue()
        self._unwanted = unwanted
        await self.known.replica()
        stream = self.known.handle.make.options(stream=True).remote(tasks, self.slot, self._batch)
        try:
            with _losses():
                async for event in stream:
                    deliver(event)
        except asyncio.CancelledError:
            stream.cancel()
            raise
        except WorkerLost:
            self.known.info = None
            raise
        finally:
            unwanted.put_nowait([])  # ends the replica's question

    def cancel(self, ids: list[str]) -> None:
        """Drop tasks of the batch under way, after the scale that is being computed."""
        self._unwanted.put_nowait(ids)

    async def unwanted(self, batch: int) -> list[str]:
        """Waits for tasks of a batch to be cancelled; none once it is over."""
        return await self._unwanted.get() if batch == self._batch else []

    async def stop(self) -> None:
        """Ray ends and replaces replicas by itself."""


@contextlib.contextmanager
def _losses() -> Iterator[None]:
    """What Ray raises when a replica is gone, as WorkerLost."""
    try:
        yield
    except (RayError, RayServeException) as error:
        raise WorkerLost(f"a replica was lost ({first_line(error)})") from error


def first_line(error: Exception) -> str:
    """What an error says, without Ray's account of where."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
