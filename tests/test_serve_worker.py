"""A worker as the server sees it: what is sent, in which order, how it is lost; and what becomes of a failing batch."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from hartist.errors import UserError
from hartist.generation.model_options import ModelOptions
from hartist.generation.sampling import SamplingSettings
from hartist.serving import worker
from hartist.serving.channel import Channel
from hartist.serving.model import GuardedModel, Unfit, WorkerOptions, load_pipeline
from hartist.serving.tasks import Event, Failed, Finished, ImageTask, ModelInfo
from hartist.serving.worker import WorkerLost, WorkerProcess

INFO = ModelInfo("nothing", 8, 8, 3, SamplingSettings())
LARGE = [ImageTask("large", "a cat " * 400_000, 0, SamplingSettings())]
"""More than a pipe holds: sending it takes until the other end reads."""


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


@pytest.fixture
def pipe() -> Iterator[tuple[Connection, Connection]]:
    ours, theirs = multiprocessing.Pipe()
    yield ours, theirs
    for end in (ours, theirs):
        end.close()


def a_worker(pipe: Connection | None = None, stall_seconds: float = 20.0) -> WorkerProcess:
    """One that was started already, if there is a pipe; without a process. Within a running loop."""
    options = WorkerOptions(ModelOptions("nowhere", None, None, None, None, True, 1, False, None))
    channel = None if pipe is None else Channel(pipe)
    return WorkerProcess(options, stall_seconds, INFO, _channel=channel)


def test_a_cancellation_waits_for_its_batch_and_nobody_waits_for_it(pipe: tuple[Connection, Connection]) -> None:
    ours, theirs = pipe
    received: list[Any] = []
    reader = threading.Timer(2.0, lambda: received.extend(theirs.recv() for _ in range(101)))
    reader.start()

    async def work() -> None:
        sender = a_worker(ours)
        running = asyncio.create_task(sender.run(LARGE, lambda event: None))
        await asyncio.sleep(0.1)  # the batch is half-way
        started = time.monotonic()
        for i in range(100):
            sender.cancel([f"large{i}"])
        assert time.monotonic() - started < 1
        await asyncio.to_thread(reader.join)
        assert received[0].tasks == LARGE
        assert [message.ids for message in received[1:]] == [[f"large{i}"] for i in range(100)]
        theirs.close()
        with pytest.raises(WorkerLost, match="died"):
            await running

    run(work())


def test_a_worker_that_takes_no_batch_is_taken_for_stuck(pipe: tuple[Connection, Connection]) -> None:
    ours, theirs = pipe

    async def work() -> None:
        with pytest.raises(WorkerLost, match="finished no scale"):
            await a_worker(ours, 0.2).run(LARGE, lambda event: None)
        theirs.close()  # lets the writing thread go

    run(work())


def test_what_is_no_message_is_a_loss_at_either_end(
    pipe: tuple[Connection, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pipe

    async def work() -> None:
        theirs.send_bytes(b"no message")
        with pytest.raises(WorkerLost):
            await a_worker(ours).run([], lambda event: None)

    run(work())
    first, second = multiprocessing.Pipe()
    without_a_model(monkeypatch, lambda options: (None, None))
    first.send_bytes(b"no message")
    worker._main(second, a_worker().options)  # ends
    assert first.recv() == INFO


# ----------------------------------------------------------------- starting


class InThread:
    """As a process, but for the start: a thread with an end of the pipe of its own."""

    pid = 0

    def __init__(self, target: Callable[..., None], args: tuple[Connection, WorkerOptions], **_: Any) -> None:
        pipe, options = args
        self.pipe = Connection(os.dup(pipe.fileno()))
        self.thread = threading.Thread(target=self.work, args=(target, options), daemon=True)

    def work(self, target: Callable[..., None], options: WorkerOptions) -> None:
        with self.pipe:
            target(self.pipe, options)

    def start(self) -> None:
        self.thread.start()

    def is_alive(self) -> bool:
        return self.thread.is_alive()

    def join(self, timeout: float | None = None) -> None:
        self.thread.join(timeout)

    def kill(self) -> None:
        pass

    def close(self) -> None:
        pass


def without_a_model(monkeypatch: pytest.MonkeyPatch, load: Callable[[Any], Any], process: Any = InThread) -> None:
    """Have workers load something else, in threads, for which signals are no matter."""
    monkeypatch.setattr(worker, "load_pipeline", load)
    monkeypatch.setattr(worker, "model_info", lambda pipeline: INFO)
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    monkeypatch.setattr(multiprocessing.get_context("spawn"), "Process", process)


@pytest.mark.parametrize(
    ("error", "told", "part"),
    [
        (UserError("model.safetensors is damaged"), UserError, "damaged"),
        (MemoryError(), WorkerLost, "MemoryError"),
        (OSError(24, "Too many open files"), WorkerLost, "OSError"),
        (RuntimeError("CUDA out of memory"), WorkerLost, "RuntimeError"),
    ],
)
def test_only_a_damaged_model_is_no_use_trying_again(
    monkeypatch: pytest.MonkeyPatch, error: Exception, told: type[Exception], part: str
) -> None:
    def load(options: WorkerOptions) -> Any:
        raise error

    without_a_model(monkeypatch, load)

    async def work() -> None:
        with pytest.raises(told, match=part):
            await a_worker().start()

    run(work())


def test_a_worker_is_started_and_stopped_and_leaves_no_file_open(monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_model(monkeypatch, lambda options: (None, None))

    async def work() -> None:
        one = a_worker()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            assert await one.start() == INFO
            await one.stop()
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(work())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in /proc")
def test_a_start_that_fails_leaves_no_file_open(monkeypatch: pytest.MonkeyPatch) -> None:
    pipes: list[Any] = []

    class Failing(InThread):
        def start(self) -> None:
            raise OSError(12, "Cannot allocate memory")

    context = multiprocessing.get_context("spawn")
    make = context.Pipe

    def pipe() -> Any:
        pipes.extend(made := make())
        return made

    without_a_model(monkeypatch, lambda options: (None, None), Failing)
    monkeypatch.setattr(context, "Pipe", pipe)

    async def work() -> None:
        with pytest.raises(OSError, match="memory"):
            await a_worker().start()
        assert [end.closed for end in pipes] == [True, True]

    run(work())


# ----------------------------------------------------------------- a model that fails


class Batches:
    """In place of `run_batch`: finishes what it can, and remembers what it was asked for."""

    def __init__(self, fails: Callable[[list[str]], Exception | None]) -> None:
        self.fails, self.asked = fails, list[list[str]]()

    def __call__(self, pipeline: Any, tasks: list[ImageTask], cancelled: Any, emit: Any, blocks: Any) -> None:
        names = [task.id for task in tasks if task.id not in cancelled()]
        self.asked.append(names)
        error = self.fails(names)
        if error is not None:
            raise error
        for name in names:
            emit(Finished(name, b""))


def some(*names: str) -> list[ImageTask]:
    return [ImageTask(name, "a cat", 0, SamplingSettings()) for name in names]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Gives what runs a batch on a model, and the list of what becomes of its tasks."""
    model = GuardedModel(None)

    def batch(fails: Callable[[list[str]], Exception | None], *names: str, gone: set[str] | None = None) -> Any:
        batches, events = Batches(fails), list[Event]()
        monkeypatch.setattr("hartist.serving.batch.run_batch", batches)
        try:
            model.run(some(*names), lambda: gone or set(), events.append)
        finally:
            batch.asked = batches.asked  # type: ignore[attr-defined]
            batch.outcomes = {event.task_id: type(event) for event in events}  # type: ignore[attr-defined]
        return batch

    return batch


