"""What a server does when things break around it: each fault has one documented behaviour, and nothing hangs."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from servers import Server
from tiny import write_tiny_text_model

GENERATE = "/v1/images/generations"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_text_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def server(model: Path, tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path / "log.txt", "--model", model, "--max-batch", 4, "--deadline", 60)
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


def test_a_model_damaged_under_way_is_told_once_its_worker_has_died(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    server = Server(tmp_path / "log.txt", "--model", copy)
    server.wait_ready()
    weights = copy / "transformer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        replies = [pool.submit(ask, server, seed, n=10) for seed in range(4)]
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        for reply in replies:
            answer = reply.result()
            assert answer.status_code in (200, 500, 503)
            if answer.status_code != 200:
                assert "model.safetensors" in answer.json()["error"]["message"]
    late = ask(server)
    assert late.status_code == 503
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


def test_silent_connections_keep_nobody_out(model: Path, tmp_path: Path) -> None:
    """As many as this process may open, half of them with the beginning of a request."""
    server = Server(tmp_path / "log.txt", "--model", model)
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


def test_a_connection_that_asks_nothing_is_closed(model: Path, tmp_path: Path) -> None:
    server = Server(tmp_path / "log.txt", "--model", model, "--head-timeout", 1)
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
