"""The HTTP application: routes, their errors, and the scheduler's life with the server's"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from hartist import __version__
from hartist.serving.access import Access, AccessRules, Rates
from hartist.serving.errors import ApiError, body_of, install_handlers
from hartist.serving.images import ImageService, size_of
from hartist.serving.metrics import Counted, Metrics
from hartist.serving.prompt_filter import AllowAll, PromptFilter
from hartist.serving.results import Results
from hartist.serving.scheduler import Backend, Limits, Scheduler
from hartist.serving.schemas import ErrorReply, ImageReply, ImageRequest, ModelEntry, ModelList

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply} for status in (400, 401, 403, 404, 408, 413, 429, 500, 503, 504)
}


@dataclass(frozen=True)
class ServerOptions:
    access: AccessRules = field(default_factory=AccessRules)
    limits: Limits = field(default_factory=Limits)
    drain_seconds: float = 60.0
    """How long accepted requests may go on after SIGTERM."""
    max_prompt: int = 4000


class Server:
    """The application's state."""

    def __init__(self, backends: Sequence[Backend], options: ServerOptions, prompt_filter: PromptFilter) -> None:
        self.options = options
        self.scheduler = Scheduler(backends, options.limits)
        self.metrics = Metrics(self.scheduler)
        self.rates = Rates(options.access.images_per_minute)
        self.results = Results()
        self.prompt_filter = prompt_filter
        self.started = int(time.time())
        self.service: ImageService | None = None
        self.failure: Exception | None = None
        """Why the model could not be loaded."""
        self.on_failure: Callable[[], None] = lambda: None
        self.on_ready: Callable[[], None] = lambda: None

    async def load(self) -> None:
        """Start the workers; until then the server says it isn't ready."""
        try:
            info = await self.scheduler.start()
        except Exception as error:
            self.failure = error
            self.on_failure()
            return
        self.service = ImageService(
            self.scheduler, info, self.results, self.prompt_filter, self.metrics, self.options.max_prompt
        )
        self.on_ready()

    def ready_service(self) -> ImageService:
        """The service, once it can do something. Raises ApiError 503 before and after that."""
        if self.service is None:
            raise ApiError(503, "the model is being loaded; try again soon", code="loading", retry_after=2)
        return self.service


def create_app(
    backends: Sequence[Backend],
    options: ServerOptions | None = None,
    prompt_filter: PromptFilter | None = None,
    mount: Callable[[FastAPI, Server], FastAPI] | None = None,
) -> FastAPI:
    """The application over these backends; `mount` adds the page."""
    options = options or ServerOptions()
    server = Server(backends, options, prompt_filter or AllowAll())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(server.load())
        yield
        if not loading.done():
            loading.cancel()
        await server.scheduler.drain(options.drain_seconds)

    app = FastAPI(
        title="Hartist",
        version=__version__,
        summary="Text-to-image with a hybrid autoregressive transformer, behind OpenAI's Images API.",
        lifespan=lifespan,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    app.state.server = server
    app.include_router(routes(server))
    install_handlers(app)
    if mount is not None:
        app = mount(app, server)
    app.add_middleware(Access, rules=options.access)
    app.add_middleware(Counted, metrics=server.metrics)
    return app


def routes(server: Server) -> APIRouter:
    """Everything under /v1, health and metrics."""
    router = APIRouter(responses=ERRORS)

    @router.post("/v1/images/generations", response_model=ImageReply, response_model_exclude_none=True)
    async def generate(body: ImageRequest, request: Request) -> Any:
        """Make pictures. With `stream` the reply is `text/event-stream`."""
        arrived = asyncio.get_running_loop().time()
        service = server.ready_service()
        tasks = service.tasks(body)
        with server.rates.charged(request.scope.get("hartist_client", "local"), body.n):
            await unless_disconnected(request, service.allow(body, arrived))
            ticket = server.scheduler.submit(tasks, arrived)
        if body.stream:
            events = service.stream(body, ticket)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

        def address(name: str) -> str:
            return str(request.url_for("result", name=name))

        try:
            return await unless_disconnected(request, service.whole(body, ticket, address))
        finally:
            server.scheduler.cancel(ticket)

    @router.get("/v1/images/results/{name}", response_class=Response)
    async def result(name: str) -> Response:
        """A picture that was asked for as an URL."""
        kept = server.results.get(name)
        if kept is None:
            raise ApiError(404, "there is no such picture, or no more")
        return Response(kept.data, media_type=kept.media_type, headers={"Cache-Control": "private, max-age=3600"})

    @router.get("/v1/models")
    async def models() -> ModelList:
        """The served model."""
        return ModelList(data=[entry()])

    @router.get("/v1/models/{name}")
    async def model(name: str) -> ModelEntry:
        """The served model, by its name."""
        found = entry()
        if name != found.id:
            raise ApiError(404, f"this server has the model {found.id!r}", code="model_not_found", param="model")
        return found

    def entry() -> ModelEntry:
        info = server.ready_service().info
        return ModelEntry(id=info.name, created=server.started, size=size_of(info), scales=info.num_scales)

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @router.get("/readyz")
    async def readyz() -> JSONResponse:
        """Whether a request would be accepted."""
        scheduler = server.scheduler
        if server.service is not None and scheduler.ready and not scheduler.draining and not scheduler.fatal:
            return JSONResponse({"status": "ready"})
        state = "draining" if scheduler.draining else scheduler.fatal or "loading"
        return JSONResponse(body_of(ApiError(503, state, code="not_ready")), 503, {"Retry-After": "2"})

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


async def unless_disconnected(request: Request, work: Any) -> Any:
    """Await `work`, but give it up when the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client has gone")
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