def bad(names: list[str]) -> Exception | None:
    return RuntimeError("a bug") if "bad" in names else None


def test_one_picture_that_cannot_be_made_fails_alone(make: Callable[..., Any]) -> None:
    for _ in range(5):  # however often: the model is in order
        done = make(bad, "first", "bad", "second", "gone", gone={"gone"})
        assert done.asked == [["first", "bad", "second"], ["first"], ["bad"], ["second"]]
        assert done.outcomes == {"first": Finished, "bad": Failed, "second": Finished}


def test_a_mistake_of_a_user_is_not_tried_again(make: Callable[..., Any]) -> None:
    for _ in range(5):
        done = make(lambda names: UserError("no such class"), "one", "two")
        assert done.asked == [["one", "two"]]
        assert done.outcomes == {"one": Failed, "two": Failed}


def test_a_model_that_fails_on_two_batches_in_a_row_is_replaced(make: Callable[..., Any]) -> None:
    make(bad, "bad")
    make(bad, "good")
    make(bad, "bad")
    with pytest.raises(Unfit, match="2 batches in a row"):
        make(lambda names: ValueError("everything is broken"), "one", "two")
    assert make.outcomes == {"one": Failed, "two": Failed}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "error", [torch.AcceleratorError("CUDA error: unspecified launch failure"), RuntimeError("CUDA error: CUBLAS_…")]
)
def test_after_an_error_of_the_device_another_worker_makes_the_batch(
    make: Callable[..., Any], error: Exception
) -> None:
    with pytest.raises(Unfit, match="device"):
        make(lambda names: error, "one", "two")
    assert make.asked == [["one", "two"]]  # type: ignore[attr-defined]
    assert not make.outcomes  # type: ignore[attr-defined]


def test_a_batch_too_large_for_the_device_is_made_in_parts(make: Callable[..., Any]) -> None:
    done = make(lambda names: torch.OutOfMemoryError("CUDA error?") if len(names) > 1 else None, "one", "two")
    assert set(done.outcomes.values()) == {Finished}


def test_a_worker_whose_model_is_of_no_more_use_ends(
    pipe: tuple[Connection, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_a_model(monkeypatch, lambda options: (None, None))
    monkeypatch.setattr("hartist.serving.batch.run_batch", Batches(lambda names: RuntimeError("CUDA error")))

    async def work() -> None:
        one = a_worker()
        await one.start()
        with pytest.raises(WorkerLost, match="died"):
            await one.run(some("one"), lambda event: None)
        await one.stop()

    run(work())


def test_a_model_is_compiled_before_anybody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(ModelOptions, "load", lambda options: drawn.append)
    load_pipeline(WorkerOptions(ModelOptions()))
    assert drawn == []
    load_pipeline(WorkerOptions(ModelOptions(compile=True)))
    assert drawn == ["0"]
