"""Scale-out by Ray: the server on Ray Serve, offline batches by many processes, and processes killed in either."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from hartist.cli import build_parser
from hartist.commands.serve import settle_replicas
from hartist.errors import UserError
from hartist.generation.cluster import ray_running
from hartist.generation.model_options import ModelOptions
from hartist.serving import batch
from hartist.serving.model import INTERNAL, WorkerOptions
from hartist.serving.tasks import Event, Failed, Finished, ImageTask, ModelInfo, Preview
from hartist.serving.worker import WorkerLost
from servers import ENVIRONMENT, Server
from tiny import SETTINGS, write_tiny_text_model

pytest.importorskip("ray")

import openai
from ray import serve
from ray.exceptions import ActorDiedError

from hartist.serving import ray_app, ray_replica
from hartist.serving.ray_replica import Known, ModelReplica, RayBackend

GENERATE = "/v1/images/generations"
SLOW = 1000
"""Diffusion steps that keep a tiny model busy for a while."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_text_model(tmp_path_factory.mktemp("model") / "tiny")


def descendants(pid: int) -> dict[int, str]:
    """Processes that a process has started, and those that they have, with their titles."""
    parents: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has just ended
        parents.setdefault(parent, []).append(int(status.parent.name))
    found: dict[int, str] = {}
    left = list(parents.get(pid, []))
    while left:
        child = left.pop()
        left += parents.get(child, [])
        try:
            found[child] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def wait_for(what: Callable[[], Any], seconds: float = 120) -> Any:
    """What a function returns once it returns something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


# --- a replica and its backend, without Ray between them ------------------------------------------


class Asked:
    """In place of the application's handle: what a replica is told to drop."""

    def __init__(self) -> None:
        self.ids: asyncio.Queue[list[str]] = asyncio.Queue()

    @property
    def unwanted(self) -> Asked:
        return self

    async def remote(self, slot: int, batch: int) -> list[str]:
        assert (slot, batch) == (3, 7)
        return await self.ids.get()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    front = Asked()
    monkeypatch.setattr(serve, "get_deployment_handle", lambda *names: front)
    return front


@pytest.fixture(scope="module")
def replica(model: Path) -> ModelReplica:
    return ModelReplica(WorkerOptions(ModelOptions(str(model), threads=1)), stall_seconds=60.0)


def task(name: str, **changes: Any) -> ImageTask:
    return ImageTask(name, "a cat", 1, SETTINGS, **changes)


def test_a_replica_makes_a_batch_and_tells_as_it_goes(replica: ModelReplica, asked: Asked) -> None:
    async def scenario() -> list[Event]:
        return [event async for event in replica.make([task("a", previews=(0, 2)), task("b")], 3, 7)]

    events = asyncio.run(scenario())
    assert [(type(event), event.task_id) for event in events] == [
        (Preview, "a"),
        (Preview, "a"),
        (Finished, "a"),
        (Finished, "b"),
    ]
    assert replica.busy_since is None


def test_a_replica_drops_what_is_no_longer_wanted(replica: ModelReplica, asked: Asked) -> None:
    async def scenario() -> list[Event]:
        stream = replica.make([task("a", previews=(0, 1, 2)), task("b")], 3, 7)
        first = await anext(stream)
        asked.ids.put_nowait(["a"])
        return [first] + [event async for event in stream]

    events = asyncio.run(scenario())
    assert [event.task_id for event in events if isinstance(event, Finished)] in (["b"], ["a", "b"])
    assert events[-1].task_id == "b"


