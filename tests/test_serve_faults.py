"""What a server does when things break around it: each fault has one documented behaviour, and nothing hangs."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hartist.serving.access import AccessRules
from hartist.serving.app import ServerOptions, create_app
from hartist.serving.scheduler import Limits
from hartist.serving.tasks import Event, ImageTask
from instant import InstantBackend, exchange, in_process, on_loopback
from servers import Server
from tiny import write_tiny_text_model

GENERATE = "/v1/images/generations"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_text_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """Starts servers, none of which outlives its test."""
    started: list[Server] = []

    def server(*arguments: Any, **environment: str) -> Server:
        started.append(Server(*arguments, **environment))
        return started[-1]

    yield server
    for one in started:
        one.process.kill()
        one.process.wait()


@pytest.fixture
def server(model: Path, tmp_path: Path, start: Callable[..., Server]) -> Iterator[Server]:
    running = start(tmp_path / "log.txt", "--model", model, "--no-page", "--max-batch", 4, "--deadline", 60)
    running.wait_ready()
    yield running
    running.stop()


def ask(server: Server, seed: int = 0, **changes: Any) -> httpx.Response:
    return httpx.post(server.url + GENERATE, json={"prompt": "a cat", "seed": seed, **changes}, timeout=90)


def figure(server: Server, name: str) -> float:
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        if line.startswith(name + " "):
            return float(line.split()[1])
    raise AssertionError(name)


def test_a_worker_killed_under_load_costs_no_accepted_request(server: Server) -> None:
    alone = ask(server, 3).json()["data"][0]["b64_json"]
    (worker,) = server.worker_pids()
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        replies = [pool.submit(ask, server, seed, n=2) for seed in range(12)]
        os.kill(worker, signal.SIGKILL)
        answers = [reply.result() for reply in replies]
    assert [answer.status_code for answer in answers] == [200] * 12
    assert answers[3].json()["data"][0]["b64_json"] == alone
    assert figure(server, "hartist_workers_lost_total") == 1
    (other,) = server.worker_pids()
    assert other != worker


def test_a_model_damaged_under_way_is_told_once_its_worker_has_died(
    model: Path, tmp_path: Path, start: Callable[..., Server]
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    server = start(tmp_path / "log.txt", "--model", copy, "--no-page")
    server.wait_ready()
    weights = copy / "transformer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        replies = [pool.submit(ask, server, seed, n=10) for seed in range(4)]
        for worker in server.worker_pids():  # unless it has died already, reading what is no longer there
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        for reply in replies:
            answer = reply.result()
            assert answer.status_code in (200, 503)
            if answer.status_code != 200:
                assert "no worker is left" in answer.json()["error"]["message"]
                assert str(copy) not in answer.text
    late = ask(server)
    assert late.status_code == 503
    assert str(weights) in server.log.read_text()
    assert httpx.get(f"{server.url}/readyz").status_code == 503
    assert httpx.get(f"{server.url}/healthz").status_code == 200
    assert server.stop() == 0


def test_a_client_that_goes_away_frees_its_place(server: Server) -> None:
    body = json.dumps({"prompt": "a cat", "n": 10}).encode()
    head = (
        f"POST {GENERATE} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    for _ in range(4):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(head.encode() + b"\r\n\r\n" + body)
    assert ask(server).status_code == 200
    text = httpx.get(f"{server.url}/metrics").text
    cancelled = next(line for line in text.splitlines() if line.startswith('hartist_images_total{outcome="cancelled"}'))
    assert float(cancelled.split()[1]) >= 20  # some of the 40 may have been made before it was noticed
    assert figure(server, "hartist_waiting_images") == 0


def test_sigterm_finishes_what_was_accepted(server: Server) -> None:
    def answered(seed: int) -> httpx.Response | None:
        try:
            return ask(server, seed, n=8)
        except httpx.ConnectError:  # too late to be accepted
            return None

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        replies = [pool.submit(answered, seed) for seed in range(6)]
        deadline = time.monotonic() + 60
        while figure(server, "hartist_batch_images_count") == 0 and time.monotonic() < deadline:
            pass
        server.process.send_signal(signal.SIGTERM)
        answers = [reply.result() for reply in replies]
    accepted = [answer for answer in answers if answer is not None and answer.status_code != 503]
    assert accepted
    for answer in accepted:
        assert answer.status_code == 200
        assert len(answer.json()["data"]) == 8
    assert server.process.wait(60) == 0


def test_silent_connections_keep_nobody_out(model: Path, tmp_path: Path, start: Callable[..., Server]) -> None:
    """As many as this process may open, half of them with the beginning of a request."""
    server = start(tmp_path / "log.txt", "--model", model, "--no-page")
    server.wait_ready()
    silent: list[socket.socket] = []
    try:
        for i in range(900):
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
            if i % 2:
                connection.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: 127")
            silent.append(connection)
        started = time.monotonic()
        assert ask(server).status_code == 200
        assert time.monotonic() - started < 30
    finally:
        for connection in silent:
            connection.close()
    assert server.stop() == 0


def test_a_connection_that_asks_nothing_is_closed(model: Path, tmp_path: Path, start: Callable[..., Server]) -> None:
    server = start(tmp_path / "log.txt", "--model", model, "--no-page", "--head-timeout", 1)
    server.wait_ready()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""
    with httpx.Client() as client:  # while one that asks again in time stays open
        assert client.get(f"{server.url}/healthz").status_code == 200
        assert client.get(f"{server.url}/healthz").status_code == 200
    assert server.stop() == 0


def test_a_reader_that_stops_reading_holds_up_nobody(server: Server) -> None:
    body = json.dumps({"prompt": "a cat", "n": 10, "stream": True}).encode()
    head = (
        f"POST {GENERATE} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    slow = []
    for _ in range(4):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", server.port))
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        slow.append(client)
    assert ask(server, 5).status_code == 200
    for client in slow:
        client.close()
    assert base64.b64decode(ask(server, 5).json()["data"][0]["b64_json"])


# ----------------------------------------------------------------- the worker


def test_a_worker_that_is_frozen_is_replaced_and_costs_no_request(
    model: Path, tmp_path: Path, start: Callable[..., Server]
) -> None:
    server = start(tmp_path / "log.txt", "--model", model, "--stall", 5, "--no-page")
    server.wait_ready()
    alone = ask(server, 3).json()["data"]
    (worker,) = server.worker_pids()
    os.kill(worker, signal.SIGSTOP)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        replies = [pool.submit(ask, server, seed) for seed in range(4)]
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        answers = [reply.result() for reply in replies]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert answers[3].json()["data"] == alone
    assert figure(server, "hartist_workers_lost_total") == 1
    assert server.worker_pids() != [worker]
    assert not Path(f"/proc/{worker}").exists()
    assert server.stop() == 0


# ----------------------------------------------------------------- disk and clock


def fill_disk(server: Server, full: bool = True) -> None:
    """Whether the server's processes can write a single byte to any file, as far as they notice."""
    for pid in [server.process.pid, *server.worker_pids()]:
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0 if full else hard, hard))


