"""The same server on Ray Serve: the application is one deployment, the model another, of as many replicas as are needed

The application's scheduler has a backend for every replica there may be. Each sends one batch at a time to whichever
replica is free; what waits for a replica is what Ray's autoscaler goes by. A replica that is lost fails its batch,
which the scheduler makes anew. Import it inside `hartist.generation.cluster.ray_running` only.
"""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from hartist.errors import UserError
from hartist.generation.cluster import gpu_share
from hartist.serving.model import WorkerOptions
from hartist.serving.ray_replica import APP, FRONT, Known, ModelReplica, RayBackend, first_line
from hartist.serving.scheduler import Backend

log = logging.getLogger("hartist.serving")

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LOGGING = {"enable_access_log": False, "log_level": "WARNING"}
HEALTH_SECONDS = 2
"""A lost replica counts as busy until Ray asks after it: not for so long that Ray starts two in its place."""
BuildApp = Callable[[Sequence[Backend]], FastAPI]


@dataclass(frozen=True)
class Replicas:
    """How many model replicas: from `least` without work to `most` with much of it."""

    least: int
    most: int


@serve.ingress()
class Front:
    """The application as a deployment: one replica, which Ray starts anew if it dies."""

    def __init__(self, model: Any, build: BuildApp, slots: int) -> None:
        known = Known(model)
        self.backends = [RayBackend(known, slot) for slot in range(slots)]
        self.build = build

    def __serve_build_asgi_app__(self) -> FastAPI:
        self.application = self.build(self.backends)
        return self.application

    async def check_health(self) -> None:
        """Ray asks now and then, and replaces a replica that raises."""
        failure = self.application.state.server.failure
        if failure is not None:
            raise failure

    async def unwanted(self, slot: int, batch: int) -> list[str]:
        """For replicas: tasks of their batch that were cancelled, as soon as there are some; none at its end."""
        return await self.backends[slot].unwanted(batch)

    async def drain_seconds(self) -> float:
        """How long `drain` may take."""
        return self.application.state.server.options.drain_seconds

    async def drain(self) -> None:
        """Take no more requests and wait for those accepted."""
        server = self.application.state.server
        await server.scheduler.drain(server.options.drain_seconds)


# ---------------------------------------------------------------------- running it


def serve_on_ray(
    build: BuildApp, options: WorkerOptions, replicas: Replicas, host: str, port: int, stall_seconds: float = 600.0
) -> None:
    """Deploy the application and answer requests until SIGTERM or SIGINT, then finish those accepted.

    `build` makes the application from its backends, in the process that serves it. Raises UserError if the model
    can't be loaded, or if the cluster serves something else already.
    """
    others = set(serve.status().applications) - {APP}
    if others:
        raise UserError(f"this cluster serves {', '.join(sorted(others))} already; use another one")
    with _signals_interrupt():
        try:
            _start(host, port)
            application = _deployment(build, options, replicas, stall_seconds)
            with contextlib.suppress(KeyboardInterrupt):
                serve.run(application, name=APP, logging_config=LOGGING)  # waits for all replicas; one serves already
                print(f"serving on http://{host}:{port} (Ctrl-C stops)", file=sys.stderr, flush=True)
                threading.Event().wait()
            _drain()
        except KeyboardInterrupt:
            pass  # nothing is served yet, or it shall wait for nothing
        except (RuntimeError, TimeoutError, RayError, RayServeException) as error:
            raise UserError(_reason(error)) from error
        finally:
            serve.shutdown()


def _start(host: str, port: int) -> None:
    """Start Ray Serve and its HTTP proxies. Raises TimeoutError if they take more than two minutes."""
    for patience in (True, False):
        try:
            serve.start(
                proxy_location="HeadOnly" if host in LOOPBACK else "EveryNode",
                http_options={"host": host, "port": port, "keep_alive_timeout_s": 15},
                logging_config=LOGGING,
            )
            return
        except TimeoutError:  # after one minute, which a busy machine may need
            if not patience:
                raise
            serve.shutdown()


def _deployment(build: BuildApp, options: WorkerOptions, replicas: Replicas, stall_seconds: float) -> Any:
    """The application bound to its model."""
    model: Any = serve.deployment(
        ModelReplica,
        max_ongoing_requests=1,
        ray_actor_options={
            "num_cpus": options.model.threads or 1,
            "num_gpus": gpu_share(options.model.device, replicas.most),
        },
        autoscaling_config={
            "min_replicas": replicas.least,
            "max_replicas": replicas.most,
            "target_ongoing_requests": 1,
            "upscale_delay_s": 5,
            "downscale_delay_s": 120,
        },
        max_constructor_retry_count=3,
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=60,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=30,
    )
    front: Any = serve.deployment(
        Front,
        name=FRONT,
        num_replicas=1,
        max_ongoing_requests=100_000,  # the scheduler bounds the queue
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=60,
        graceful_shutdown_wait_loop_s=0.2,
    )
    return front.bind(model.bind(options, stall_seconds), build, replicas.most)


def _drain() -> None:
    """Have the application finish what it has accepted, for as long as there is an application."""
    try:
        front = serve.get_deployment_handle(FRONT, APP)
        patience = _answer(front.drain_seconds.remote(), 30.0)
        _answer(front.drain.remote(), patience + 5.0)
    except (RayError, RayServeException, TimeoutError) as error:
        log.error("what the application has accepted, if anything, is given up (%s)", first_line(error))


def _answer(response: Any, seconds: float) -> Any:
    """What the application answers. Raises TimeoutError if it takes longer, or there is no application that could."""
    end = time.monotonic() + seconds
    while _runs(FRONT):
        with contextlib.suppress(TimeoutError):
            return response.result(timeout_s=1)
        if time.monotonic() > end:
            raise TimeoutError("it does not come to an end")
    raise TimeoutError("it is not there")


def _runs(deployment: str) -> bool:
    """Whether it has a replica, as far as Ray knows, which may be some seconds late."""
    application = serve.status().applications.get(APP)
    found = application.deployments.get(deployment) if application else None
    return found is not None and "RUNNING" in found.replica_states


def _reason(error: Exception) -> str:
    """Why nothing could be deployed, in a line: our own error of a replica, or the first line of Ray's."""
    messages = [
        deployment.message
        for application in serve.status().applications.values()
        for deployment in application.deployments.values()
    ]
    found = re.search(r"UserError: (.+)", "\n".join([*messages, str(error)]))
    return found[1] if found else f"Ray Serve could not start the server ({first_line(error)})"


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGINT alike raise KeyboardInterrupt."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