def test_a_batch_that_nobody_waits_for_ends_at_its_scale(
    replica: ModelReplica, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales: list[int] = []

    def endless(pipeline: Any, tasks: Any, cancelled: Any, emit: Any, blocks: Any) -> None:
        emit(Preview("a", 0, 4, b""))
        while not cancelled() >= {"a"}:
            scales.append(1)

    monkeypatch.setattr(batch, "run_batch", endless)

    async def scenario() -> None:
        stream = replica.make([task("a")], 3, 7)
        await anext(stream)
        await stream.aclose()

    asyncio.run(scenario())
    assert replica.busy_since is None


def test_a_replica_that_fails_says_so_of_every_task(
    replica: ModelReplica, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(pipeline: Any, tasks: Any, cancelled: Any, emit: Any, blocks: Any) -> None:
        if tasks[0].id == "a":
            emit(Finished("a", b""))
        raise ValueError("a bug")

    monkeypatch.setattr(batch, "run_batch", broken)

    async def scenario() -> list[Event]:
        return [event async for event in replica.make([task("a"), task("b")], 3, 7)]

    assert asyncio.run(scenario()) == [Finished("a", b""), Failed("b", INTERNAL)]


def test_a_replica_whose_device_failed_ends_and_tells_nothing_of_its_tasks(
    replica: ModelReplica, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended(BaseException):
        pass

    def end(status: int) -> None:
        raise Ended

    def broken(pipeline: Any, tasks: Any, cancelled: Any, emit: Any, blocks: Any) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(batch, "run_batch", broken)
    monkeypatch.setattr("hartist.serving.ray_replica.os._exit", end)
    events: list[Event] = []

    async def scenario() -> None:
        async for event in replica.make([task("a")], 3, 7):
            events.append(event)

    with pytest.raises(Ended):
        asyncio.run(scenario())
    assert not events


def test_a_stuck_replica_is_not_healthy(replica: ModelReplica, monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.run(replica.check_health())
    monkeypatch.setattr(replica, "busy_since", time.monotonic() - 61)
    with pytest.raises(RuntimeError, match="no scale was finished"):
        asyncio.run(replica.check_health())


class Handle:
    """In place of a model's handle: a stream of some events, then perhaps an error; and who asks for a replica."""

    def __init__(self, *events: Event, error: Exception | None = None) -> None:
        self.events, self.error = events, error
        self.cancelled = False
        self.streams = self.waiting = 0
        self.replicas: asyncio.Queue[ModelInfo | Exception] = asyncio.Queue()
        """Answers to `info`: a replica that is free, or what Ray raises."""

    @property
    def make(self) -> Handle:
        return self

    @property
    def info(self) -> Handle:
        return self

    def options(self, *, stream: bool) -> Handle:
        assert stream
        return self

    def remote(self, *batch: Any) -> Any:
        if not batch:
            return self.ask()
        self.streams += 1
        return self

    async def ask(self) -> ModelInfo:
        self.waiting += 1
        answer = await self.replicas.get()
        self.waiting -= 1
        if isinstance(answer, Exception):
            raise answer
        return answer

    def cancel(self) -> None:
        self.cancelled = True

    async def __aiter__(self) -> AsyncIterator[Event]:
        for event in self.events:
            yield event
        if self.error is not None:
            raise self.error
        if not self.events:
            await asyncio.Event().wait()


INFO = ModelInfo("tiny", 32, 32, 4, SETTINGS)


def ignore(event: Event) -> None:
    """For batches of which only the end matters."""


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_lost_replica_is_a_lost_worker() -> None:
    got: list[Event] = []
    backend = RayBackend(Known(Handle(Preview("a", 0, 4, b""), error=ActorDiedError()), INFO), 0)
    with pytest.raises(WorkerLost, match="a replica was lost"):
        asyncio.run(backend.run([task("a")], got.append))
    assert got == [Preview("a", 0, 4, b"")]


def test_a_backend_tells_its_batch_what_is_not_wanted_and_when_it_is_over() -> None:
    async def scenario() -> None:
        handle = Handle()
        backend = RayBackend(Known(handle, INFO), 0)
        running = asyncio.create_task(backend.run([task("a")], ignore))
        await settle()
        asking = asyncio.create_task(backend.unwanted(1))
        backend.cancel(["a"])
        assert await asking == ["a"]
        asking = asyncio.create_task(backend.unwanted(1))
        await asyncio.sleep(0)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert handle.cancelled
        assert await asking == []
        assert await backend.unwanted(0) == []  # an older batch's question

    asyncio.run(scenario())


def test_one_replica_makes_all_backends_ready_and_only_one_of_them_asks() -> None:
    async def scenario() -> None:
        handle = Handle()
        known = Known(handle)
        starting = [asyncio.create_task(RayBackend(known, slot).start()) for slot in range(4)]
        await settle()
        assert handle.waiting == 1
        handle.replicas.put_nowait(INFO)
        assert await asyncio.gather(*starting) == [INFO] * 4

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_after_a_loss_one_backend_asks_and_batches_wait_for_the_answer() -> None:
    async def scenario() -> None:
        handle = Handle(Finished("a", b""), error=ActorDiedError())
        known = Known(handle, INFO)
        loser, other = RayBackend(known, 0), RayBackend(known, 1)
        with pytest.raises(WorkerLost):
            await loser.run([task("a")], ignore)
        handle.error = None
        starting = asyncio.create_task(loser.start())
        running = asyncio.create_task(other.run([task("a")], ignore))
        await settle()
        assert (handle.waiting, handle.streams) == (1, 1)  # all that Ray's autoscaler sees is one call
        handle.replicas.put_nowait(INFO)
        assert await starting == INFO
        await running
        assert (handle.waiting, handle.streams) == (0, 2)

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_replica_lost_while_it_is_asked_leaves_the_next_to_ask() -> None:
    async def scenario() -> None:
        handle = Handle()
        known = Known(handle)
        starting = [asyncio.create_task(RayBackend(known, slot).start()) for slot in range(2)]
        handle.replicas.put_nowait(ActorDiedError())
        handle.replicas.put_nowait(INFO)
        lost, info = await asyncio.gather(*starting, return_exceptions=True)
        assert isinstance(lost, WorkerLost)
        assert info == INFO

    asyncio.run(asyncio.wait_for(scenario(), 20))


# --- the end of the application, without Ray ------------------------------------------------------


class Application:
    """In place of the application as Ray shows it: what becomes of its `drain`, second by second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *seconds: str | Exception) -> None:
        self.seconds = list(seconds)
        self.replicas = {"RUNNING": 1}
        self.now = 0.0
        self.drain_seconds = SimpleNamespace(remote=lambda: SimpleNamespace(result=lambda timeout_s: 60.0))
        self.drain = SimpleNamespace(remote=lambda: SimpleNamespace(result=self.result))
        monkeypatch.setattr(ray_app, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(serve, "status", self.status)
        monkeypatch.setattr(serve, "get_deployment_handle", lambda *names: self)

    def status(self) -> Any:
        front = SimpleNamespace(replica_states=self.replicas)
        return SimpleNamespace(applications={ray_app.APP: SimpleNamespace(deployments={ray_app.FRONT: front})})

    def result(self, timeout_s: float) -> None:
        self.now += timeout_s
        happens = self.seconds.pop(0) if self.seconds else "nothing"
        if isinstance(happens, Exception):
            raise happens
        if happens == "drained":
            return
        if happens == "found dead":
            self.replicas = {"STARTING": 1}
        raise TimeoutError


def test_draining_ends_when_the_application_has_drained(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    application = Application(monkeypatch, "nothing", "nothing", "drained")
    ray_app._drain()
    assert application.now == 3
    assert not caplog.records


@pytest.mark.parametrize(
    ("seconds", "ends_after", "said"),
    [
        (["nothing", ActorDiedError()], 2, "died"),
        (["nothing", "nothing", "found dead"], 3, "not there"),
        ([], 66, "does not come to an end"),
    ],
    ids=["it dies", "it was dead", "it is stuck"],
)
def test_draining_does_not_wait_for_an_application_that_cannot(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    seconds: list[str | Exception],
    ends_after: int,
    said: str,
) -> None:
    application = Application(monkeypatch, *seconds)
    ray_app._drain()
    assert application.now == ends_after
    assert [said in record.message for record in caplog.records] == [True]


# --- flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--replicas", "2"], "go with --ray"),
        (["--ray-address", "auto"], "go with --ray"),
        (["--ray", "--workers", "2"], "--replicas"),
        (["--ray", "--replicas", "2", "--max-replicas", "3"], "--replicas is a fixed number"),
        (["--ray", "--min-replicas", "3", "--max-replicas", "2"], "from 3 to 2 replicas"),
        (["--ray", "--replicas", "0"], "from 0 to 0 replicas"),
    ],
)
def test_flags_that_do_not_go_together(flags: list[str], part: str) -> None:
    with pytest.raises(UserError, match=part):
        settle_replicas(build_parser().parse_args(["serve", *flags]))


@pytest.mark.parametrize(
    ("flags", "least", "most"),
    [
        ([], 1, 1),
        (["--replicas", "3"], 3, 3),
        (["--min-replicas", "2"], 2, 2),
        (["--max-replicas", "4"], 1, 4),
        (["--min-replicas", "2", "--max-replicas", "4"], 2, 4),
    ],
)
def test_how_many_replicas_flags_ask_for(flags: list[str], least: int, most: int) -> None:
    args = build_parser().parse_args(["serve", "--ray", *flags])
    settle_replicas(args)
    assert (args.min_replicas, args.max_replicas) == (least, most)


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'hartist\[ray\]'"), ray_running(None, 1):
        pass


# --- a live server --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    running = Server(log, "--model", model, "--ray", "--replicas", 2, "--max-batch", 2)
    try:
        running.wait_ready(400)
        wait_for(lambda: "serving on" in running.log.read_text())  # all replicas, not just one
        processes = descendants(running.process.pid)
        yield running
        assert running.stop() == 0, running.log.read_text()
        assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]
    finally:
        running.process.kill()


def ask(server: Server, seed: int = 0, **changes: Any) -> httpx.Response:
    return httpx.post(server.url + GENERATE, json={"prompt": "a cat", "seed": seed, **changes}, timeout=200)


def figure(server: Server, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name + " "))


def replica_pids(server: Server, deployment: str = "ModelReplica") -> list[int]:
    title = f"ray::ServeReplica:{ray_replica.APP}:{deployment}"
    return [pid for pid, found in descendants(server.process.pid).items() if found.startswith(title)]


def test_openais_client_asks_ray_serve(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    reply = client.images.generate(prompt="a red apple", n=3, extra_body={"seed": 5})
    assert reply.data is not None
    assert [item.seed for item in reply.data] == [5, 6, 7]  # type: ignore[attr-defined]
    events = list(client.images.generate(prompt="a red apple", stream=True, partial_images=2, extra_body={"seed": 6}))
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "partial_image", "completed"]
    assert events[-1].b64_json == reply.data[1].b64_json
    with pytest.raises(openai.BadRequestError, match="pictures of 32x32"):
        client.images.generate(prompt="a cat", size="1024x1024")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("dall-e-3")
    kept = ask(server, 6, prompt="a red apple", response_format="url").json()["data"][0]["url"]
    assert base64.b64encode(httpx.get(kept).content).decode() == reply.data[1].b64_json


def test_access_rules_hold_behind_rays_proxy(server: Server) -> None:
    body = {"prompt": "a cat"}
    for header in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        assert httpx.post(server.url + GENERATE, json=body, headers=header).status_code == 403
    assert httpx.post(server.url + GENERATE, content=b"x" * (1 << 21)).status_code == 413


def test_a_replica_killed_under_load_costs_no_accepted_request(server: Server) -> None:
    alone = ask(server, 3, diffusion_steps=SLOW).json()["data"][0]["b64_json"]
    for _ in range(3):  # the kill may fall between two batches
        victim, *_ = wait_for(lambda: len(replica_pids(server)) == 2 and replica_pids(server))
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            replies = [pool.submit(ask, server, seed, n=2, diffusion_steps=SLOW) for seed in range(6)]
            wait_for(lambda: figure(server, "hartist_running_images") == 4)
            os.kill(victim, signal.SIGKILL)
            answers = [reply.result() for reply in replies]
        assert [answer.status_code for answer in answers] == [200] * 6
        assert answers[3].json()["data"][0]["b64_json"] == alone
        if figure(server, "hartist_workers_lost_total"):
            break
    assert figure(server, 'hartist_images_total{outcome="retried"}') >= 1
    wait_for(lambda: len(replica_pids(server)) == 2 and victim not in replica_pids(server))


def test_a_client_that_goes_away_frees_the_replicas(server: Server) -> None:
    before = figure(server, 'hartist_images_total{outcome="cancelled"}')
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + GENERATE, json={"prompt": "a cat", "n": 10, "diffusion_steps": SLOW}, timeout=1)
    wait_for(lambda: figure(server, 'hartist_images_total{outcome="cancelled"}') > before)
    assert ask(server).status_code == 200


@pytest.mark.slow
def test_sigterm_finishes_what_was_accepted(model: Path, tmp_path: Path) -> None:
    server = Server(tmp_path / "log.txt", "--model", model, "--ray", "--max-batch", 2)
    try:
        server.wait_ready(400)
        processes = descendants(server.process.pid)
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            replies = [pool.submit(ask, server, seed, n=2, diffusion_steps=SLOW) for seed in range(3)]
            wait_for(lambda: figure(server, "hartist_waiting_images") >= 1)
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: httpx.get(f"{server.url}/readyz").status_code == 503)
            assert ask(server).status_code == 503
            assert [reply.result().status_code for reply in replies] == [200] * 3
        assert server.process.wait(90) == 0, server.log.read_text()
        assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]
    finally:
        server.process.kill()


@pytest.mark.slow
def test_a_loss_starts_one_replica_and_no_more(model: Path, tmp_path: Path) -> None:
    server = Server(tmp_path / "log.txt", "--model", model, "--ray", "--max-replicas", 4)
    try:
        server.wait_ready(400)
        for _ in range(2):  # after the start, and after a loss
            (alone,) = wait_for(lambda: replica_pids(server))
            end = time.monotonic() + 45  # Ray decides by the mean of 30 s
            while time.monotonic() < end:
                assert len(replica_pids(server)) <= 1
                time.sleep(0.5)
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                reply = pool.submit(ask, server, diffusion_steps=SLOW)
                wait_for(lambda: figure(server, "hartist_running_images") == 1)
                os.kill(alone, signal.SIGKILL)
                assert reply.result().status_code == 200
    finally:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(90) == 0, server.log.read_text()


@pytest.mark.slow
def test_sigterm_does_not_wait_for_an_application_that_died(model: Path, tmp_path: Path) -> None:
    server = Server(tmp_path / "log.txt", "--model", model, "--ray")
    try:
        server.wait_ready(400)
        (front,) = replica_pids(server, ray_replica.FRONT)
        os.kill(front, signal.SIGKILL)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0, server.log.read_text()
    finally:
        server.process.kill()


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    broken = write_tiny_text_model(tmp_path / "model")
    weights = broken / "transformer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    server = Server(tmp_path / "log.txt", "--model", broken, "--ray")
    assert server.process.wait(300) == 2, server.log.read_text()
    last = server.log.read_text().splitlines()[-1]
    assert last.startswith("hartist: error: ")
    assert "model.safetensors" in last


# --- offline batches ------------------------------------------------------------------------------


@pytest.mark.slow
def test_many_processes_make_what_one_makes_though_one_is_killed(model: Path, tmp_path: Path) -> None:
    lines = [{"prompt": "a cat", "seed": 10 * i, "n": 4, "diffusion_steps": SLOW} for i in range(6)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    command = [sys.executable, "-m", "hartist", "generate", "--prompts", file, "--model", model, "--threads", "1"]
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run([*command, "-o", one], check=True, env=ENVIRONMENT)
    with (tmp_path / "log.txt").open("w") as sink:
        running = subprocess.Popen([*command, "-o", two, "--processes", "2"], stdout=sink, stderr=sink, env=ENVIRONMENT)
    try:

        def busy() -> list[int]:
            assert running.poll() is None, (tmp_path / "log.txt").read_text()
            return [pid for pid, title in descendants(running.pid).items() if title.startswith("ray::Maker.make")]

        victim, *_ = wait_for(busy)
        processes = descendants(running.pid)
        os.kill(victim, signal.SIGKILL)
        assert running.wait(300) == 0, (tmp_path / "log.txt").read_text()
    finally:
        running.kill()
    wait_for(lambda: not [pid for pid in processes if Path(f"/proc/{pid}").exists()])
    made = {path.name: path.read_bytes() for path in two.glob("*.png")}
    assert len(made) == 24
    assert made == {path.name: path.read_bytes() for path in one.glob("*.png")}
    assert len((two / "manifest.jsonl").read_text().splitlines()) == 24
