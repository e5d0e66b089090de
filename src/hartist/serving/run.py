"""Running the application under uvicorn until a signal or a model that can't be loaded ends it"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from hartist.errors import UserError
from hartist.serving.connections import guarded_protocol


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError if the address is taken or not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot listen on {host} port {port} ({reason}); choose another with --port") from error
    listener.set_inheritable(True)
    return listener


def serve(app: FastAPI, listener: socket.socket, *, head_seconds: float = 15.0) -> None:
    """Answer requests until SIGTERM or SIGINT, then finish those accepted.

    Raises UserError if the model can't be loaded.
    """
    most = _raise_file_limit() // 2
    config = uvicorn.Config(
        app,
        http=guarded_protocol(head_seconds, max(16, most)),
        ws="none",
        timeout_keep_alive=int(max(1, head_seconds)),
        # Streams end by themselves when the scheduler has drained; this is for what does not.
        timeout_graceful_shutdown=int(app.state.server.options.drain_seconds) + 5,
        server_header=False,
        h11_max_incomplete_event_size=64 << 10,
        backlog=1024,
    )
    server = _Server(config)
    own = app.state.server

    def fail() -> None:
        server.should_exit = True

    def ready() -> None:
        host, port = listener.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        print(f"serving {own.service.info.name} on http://{address} (Ctrl-C stops)", file=sys.stderr, flush=True)

    own.on_failure, own.on_ready = fail, ready
    with contextlib.closing(listener), _signals_absorbed():
        server.run(sockets=[listener])
    failure = own.failure
    if isinstance(failure, UserError):
        raise failure
    if failure is not None:
        raise UserError(f"the model could not be loaded ({type(failure).__name__}: {failure})") from failure


class _Server(uvicorn.Server):
    """uvicorn waits for replies first and tells the application afterwards that it is over: here, both at once."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        own = self.config.app.state.server  # type: ignore[union-attr]
        if own.service is None:  # still loading: there is nothing to finish
            await super().shutdown(sockets)
            return
        draining = asyncio.create_task(own.scheduler.drain(own.options.drain_seconds))
        await super().shutdown(sockets)
        if self.force_exit:  # a second signal
            draining.cancel()
        else:
            await draining


@contextlib.contextmanager
def _signals_absorbed() -> Iterator[None]:
    """uvicorn raises a signal again once it has shut down; a clean end is exit code 0 all the same."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = [signal.signal(number, lambda *_: None) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


def _raise_file_limit() -> int:
    """As many open files as the system lets this process have; returns the number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 65536) if hard != resource.RLIM_INFINITY else 65536
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