def test_a_full_disk_stops_nothing_but_a_new_worker(model: Path, tmp_path: Path, start: Callable[..., Server]) -> None:
    """Its log cannot be written from the start, and there is no home. A worker's packages want a temporary file."""
    gone = str(tmp_path / "gone")
    places = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "HF_HOME"), gone)
    server = start(Path("/dev/full"), "--model", model, **places)
    try:
        end = time.monotonic() + 300
        while True:
            assert server.process.poll() is None
            assert time.monotonic() < end
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{server.url}/readyz").status_code == 200:
                    break
            time.sleep(0.1)
        fill_disk(server)
        plain = ask(server, 4, output_format="webp").json()["data"][0]["b64_json"]
        url = ask(server, 4, output_format="webp", response_format="url").json()["data"][0]["url"]
        assert httpx.get(url).content == base64.b64decode(plain)
        events = ask(server, 4, output_format="webp", stream=True).text
        assert "image_generation.partial_image" in events
        assert f'"b64_json": "{plain}"' in events.rpartition("image_generation.completed")[2]
        assert ask(server, 4, n=0).status_code == 400
        assert httpx.get(f"{server.url}/").status_code == 200

        os.kill(server.worker_pids()[0], signal.SIGKILL)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(ask, server, 4, output_format="webp")
            time.sleep(5)
            assert httpx.get(f"{server.url}/readyz").status_code == 503
            fill_disk(server, False)
            assert waiting.result().json()["data"][0]["b64_json"] == plain
        assert not Path(gone).exists()
    finally:
        code = server.stop()
    assert code == 0


