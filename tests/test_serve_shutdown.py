"""How a server begins and ends: where it is, with everything done, with what it had no time for told so, or at once."""

from __future__ import annotations

import concurrent.futures
import contextlib
import signal
import time
from pathlib import Path

import httpx
import pytest

from servers import Server
from tiny import write_tiny_text_model

GENERATE = "/v1/images/generations"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_text_model(tmp_path_factory.mktemp("model") / "tiny")


def ask(server: Server, seed: int) -> httpx.Response | None:
    """An endless lot of work; None if the connection was cut."""
    body = {"prompt": "a cat", "seed": seed, "n": 10, "diffusion_steps": 1000}
    with contextlib.suppress(httpx.TransportError):
        return httpx.post(server.url + GENERATE, json=body, timeout=120)
    return None


def wait_for_work(server: Server) -> None:
    end = time.monotonic() + 60
    while "hartist_running_images 0.0" in httpx.get(f"{server.url}/metrics").text:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_it_says_where_it_serves_and_logs_no_prompts(model: Path, tmp_path: Path) -> None:
    server = Server(tmp_path / "log.txt", "--model", model, "--no-page")
    server.wait_ready()
    httpx.get(f"{server.url}/?prompt=private", headers={"Host": "elsewhere"})
    log = server.log.read_text()
    assert "403" in log
    assert "private" not in log
    assert f"on http://127.0.0.1:{server.port} (Ctrl-C stops)" in log
    assert server.stop() == 0


def test_what_a_drain_has_no_time_for_is_told_so(model: Path, tmp_path: Path) -> None:
    server = Server(tmp_path / "log.txt", "--model", model, "--no-page", "--drain", 1)
    server.wait_ready()
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        replies = [pool.submit(ask, server, seed) for seed in range(6)]
        wait_for_work(server)
        time.sleep(0.5)  # the others are accepted
        server.process.send_signal(signal.SIGTERM)
        answers = [reply.result() for reply in replies]
    assert server.process.wait(30) == 0
    told = [answer for answer in answers if answer is not None and answer.status_code == 503]
    assert told, answers
    for answer in told:
        assert answer.json()["error"]["code"] == "unavailable"
        assert int(answer.headers["Retry-After"]) > 0
    assert all(answer is None or answer.status_code in (200, 503) for answer in answers)
    assert "Traceback" not in server.log.read_text()


def test_a_second_signal_ends_it_at_once(model: Path, tmp_path: Path) -> None:
    server = Server(tmp_path / "log.txt", "--model", model, "--no-page", "--drain", 600)
    server.wait_ready()
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        replies = [pool.submit(ask, server, seed) for seed in range(6)]
        wait_for_work(server)
        (worker,) = server.worker_pids()
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        server.process.send_signal(signal.SIGINT)
        server.process.wait(15)
        for reply in replies:
            reply.result()
    assert not Path(f"/proc/{worker}/cmdline").exists()


def test_a_signal_while_the_model_is_loaded_is_no_failure(model: Path, tmp_path: Path) -> None:
    server = Server(tmp_path / "log.txt", "--model", model, "--no-page")
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/healthz").status_code == 200:
                break
        time.sleep(0.05)
    assert server.stop() == 0, server.log.read_text()
