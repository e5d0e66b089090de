"""A server whose pictures cost nothing: the whole application over a backend without a model, in this process."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from PIL import Image

from hartist.generation.pipeline import Generated
from hartist.generation.png import encode_png, metadata
from hartist.generation.sampling import SamplingSettings
from hartist.serving.access import AccessRules
from hartist.serving.app import ServerOptions, create_app
from hartist.serving.connections import guarded_protocol
from hartist.serving.scheduler import Limits
from hartist.serving.tasks import Event, Finished, ImageTask, ModelInfo, Preview

GENERATE = "/v1/images/generations"
INFO = ModelInfo("instant", 8, 8, 4, SamplingSettings())


class InstantBackend:
    """Finishes every batch at once, with pictures that depend on prompt and seed alone."""

    info: ModelInfo | None = INFO

    async def start(self) -> ModelInfo:
        return INFO

    async def run(self, tasks: list[ImageTask], deliver: Callable[[Event], None]) -> None:
        for task in tasks:
            png = picture(task)
            for k in task.previews:
                deliver(Preview(task.id, k, INFO.num_scales, png))
            deliver(Finished(task.id, png))

    def cancel(self, ids: list[str]) -> None:
        pass

    async def stop(self) -> None:
        pass


def picture(task: ImageTask) -> bytes:
    """One colour, and what a worker writes beside its pixels."""
    colour = hashlib.sha256(f"{task.seed} {task.prompt}".encode()).digest()
    image = Image.new("RGB", (INFO.width, INFO.height), (colour[0], colour[1], colour[2]))
    made = Generated(image, task.prompt, task.negative_prompt, task.seed, task.settings, INFO.name, (), 0)
    return encode_png(image, metadata(made))


def instant_app(rules: AccessRules | None = None, **limits: Any) -> FastAPI:
    return create_app([InstantBackend()], ServerOptions(rules or AccessRules(), Limits(**limits)))


class InProcess:
    """Requests to an application without a socket, one after another."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self.loop = asyncio.new_event_loop()
        self.lifespan = app.router.lifespan_context(app)
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://127.0.0.1:8000"
        )
        self.loop.run_until_complete(self._open())

    async def _open(self) -> None:
        await self.lifespan.__aenter__()
        while self.app.state.server.service is None:
            await asyncio.sleep(0)

    def ask(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        return self.loop.run_until_complete(self.client.request(method, path, **arguments))

    def call(
        self, method: str, path: str, parts: list[bytes], headers: list[tuple[bytes, bytes]], query: bytes = b""
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of what a server passes on as it came, which no client would send."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode("utf-8", "replace"),
            "root_path": "",
            "query_string": query,
            "headers": headers,
            "server": ("127.0.0.1", 8000),
            "client": ("127.0.0.1", 50000),
        }
        return self.loop.run_until_complete(self._call(scope, list(parts) or [b""]))

    async def _call(self, scope: dict[str, Any], parts: list[bytes]) -> tuple[int, dict[str, str], bytes]:
        sent: list[Any] = []
        answered = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if parts:
                return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
            await answered.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                answered.set()

        try:
            await self.app(scope, receive, send)  # type: ignore[arg-type]
        except Exception:
            assert sent, "an exception without an answer"  # with one, it has been told as a status 500
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in sent[0]["headers"]}
        return sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent[1:])

    def close(self) -> None:
        self.loop.run_until_complete(self.client.aclose())
        self.loop.run_until_complete(self.lifespan.__aexit__(None, None, None))
        self.loop.close()


@contextmanager
def in_process(rules: AccessRules | None = None, **limits: Any) -> Iterator[InProcess]:
    running = InProcess(instant_app(rules, **limits))
    try:
        yield running
    finally:
        running.close()


@contextmanager
def on_loopback(app: Any, *, head_seconds: float = 15.0, most: int = 512, read_seconds: float = 60.0) -> Iterator[int]:
    """The application behind a real socket, on a thread of its own; gives its port."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=guarded_protocol(head_seconds, most, read_seconds),
            ws="none",
            log_level="error",
            timeout_keep_alive=15,
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=64 << 10,
        )
    )
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        port = listener.getsockname()[1]
        end = time.monotonic() + 60
        while not server.started or not _ready(app):
            assert thread.is_alive()
            assert time.monotonic() < end
            time.sleep(0.01)
        yield port
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


def _ready(app: Any) -> bool:
    return not isinstance(app, FastAPI) or app.state.server.service is not None


def exchange(port: int, data: bytes, seconds: float = 20.0) -> bytes:
    """What a server answers to these very bytes, until it closes the connection."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        try:
            connection.sendall(data)
            while part := connection.recv(65536):
                answer += part
        except ConnectionError:
            pass  # what came before it counts
    return answer