class SlowBackend(InstantBackend):
    """Takes as many seconds as the prompt says."""

    def __init__(self) -> None:
        self.cancelled: set[str] = set()

    async def run(self, tasks: list[ImageTask], deliver: Callable[[Event], None]) -> None:
        end = time.monotonic() + float(tasks[0].prompt)
        while time.monotonic() < end and tasks[0].id not in self.cancelled:
            await asyncio.sleep(0.01)
        await super().run(tasks, deliver)

    def cancel(self, ids: list[str]) -> None:
        self.cancelled.update(ids)


@contextlib.contextmanager
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Gives what sets the clock ahead by some seconds, or back."""
    real, ahead = time.time, [0.0]
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + sum(ahead))
        yield ahead.append


DAY = 86_400.0


def test_the_time_of_day_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines, kept pictures and slow senders, while the clock is set a day ahead and back."""
    options = ServerOptions(AccessRules(body_seconds=1.0), Limits(deadline_seconds=2.0))
    with on_loopback(create_app([SlowBackend()], options)) as port, clock(monkeypatch) as move:
        url = f"http://127.0.0.1:{port}{GENERATE}"

        def make(seconds: float, move_by: float = 0.0, **changes: Any) -> httpx.Response:
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                reply = pool.submit(httpx.post, url, json={"prompt": str(seconds), **changes}, timeout=30)
                time.sleep(0.3)
                move(move_by)
                return reply.result()

        kept = make(0, response_format="url").json()["data"][0]["url"]
        for jump in (DAY, -2 * DAY):
            reply = make(0.6, jump)
            assert reply.status_code == 200
            assert abs(reply.json()["created"] - time.time()) < 60
            assert httpx.get(kept).status_code == 200
            started = time.monotonic()
            assert make(30, -jump).status_code == 504
            assert 1.5 < time.monotonic() - started < 15
            head = f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
            with socket.create_connection(("127.0.0.1", port), timeout=15) as connection:
                started = time.monotonic()
                connection.sendall(head.encode())
                time.sleep(0.3)
                move(jump)
                connection.sendall(b" ")
                assert connection.recv(100).split()[1] == b"408"
                assert time.monotonic() - started > 0.9


def test_setting_the_clock_gives_nobody_more_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    with in_process(AccessRules(images_per_minute=7)) as app, clock(monkeypatch) as move:
        ask = {"prompt": "a cat", "n": 7}
        assert app.ask("POST", GENERATE, json=ask).status_code == 200
        for jump in (DAY, -2 * DAY, DAY):
            move(jump)
            refused = app.ask("POST", GENERATE, json=ask)
            assert refused.status_code == 429
            assert 30 < int(refused.headers["retry-after"]) <= 60


# ----------------------------------------------------------------- connections


