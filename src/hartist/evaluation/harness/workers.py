"""Making batches in several processes of this machine

Each has a model of its own and gets its next batch when it has sent the last. Their pipes are all that holds them:
when the process that started them is gone, killed or not, they end by themselves.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Generator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from hartist.errors import UserError
from hartist.generation.model_options import ModelOptions
from hartist.generation.offline import Batch, Made, make

PATIENCE = 10.0
"""Seconds that a worker has to end by itself."""


def make_in_processes(
    options: ModelOptions, batches: Sequence[Batch], processes: int
) -> Generator[list[Made], None, None]:
    """The pictures of one batch after the other as they are finished, in any order.

    Raises UserError for what the model can't serve, and if a process dies.
    """
    context = multiprocessing.get_context("spawn")
    left = iter(batches)
    workers: dict[Connection, Any] = {}
    try:
        for _ in range(min(processes, len(batches))):
            ours, theirs = context.Pipe()
            worker = context.Process(target=serve, args=(theirs, options), daemon=True)
            worker.start()
            theirs.close()  # so that reading ends when the worker does
            workers[ours] = worker
            _give(ours, left)
        while workers:
            for ready in wait(list(workers)):
                assert isinstance(ready, Connection)
                made = _received(ready)
                if not _give(ready, left):
                    workers.pop(ready).join(PATIENCE)
                    ready.close()
                yield made
    finally:
        for connection, worker in workers.items():
            connection.close()
            worker.terminate()
            worker.join(PATIENCE)


def serve(connection: Connection, options: ModelOptions) -> None:
    """A worker's life: batches come, lists of pictures or a UserError go. Ends with the pipe, or with None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            pipe = options.load()
            while (batch := connection.recv()) is not None:
                connection.send(make(pipe, batch))
        except UserError as error:
            connection.send(error)


def _give(connection: Connection, left: Any) -> bool:
    """Send the next batch, or word that there is none."""
    batch = next(left, None)
    with contextlib.suppress(BrokenPipeError):  # reading will tell that it is dead
        connection.send(batch)
    return batch is not None


def _received(connection: Connection) -> list[Made]:
    try:
        answer = connection.recv()
    except (EOFError, ConnectionResetError) as error:
        raise UserError(
            "a process that makes pictures died; is there enough memory? Run the same command again, with fewer "
            "--processes or a smaller --batch-size (what is finished is kept)"
        ) from error
    if isinstance(answer, UserError):
        raise answer
    made: list[Made] = answer
    return made
