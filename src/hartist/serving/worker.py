"""A model in a process of its own: what kills it does not kill the server, which starts another

The pipe between them carries only what both ends of this file send. A worker ends when its pipe does, so none
outlives its server.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import multiprocessing
import signal
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from hartist.errors import UserError
from hartist.serving.model import Hangup, WorkerOptions, load_pipeline, model_info, run_guarded
from hartist.serving.tasks import Event, ModelInfo, Task

log = logging.getLogger("hartist.serving")


class WorkerLost(Exception):
    """The process ended or stopped answering in the middle of a batch."""


# ---------------------------------------------------------------------- messages


@dataclass(frozen=True)
class _Batch:
    tasks: list[Task]


@dataclass(frozen=True)
class _Cancel:
    ids: list[str]


@dataclass(frozen=True)
class _Stop:
    """End, in the middle of a batch if need be."""


@dataclass(frozen=True)
class _Beat:
    """Another scale is done."""


@dataclass(frozen=True)
class _BatchDone:
    pass


@dataclass(frozen=True)
class _Broken:
    """The model could not be loaded."""

    message: str


# ---------------------------------------------------------------------- the worker's side


def _main(pipe: Connection, options: WorkerOptions) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the server decides when it is over
    try:
        pipeline, blocks = load_pipeline(options)
    except UserError as error:
        pipe.send(_Broken(str(error)))
        return
    except Exception as error:
        log.exception("a worker could not load its model")
        pipe.send(_Broken(f"the model could not be loaded: {type(error).__name__}"))
        return
    pipe.send(model_info(pipeline))
    try:
        while True:
            message = pipe.recv()
            if isinstance(message, _Stop):
                return
            if isinstance(message, _Batch):
                _work(pipe, pipeline, blocks, message.tasks)
                pipe.send(_BatchDone())
    except (EOFError, OSError, Hangup):
        return  # the server is gone or wants no more


def _work(pipe: Connection, pipeline: Any, blocks: Any, tasks: list[Task]) -> None:
    gone: set[str] = set()

    def send(message: Any) -> None:
        try:
            pipe.send(message)
        except OSError as error:
            raise Hangup from error

    def cancelled() -> set[str]:
        send(_Beat())
        try:
            while pipe.poll():
                message = pipe.recv()
                if isinstance(message, _Stop):
                    raise Hangup
                if isinstance(message, _Cancel):
                    gone.update(message.ids)
        except (EOFError, OSError) as error:
            raise Hangup from error
        return gone

    run_guarded(pipeline, blocks, tasks, cancelled, send)


# ---------------------------------------------------------------------- the server's side

_processes: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register
def _kill_all() -> None:
    """A server that ends in a hurry must not wait for workers, which heed no signal."""
    for process in list(_processes):
        with contextlib.suppress(ValueError):  # closed
            process.kill()


@dataclass
class WorkerProcess:
    """A worker as the server sees it. Methods are for the event loop's thread; one batch at a time."""

    options: WorkerOptions
    stall_seconds: float = 600.0
    """A worker that finishes no scale for so long is taken for stuck, and killed."""
    info: ModelInfo | None = None
    _process: Any = None
    _pipe: Connection | None = None
    _messages: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.is_alive()

    async def start(self) -> ModelInfo:
        """Start the process and wait until its model is loaded.

        Raises UserError if the model can't be loaded, WorkerLost if the process died over it.
        """
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._messages = asyncio.Queue()
        self._process = context.Process(target=_main, args=(theirs, self.options), name="hartist-worker", daemon=True)
        self._process.start()
        _processes.add(self._process)
        theirs.close()
        self._pipe = ours
        reader = threading.Thread(
            target=_read, args=(ours, asyncio.get_running_loop(), self._messages), name="hartist-pipe", daemon=True
        )
        reader.start()
        message = await self._messages.get()
        if isinstance(message, ModelInfo):
            self.info = message
            return message
        await self.stop()
        if isinstance(message, _Broken):
            raise UserError(message.message)
        raise WorkerLost("the worker died while it loaded the model; is there enough memory?")

    async def run(self, tasks: list[Task], deliver: Callable[[Event], None]) -> None:
        """Have a batch made; `deliver` is called with every event. Raises WorkerLost."""
        assert self._pipe is not None
        try:
            await asyncio.to_thread(self._pipe.send, _Batch(tasks))
        except (OSError, ValueError) as error:
            raise WorkerLost("the worker's pipe is closed") from error
        while True:
            try:
                async with asyncio.timeout(self.stall_seconds):  # wait_for may lose a cancellation
                    message = await self._messages.get()
            except TimeoutError:
                self.kill()
                raise WorkerLost(f"the worker finished no scale for {self.stall_seconds:.0f} s") from None
            if message is None:
                raise WorkerLost("the worker died")
            if isinstance(message, _BatchDone):
                return
            if not isinstance(message, _Beat):
                deliver(message)

    def cancel(self, ids: list[str]) -> None:
        """Drop tasks of the batch under way, after the scale that is being computed."""
        try:
            assert self._pipe is not None
            self._pipe.send(_Cancel(ids))
        except (OSError, ValueError):
            pass  # it is gone; whoever runs the batch hears of it

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    async def stop(self, patience: float = 5.0) -> None:
        """End the process: ask, wait, then kill."""
        process, self._process = self._process, None
        if self._pipe is not None:
            with contextlib.suppress(OSError, ValueError):
                self._pipe.send(_Stop())
        if process is not None:
            await asyncio.to_thread(process.join, patience)
            if process.is_alive():
                process.kill()
                await asyncio.to_thread(process.join)
            process.close()
        if self._pipe is not None:
            self._pipe.close()  # the reading thread has seen its end by now


def _read(pipe: Connection, loop: asyncio.AbstractEventLoop, messages: asyncio.Queue[Any]) -> None:
    """Hand on what a worker sends; None when there will be no more."""
    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError, TypeError):  # closed at either end; TypeError: closed while it was read
            message = None
        try:
            loop.call_soon_threadsafe(messages.put_nowait, message)
        except RuntimeError:
            return  # the loop is closed
        if message is None:
            return