def anonymous_memory(server: Server) -> float:
    """MiB."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def open_files(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


HEAD = f"POST {GENERATE} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"


@pytest.mark.slow
def test_ten_thousand_half_open_connections_keep_nobody_out(
    model: Path, tmp_path: Path, start: Callable[..., Server]
) -> None:
    """A third each: nothing sent, half a head, a head without its body."""
    number = 10_000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < number + 1000:
        pytest.skip(f"this process may open {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (number + 1000, hard))
    server = start(tmp_path / "log.txt", "--model", model, "--head-timeout", 300, "--no-page")
    opened: list[socket.socket] = []
    try:
        server.wait_ready()
        assert ask(server).status_code == 200
        memory, files = anonymous_memory(server), open_files(server)
        for i in range(number):
            source = (f"127.0.0.{2 + i // 2000}", 0)  # an address has not ports enough for all
            connection = socket.create_connection(("127.0.0.1", server.port), 30, source)
            opened.append(connection)
            if i % 3:
                connection.sendall((HEAD[:60] if i % 3 == 1 else HEAD).encode())
            if (i + 1) % 2500 == 0:
                started = time.monotonic()
                assert ask(server).status_code == 200
                assert time.monotonic() - started < 20
        grown = anonymous_memory(server) - memory
        held = open_files(server) - files
        print(f"{held} connections held, {grown:.0f} MiB")
        assert grown < 300
        for connection in opened:
            connection.close()
        end = time.monotonic() + 60
        while open_files(server) > files + 50:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert ask(server).status_code == 200
        assert server.stop() == 0
        assert "Traceback" not in server.log.read_text()
    finally:
        for connection in opened:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        server.stop()


def test_those_who_owe_the_rest_of_a_request_longest_make_room() -> None:
    app = create_app([InstantBackend()])
    with on_loopback(app, most=20) as port:
        owing = [socket.create_connection(("127.0.0.1", port), 20) for _ in range(30)]
        for connection in owing:
            connection.sendall(HEAD.encode())
        with contextlib.suppress(ConnectionResetError):
            assert owing[0].recv(100) == b""
        owing[-1].sendall(json.dumps({"prompt": "a cat"}).encode().ljust(1000))
        assert owing[-1].recv(100).split()[1] == b"200"
        for connection in owing:
            connection.close()


LARGE = 8 << 20


async def large_reply(scope: Any, receive: Any, send: Any) -> None:
    """An application with nothing but one large reply, whole or in parts."""
    if scope["type"] != "http":
        return
    parts = 1 if scope["path"] != "/parts" else 128
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for i in range(parts):
        await send({"type": "http.response.body", "body": bytes(LARGE // parts), "more_body": i < parts - 1})


def slow_client(port: int, path: str, close: bool, head: bytes = b"") -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(20)
    client.connect(("127.0.0.1", port))
    client.sendall(head or f"GET {path} HTTP/1.{0 if close else 1}\r\nHost: x\r\n\r\n".encode())
    return client


def test_a_body_that_is_none_is_refused_without_a_word_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    head = b"GET /parts HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with on_loopback(create_app([InstantBackend()])) as port:
        for path in (b"/healthz", b"/v1/models", b"/v1/images/generations"):
            for method in (b"GET", b"POST"):
                request = head.replace(b"/parts", path).replace(b"GET", method)
                assert exchange(port, request + b"no length\r\n").split()[1] == b"400"
    with on_loopback(large_reply) as port, slow_client(port, "/parts", False, head) as client:
        assert client.recv(12) == b"HTTP/1.1 200"
        client.sendall(b"no length\r\n")
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while part := client.recv(1 << 16):
                received += len(part)
        assert received < LARGE
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(("path", "close"), [("/whole", False), ("/parts", True)])
def test_a_slow_reader_gets_all_of_its_reply(path: str, close: bool) -> None:
    """However long it takes, as long as it takes some: here four seconds, with patience for less than two."""
    with on_loopback(large_reply, head_seconds=0.2, read_seconds=1.7) as port, slow_client(port, path, close) as client:
        received, started = 0, time.monotonic()
        while received < LARGE:
            part = client.recv(1 << 15)
            assert part, f"cut off after {received} bytes"
            received += len(part)
            time.sleep(max(0.0, started + 4 * received / LARGE - time.monotonic()))


@pytest.mark.parametrize("close", [False, True])
@pytest.mark.parametrize("path", ["/whole", "/parts"])
def test_a_reader_that_takes_nothing_is_hung_up_on(path: str, close: bool) -> None:
    with on_loopback(large_reply, head_seconds=0.2, read_seconds=0.5) as port, slow_client(port, path, close) as client:
        client.recv(100)
        time.sleep(3)
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while part := client.recv(1 << 16):
                received += len(part)
        assert received < LARGE
