"""What counts against a rate and a deadline, and what is counted as an error; the backends make nothing."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hartist.generation.sampling import SamplingSettings
from hartist.serving.access import AccessRules
from hartist.serving.app import ServerOptions, create_app
from hartist.serving.images import ImageService
from hartist.serving.prompt_filter import PromptFilter
from hartist.serving.scheduler import Limits
from hartist.serving.tasks import Event, ImageTask
from instant import GENERATE, InProcess, InstantBackend, on_loopback


class HeldBackend(InstantBackend):
    """Finishes nothing before it is told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def run(self, tasks: list[ImageTask], deliver: Callable[[Event], None]) -> None:
        await self.go.wait()
        await super().run(tasks, deliver)


class SlowFilter:
    """Allows everything, after some seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.asked, self.given_up = seconds, 0, 0

    async def allows(self, prompt: str) -> bool:
        self.asked += 1
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        return True


@contextmanager
def running(
    backend: InstantBackend, prompt_filter: PromptFilter | None = None, rate: int = 0, **limits: Any
) -> Iterator[InProcess]:
    options = ServerOptions(AccessRules(images_per_minute=rate), Limits(**limits), drain_seconds=0.0)
    app = InProcess(create_app([backend], options, prompt_filter))
    try:
        yield app
    finally:
        app.close()


def code(app: InProcess, **changes: Any) -> str | None:
    """Of the error; None if a picture was made."""
    reply = app.ask("POST", GENERATE, json={"prompt": "a cat", **changes})
    return None if reply.status_code == 200 else reply.json()["error"]["code"]


async def fill(scheduler: Any, images: int) -> Any:
    """Have one image made, and so many wait."""
    tickets = []
    for number in (1, images):
        names = [f"{number}-{i}" for i in range(number)]
        tickets.append(scheduler.submit([ImageTask(name, "a cat", 0, SamplingSettings()) for name in names]))
        await asyncio.sleep(0.01)
    return tickets


def test_only_what_is_accepted_counts_against_a_rate() -> None:
    backend = HeldBackend()
    with running(backend, rate=4, max_batch=1, max_queue=4) as app:
        scheduler = app.app.state.server.scheduler
        tickets = app.loop.run_until_complete(fill(scheduler, 4))
        assert [code(app, n=4) for _ in range(3)] == ["queue_full"] * 3
        for ticket in tickets:
            scheduler.cancel(ticket)
        backend.go.set()
        scheduler.draining = True
        assert [code(app, n=4) for _ in range(3)] == ["unavailable"] * 3
        scheduler.draining = False
        assert code(app, n=4, prompt="") == "invalid_value"
        assert code(app, n=4, model="another") == "model_not_found"
        assert code(app, n=4) is None
        assert code(app, n=4) == "rate_limit_exceeded"


def test_a_prompt_filter_is_asked_within_a_rate() -> None:
    asked = SlowFilter(0.0)
    with running(InstantBackend(), asked, rate=1) as app:
        assert [code(app), code(app)] == [None, "rate_limit_exceeded"]
    assert asked.asked == 1


def test_a_deadline_ends_the_prompt_filter_too() -> None:
    slow = SlowFilter(30.0)
    with running(InstantBackend(), slow, deadline_seconds=0.05) as app:
        assert code(app) == "deadline_exceeded"
    assert slow.given_up == 1


def test_a_deadline_counts_from_the_arrival_and_not_from_the_prompt_filters_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running(InstantBackend(), SlowFilter(0.3)) as app:
        scheduler = app.app.state.server.scheduler
        submit, ages = scheduler.submit, []

        def watched(tasks: Any, arrived: float) -> Any:
            ages.append(app.loop.time() - arrived)
            return submit(tasks, arrived)

        monkeypatch.setattr(scheduler, "submit", watched)
        assert code(app) is None
    assert ages[0] > 0.25


def test_a_client_that_goes_away_frees_the_prompt_filter() -> None:
    slow = SlowFilter(60.0)
    body = json.dumps({"prompt": "a cat"}).encode()
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with on_loopback(create_app([InstantBackend()], prompt_filter=slow)) as port:
        end = time.monotonic() + 30
        with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            while not slow.asked:
                assert time.monotonic() < end
                time.sleep(0.01)
        while not slow.given_up:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_bug_is_counted_as_status_500(monkeypatch: pytest.MonkeyPatch) -> None:
    async def bug(*_: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(ImageService, "whole", bug)
    with running(InstantBackend()) as app:
        assert [code(app), code(app)] == ["internal_error"] * 2
        figures = app.ask("GET", "/metrics").text
    assert f'hartist_requests_total{{route="{GENERATE}",status="500"}} 2.0' in figures


def test_what_the_page_asks_for_in_vain_counts_against_no_rate() -> None:
    import gradio as gr

    from hartist.serving.page.generate_tab import GenerateTab
    from hartist.serving.page.reconstruct_tab import ReconstructTab
    from hartist.serving.page.runs import Visitor
    from hartist.serving.schemas import ImageRequest

    async def drained(values: Any) -> None:
        with pytest.raises(gr.Error, match="queue is full"):
            async for _ in values:
                pass

    with running(HeldBackend(), rate=4, max_batch=1, max_queue=4) as app:
        server = app.app.state.server
        app.loop.run_until_complete(fill(server.scheduler, 4))
        with gr.Blocks():
            create, reconstruct = GenerateTab(server, gr.HTML()), ReconstructTab(server)
        for _ in range(2):
            asked = create.show(ImageRequest(prompt="a cat", n=4), Visitor("me", "a page"))
            app.loop.run_until_complete(drained(asked))
        for _ in range(5):
            event = gr.EventData(None, {"base64": "AAAA"})
            app.loop.run_until_complete(drained(reconstruct.reconstruct(event, gr.Request())))
        server.rates.take("me", 4)
        server.rates.take("local", 4)
