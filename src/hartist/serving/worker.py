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
import pickle
import signal
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from hartist.errors import UserError
from hartist.serving.channel import Channel
from hartist.serving.model import GuardedModel, Hangup, Unfit, WorkerOptions, load_pipeline, model_info
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
    """The model could not be loaded, and never can be if `lasting`."""

    message: str
    lasting: bool


# ---------------------------------------------------------------------- the worker's side


def _main(pipe: Connection, options: WorkerOptions) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the server decides when it is over
    try:
        pipeline, blocks = load_pipeline(options)
    except UserError as error:
        pipe.send(_Broken(str(error), True))
        return
    except Exception as error:  # no memory, no files to open, a full disk: that may pass
        log.exception("a worker could not load its model")
        pipe.send(_Broken(f"the model could not be loaded: {type(error).__name__}", False))
        return
    model = GuardedModel(pipeline, blocks)
    pipe.send(model_info(pipeline))
    try:
        while True:
            message = pipe.recv()
            if isinstance(message, _Stop):
                return
            if isinstance(message, _Batch):
                _work(pipe, model, message.tasks)
                pipe.send(_BatchDone())
    except (EOFError, OSError, pickle.UnpicklingError, Hangup):
        return  # the server is gone or wants no more
    except Unfit as error:
        log.error("%s: this worker ends", error)
        pipe.close()  # at once, whatever else there is to end


def _work(pipe: Connection, model: GuardedModel, tasks: list[Task]) -> None:
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
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise Hangup from error
        return gone

    model.run(tasks, cancelled, send)


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
    _channel: Channel | None = None

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
        try:
            process = context.Process(target=_main, args=(theirs, self.options), name="hartist-worker", daemon=True)
            process.start()
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._process = process
        _processes.add(process)
        self._channel = Channel(ours)
        message = await self._channel.receive()
        if isinstance(message, ModelInfo):
            self.info = message
            return message
        await self.stop()
        if not isinstance(message, _Broken):
            raise WorkerLost("the worker died while it loaded the model; is there enough memory?")
        raise UserError(message.message) if message.lasting else WorkerLost(message.message)

    async def run(self, tasks: list[Task], deliver: Callable[[Event], None]) -> None:
        """Have a batch made; `deliver` is called with every event. Raises WorkerLost."""
        assert self._channel is not None
        channel = self._channel
        channel.send(_Batch(tasks))
        while True:
            try:
                async with asyncio.timeout(self.stall_seconds):  # wait_for may lose a cancellation
                    message = await channel.receive()
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
        if self._channel is not None:
            self._channel.send(_Cancel(ids))

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    async def stop(self, patience: float = 5.0) -> None:
        """End the process: ask, wait, then kill."""
        process, self._process = self._process, None
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.send(_Stop())
        if process is not None:
            await asyncio.to_thread(process.join, patience)
            if process.is_alive():
                process.kill()
                await asyncio.to_thread(process.join)
            process.close()
        if channel is not None:
            await channel.close()
