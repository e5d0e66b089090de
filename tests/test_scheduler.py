"""Who gets the model next: fairness, bounds, deadlines, cancellation and lost workers; the backends make nothing."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hartist.errors import UserError
from hartist.generation.sampling import SamplingSettings
from hartist.serving.scheduler import Limits, Scheduler
from hartist.serving.tasks import Event, Failed, Finished, ImageTask, ModelInfo, Preview, ReconstructTask
from hartist.serving.tickets import DeadlineExceeded, Draining, QueueFull, Ticket
from hartist.serving.worker import WorkerLost

INFO = ModelInfo("nothing", 8, 8, 3, SamplingSettings())


class Backend:
    """Finishes a batch when it is told to; remembers what it was given."""

    def __init__(
        self,
        *,
        loses: int = 0,
        poison: str | None = None,
        broken_after: int | None = None,
        raises: Exception | None = None,
        fails_to_start: Sequence[Exception] = (),
    ) -> None:
        self.info = INFO
        self.loses, self.poison, self.broken_after = loses, poison, broken_after
        self.raises = raises or WorkerLost("the worker died")
        self.fails_to_start = list(fails_to_start)
        """What goes wrong with one start after the other, from the second on."""
        self.batches: list[list[str]] = []
        self.cancelled: list[str] = []
        self.starts = 0
        self.go = asyncio.Event()
        self.may_start = asyncio.Event()
        self.may_start.set()

    async def start(self) -> ModelInfo:
        await self.may_start.wait()
        self.starts += 1
        if self.starts > 1 and self.fails_to_start:
            raise self.fails_to_start.pop(0)
        if self.broken_after is not None and self.starts > self.broken_after:
            raise UserError("model.safetensors is damaged")
        return INFO

    async def run(self, tasks: list[ImageTask], deliver: Callable[[Event], None]) -> None:
        self.batches.append([task.id for task in tasks])
        await self.go.wait()
        if self.loses or any(task.id == self.poison for task in tasks):
            self.loses = max(0, self.loses - 1)
            raise self.raises
        for task in tasks:
            if task.id not in self.cancelled:
                deliver(Finished(task.id, task.id.encode()))

    def cancel(self, ids: list[str]) -> None:
        self.cancelled += ids

    async def stop(self) -> None:
        pass


def request(name: str, images: int = 1, **settings: Any) -> list[ImageTask]:
    return [ImageTask(f"{name}{i}", name, i, SamplingSettings(**settings)) for i in range(images)]


async def outcome(ticket: Ticket) -> list[Event]:
    return [event async for event in ticket.events()]


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


def test_one_image_does_not_wait_for_another_clients_ten() -> None:
    async def work() -> None:
        backend = Backend()
        scheduler = Scheduler([backend], Limits(max_batch=4))
        await scheduler.start()
        first = scheduler.submit(request("first"))
        await settle()  # is being made, while the others arrive
        many, small, other = (scheduler.submit(request(*args)) for args in (("many", 10), ("small",), ("other", 2)))
        backend.go.set()
        results = await asyncio.gather(*(outcome(ticket) for ticket in (first, many, small, other)))
        assert [len(events) for events in results] == [1, 10, 1, 2]
        assert backend.batches[0] == ["first0"]
        assert sorted(backend.batches[1]) == ["many0", "many1", "other0", "small0"]
        assert "other1" in backend.batches[2]
        assert [len(batch) for batch in backend.batches] == [1, 4, 4, 4, 1]
        await scheduler.drain(1)

    run(work())


def test_a_batch_has_one_shape_and_shapes_take_turns() -> None:
    async def work() -> None:
        backend = Backend()
        scheduler = Scheduler([backend], Limits(max_batch=2))
        await scheduler.start()
        tickets = [scheduler.submit(request("plain", 6)), scheduler.submit(request("warm", 1, temperature=2.0))]
        backend.go.set()
        await asyncio.gather(*map(outcome, tickets))
        assert ["warm0"] in backend.batches[:2]
        assert all(len({name.rstrip("0123456789") for name in batch}) == 1 for batch in backend.batches)
        await scheduler.drain(1)

    run(work())


@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=8),
    max_batch=st.integers(1, 5),
    backends=st.integers(1, 3),
    loses=st.integers(0, 2),
)
def test_every_accepted_image_is_made_once_whatever_comes(
    sizes: list[int], max_batch: int, backends: int, loses: int
) -> None:
    async def work() -> None:
        made = [Backend(loses=loses if i == 0 else 0) for i in range(backends)]
        for backend in made:
            backend.go.set()
        scheduler = Scheduler(made, Limits(max_batch=max_batch))
        await scheduler.start()
        tickets = [scheduler.submit(request(f"request{i}-", size)) for i, size in enumerate(sizes)]
        for ticket, events in zip(tickets, await asyncio.gather(*map(outcome, tickets)), strict=True):
            assert sorted(event.task_id for event in events) == sorted(task.id for task in ticket.tasks)
            assert all(isinstance(event, Finished) for event in events)
        assert scheduler.statistics.finished == sum(sizes)
        assert scheduler.waiting == scheduler.running == 0
        await scheduler.drain(1)

    run(work())


def test_a_full_queue_is_refused_with_the_time_to_wait() -> None:
    async def work() -> None:
        backend = Backend()
        scheduler = Scheduler([backend], Limits(max_batch=1, max_queue=3))
        await scheduler.start()
        scheduler.submit(request("under-way"))
        await settle()
        scheduler.submit(request("waiting", 3))
        with pytest.raises(QueueFull) as caught:
            scheduler.submit(request("too-much"))
        assert caught.value.retry_after >= 1
        backend.go.set()
        await settle()
        assert await outcome(scheduler.submit(request("later")))
        await scheduler.drain(1)

    run(work())


def test_what_no_queue_could_ever_hold_is_refused_for_good() -> None:
    async def work() -> None:
        scheduler = Scheduler([Backend()], Limits(max_queue=3))
        await scheduler.start()
        with pytest.raises(UserError, match="at most 3 pictures"):
            scheduler.submit(request("many", 4))
        await scheduler.drain(1)

    run(work())


def test_cancelled_requests_leave_the_queue_and_the_batch() -> None:
    async def work() -> None:
        backend = Backend()
        scheduler = Scheduler([backend], Limits(max_batch=2, max_queue=4))
        await scheduler.start()
        ticket, other = scheduler.submit(request("gone", 3)), scheduler.submit(request("other"))
        await settle()
        scheduler.cancel(ticket)
        scheduler.cancel(ticket)  # twice does no harm
        assert backend.cancelled == ["gone0"]
        assert scheduler.waiting == 0
        backend.go.set()
        assert [event.task_id for event in await outcome(other)] == ["other0"]
        assert scheduler.statistics.cancelled == 3
        assert len(backend.batches) == 1
        await scheduler.drain(1)

    run(work())


def test_a_request_ends_with_its_deadline_wherever_it_is() -> None:
    async def work() -> None:
        backend = Backend()
        scheduler = Scheduler([backend], Limits(max_batch=1, deadline_seconds=0.05))
        await scheduler.start()
        tickets = [scheduler.submit(request("made")), scheduler.submit(request("waiting"))]
        for ticket in tickets:
            with pytest.raises(DeadlineExceeded, match=r"not finished within 0\.05 s"):
                await outcome(ticket)
        assert backend.cancelled == ["made0"]
        assert scheduler.waiting == scheduler.running == 0
        backend.go.set()
        await scheduler.drain(1)

    run(work())


def test_a_deadline_counts_from_the_arrival() -> None:
    async def work() -> None:
        scheduler = Scheduler([Backend()], Limits(deadline_seconds=300.0))
        await scheduler.start()
        now = asyncio.get_running_loop().time()
        with pytest.raises(DeadlineExceeded, match="not finished within 300 s"):
            await outcome(scheduler.submit(request("late"), now - 299.95))
        with pytest.raises(DeadlineExceeded):
            async with scheduler.in_time(now - 299.95):
                await asyncio.sleep(60)
        with pytest.raises(TimeoutError):  # somebody else's
            async with scheduler.in_time(now):
                raise TimeoutError
        await scheduler.drain(1)

    run(work())


def test_an_image_that_kills_its_workers_is_given_up_and_takes_no_other_with_it() -> None:
    async def work() -> None:
        backend = Backend(poison="poison0")
        backend.go.set()
        scheduler = Scheduler([backend], Limits(max_batch=4, attempts=3))
        await scheduler.start()
        good = [scheduler.submit(request(f"good{i}-")) for i in range(3)]
        bad = scheduler.submit(request("poison"))
        for ticket in good:
            (event,) = await outcome(ticket)
            assert isinstance(event, Finished)
        (failed,) = await outcome(bad)
        assert isinstance(failed, Failed)
        assert failed.retry
        assert backend.starts == 4
        assert scheduler.ready == 1
        assert ["poison0"] in backend.batches
        await scheduler.drain(1)

    run(work())


def test_when_no_worker_can_be_started_again_all_requests_are_answered() -> None:
    async def work() -> None:
        backend = Backend(loses=1, broken_after=1)
        scheduler = Scheduler([backend], Limits(max_batch=1))
        await scheduler.start()
        tickets = [scheduler.submit(request("made")), scheduler.submit(request("waiting", 2))]
        await settle()
        backend.go.set()
        for ticket in tickets:
            with pytest.raises(Draining, match="no worker is left") as told:
                await outcome(ticket)
            assert "model.safetensors" not in str(told.value)  # that is for the log
        with pytest.raises(Draining, match="no worker is left"):
            scheduler.submit(request("late"))
        await scheduler.drain(1)

    run(work())


def test_draining_finishes_what_was_accepted_and_takes_no_more() -> None:
    async def work() -> None:
        backend = Backend()
        scheduler = Scheduler([backend], Limits(max_batch=1))
        await scheduler.start()
        tickets = [scheduler.submit(request("made")), scheduler.submit(request("waiting"))]
        results = asyncio.gather(*map(outcome, tickets))
        await settle()
        drained = asyncio.ensure_future(scheduler.drain(10))
        await settle()
        with pytest.raises(Draining):
            scheduler.submit(request("late"))
        assert not drained.done()
        backend.go.set()
        assert all(isinstance(events[0], Finished) for events in await results)
        await drained

    run(work())


@pytest.mark.parametrize("how", ["finished", "cancelled"])
def test_a_request_that_is_over_is_not_kept_until_its_deadline(how: str) -> None:
    async def work() -> None:
        backend = Backend()
        scheduler = Scheduler([backend], Limits(deadline_seconds=300.0))
        await scheduler.start()
        task = ReconstructTask("large", bytes(100))
        ticket: Ticket[ReconstructTask] | None = scheduler.submit([task])
        kept = weakref.ref(task)
        del task
        await settle()
        if how == "cancelled":
            scheduler.cancel(ticket)
        backend.go.set()
        await settle()
        if how == "finished":
            assert await outcome(ticket)
        ticket = None
        gc.collect()
        assert kept() is None
        await scheduler.drain(1)

    run(work())


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError(), RuntimeError("no one knows why")])
def test_whatever_a_worker_raises_is_a_loss_that_costs_no_request(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        backend = Backend(loses=1, raises=error, fails_to_start=[error, error])
        backend.go.set()
        scheduler = Scheduler([backend])
        await scheduler.start()
        (event,) = await outcome(scheduler.submit(request("any")))
        assert isinstance(event, Finished)
        assert backend.starts == 4
        assert (scheduler.ready, scheduler.fatal) == (1, None)
        await scheduler.drain(1)

    run(work())
    assert type(error).__name__ in caplog.text
    assert "another try in 0.2 s" in caplog.text


def test_an_image_begun_anew_elsewhere_is_cancelled_there() -> None:
    async def work() -> None:
        lost, other = Backend(loses=1), Backend()
        scheduler = Scheduler([lost, other], Limits(max_batch=1))
        await scheduler.start()
        ticket = scheduler.submit(request("moved"))
        await settle()
        lost.may_start.clear()
        lost.go.set()
        await settle()
        assert other.batches == [["moved0"]]
        lost.may_start.set()
        await settle()
        assert scheduler.ready == 2
        assert scheduler.running == 1
        scheduler.cancel(ticket)
        assert other.cancelled == ["moved0"]
        other.go.set()
        await scheduler.drain(1)

    run(work())


def test_requests_wait_for_a_worker_that_is_being_started_though_another_never_can_be() -> None:
    async def work() -> None:
        broken, slow = Backend(loses=1, broken_after=1), Backend(loses=1)
        scheduler = Scheduler([broken, slow], Limits(max_batch=1))
        await scheduler.start()
        tickets = [scheduler.submit(request("one")), scheduler.submit(request("two"))]
        await settle()
        slow.may_start.clear()
        slow.go.set()
        await settle()
        broken.go.set()
        await settle()
        assert (scheduler.ready, scheduler.fatal) == (0, None)
        slow.may_start.set()
        for ticket in tickets:
            assert isinstance((await outcome(ticket))[0], Finished)
        await scheduler.drain(1)

    run(work())


def test_an_image_that_has_lost_two_workers_shares_no_batch_wherever_it_waits() -> None:
    async def work() -> None:
        backend = Backend()
        backend.go.set()
        scheduler = Scheduler([backend], Limits(max_batch=4))
        tickets = [scheduler.submit(request("fresh", 2)), scheduler.submit(request("tried", 3))]
        tickets[1].attempts = {"tried0": 2, "tried1": 2}
        await scheduler.start()
        for ticket in tickets:
            assert all(isinstance(event, Finished) for event in await outcome(ticket))
        assert backend.batches == [["fresh0", "fresh1"], ["tried0"], ["tried1"], ["tried2"]]
        await scheduler.drain(1)

    run(work())


class ShowingBackend(Backend):
    """Shows every scale, and is lost once after the second."""

    async def run(self, tasks: list[ImageTask], deliver: Callable[[Event], None]) -> None:
        for k in range(3):
            for task in tasks:
                deliver(Preview(task.id, k, 4, b""))
            if k == 1 and self.loses:
                self.loses -= 1
                raise WorkerLost("the worker died")
        await super().run(tasks, deliver)


def test_no_preview_is_shown_twice_when_a_worker_is_lost() -> None:
    async def work() -> None:
        backend = ShowingBackend(loses=1)
        backend.go.set()
        scheduler = Scheduler([backend])
        await scheduler.start()
        events = await outcome(scheduler.submit(request("shown", 2)))
        for name in ("shown0", "shown1"):
            assert [event.k for event in events if isinstance(event, Preview) and event.task_id == name] == [0, 1, 2]
        await scheduler.drain(1)

    run(work())


def test_what_a_drain_has_no_time_for_is_told_so() -> None:
    async def work() -> None:
        backend = Backend()
        scheduler = Scheduler([backend], Limits(max_batch=1))
        await scheduler.start()
        tickets = [scheduler.submit(request("made")), scheduler.submit(request("waiting"))]
        await settle()
        await scheduler.drain(0.01)
        for ticket in tickets:
            with pytest.raises(Draining, match="shutting down"):
                await outcome(ticket)
        await scheduler.drain(10)  # it is over already

    run(work())


def test_a_model_that_cannot_be_loaded_is_told_at_the_start() -> None:
    async def work() -> None:
        with pytest.raises(UserError, match="damaged"):
            await Scheduler([Backend(), Backend(broken_after=0)]).start()

    run(work())
