"""Who gets in: keys, hosts, origins, sizes, rates; and that no file and no address that a request names is opened."""

from __future__ import annotations

import base64
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hartist.cli import main
from hartist.serving.access import AccessRules
from instant import GENERATE, InProcess, exchange, in_process, instant_app, on_loopback
from servers import Server
from tiny import write_tiny_text_model

KEYS = ("alpha-key", "schlüssel-à", "gamma:key")
ASK = {"prompt": "a cat", "seed": 1}
JSON = {"Content-Type": "application/json"}


def bearer(key: str) -> dict[bytes, bytes]:
    return {b"Authorization": b"Bearer " + key.encode()}


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def code(reply: httpx.Response) -> str | None:
    """Of an error in OpenAI's shape."""
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["code"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_text_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With keys and the page, and one more name."""
    folder = tmp_path_factory.mktemp("server")
    environment = {"HARTIST_API_KEY": f" {KEYS[0]},{KEYS[1]} ,,{KEYS[2]},", "GRADIO_TEMP_DIR": str(folder / "gradio")}
    running = Server(folder / "log.txt", "--model", model, "--allow-host", "Pictures.Example", **environment)
    running.wait_ready(300)
    yield running
    assert running.stop() == 0, running.log.read_text()
    assert "Traceback" not in running.log.read_text()


@pytest.fixture(scope="module")
def keyed() -> Iterator[InProcess]:
    with in_process(AccessRules(keys=KEYS, hosts=("127.0.0.1", "pictures.example"))) as running:
        yield running


# ----------------------------------------------------------------- keys


@pytest.mark.parametrize("key", KEYS)
def test_each_of_the_keys_opens_the_api_and_the_page(server: Server, key: str) -> None:
    for headers in (bearer(key), {b"authorization": b"bearer   " + key.encode()}, basic("anyone", key), basic("", key)):
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
        assert httpx.get(f"{server.url}/", headers=headers).status_code == 200
    assert httpx.post(server.url + GENERATE, json=ASK, headers=bearer(key), timeout=60).status_code == 200


WRONG: list[Any] = [
    {},
    {"Authorization": ""},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer wrong"},
    {"Authorization": KEYS[0]},
    {"Authorization": f"Token {KEYS[0]}"},
    {"Authorization": f"Bearer {KEYS[0].upper()}"},
    {"Authorization": f"Bearer {KEYS[0][:-1]}"},
    {"Authorization": f"Bearer {KEYS[0]}x"},
    {"Authorization": f"Bearer {KEYS[0]},{KEYS[2]}"},
    {"Authorization": "Basic"},
    {"Authorization": "Basic %%%"},
    {"Authorization": f"Basic {KEYS[0]}"},
    {b"Authorization": b"Basic \xff\xfe"},
    {b"Authorization": b"Bearer \xff\xfe\x80"},
    basic(KEYS[0], ""),
    basic(KEYS[0], "wrong"),
    {"X-API-Key": KEYS[0]},
    {"Api-Key": KEYS[0]},
    {"Cookie": f"key={KEYS[0]}; access-token={KEYS[0]}"},
]


@pytest.mark.parametrize(
    "path", ["/", "/v1/models", "/metrics", "/openapi.json", "/config", "/v1/images/results/x", "/no"]
)
def test_nothing_else_does(server: Server, path: str) -> None:
    with httpx.Client(base_url=server.url) as client:
        for headers in WRONG:
            reply = client.get(f"{path}?api_key={KEYS[0]}", headers=headers)
            assert (reply.status_code, code(reply)) == (401, "invalid_api_key"), headers
            assert reply.headers["www-authenticate"].startswith("Basic ")
            assert not any(key in reply.text for key in KEYS)


def test_without_a_key_nothing_is_made(server: Server) -> None:
    def figures() -> str:
        text = httpx.get(f"{server.url}/metrics", headers=bearer(KEYS[0])).text
        return "\n".join(line for line in text.splitlines() if line.startswith("hartist_images_total"))

    before = figures()
    assert "finished" in before
    for headers in WRONG:
        assert httpx.post(server.url + GENERATE, json=ASK, headers=headers).status_code == 401
    assert figures() == before


def test_only_health_needs_no_key(server: Server) -> None:
    assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/readyz").json() == {"status": "ready"}
    for near in ("/healthz/", "//healthz", "/healthz/../metrics", "/HEALTHZ", "/readyz/x", "/healthz%2f..%2fmetrics"):
        answer = exchange(server.port, f"GET {near} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        assert answer.split()[1] == b"401", near


def test_pages_that_describe_the_api_do_not_exist(server: Server) -> None:
    for path in ("/docs", "/redoc", "/docs/oauth2-redirect", "/openapi.yaml", "/.env", "/admin", "/debug"):
        assert httpx.get(server.url + path, headers=bearer(KEYS[0])).status_code == 404
    assert httpx.get(f"{server.url}/openapi.json", headers=bearer(KEYS[0])).json()["info"]["title"] == "Hartist"


def refused(text: str) -> bool:
    (line,) = text.splitlines()
    return line.startswith("hartist: error: ") and "can be reached from other machines; set HARTIST_API_KEY" in line


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_nothing_listens_beyond_this_machine_without_a_key(
    host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HARTIST_API_KEY", raising=False)
    assert main(["serve", "--host", host, "--port", "0", "--model", "no/such/model"]) == 2
    assert refused(capsys.readouterr().err)


@pytest.mark.parametrize("name", ["pictures.example.org", "192.0.2.1"])
def test_nothing_is_served_to_others_by_a_proxy_without_a_key(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HARTIST_API_KEY", raising=False)
    command = ["serve", "--port", "0", "--model", "no/such/model", "--allow-host"]
    assert main([*command, "LocalHost", "--allow-host", name]) == 2
    assert f"--allow-host {name} lets other machines ask, by a proxy; set HARTIST_API_KEY" in capsys.readouterr().err
    for allowed in ([name, "--allow-anonymous"], ["LocalHost"]):
        assert main([*command, *allowed]) == 2
        assert "no/such/model" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("keys", ["", " , ,"])
def test_keys_that_are_none_are_a_mistake_and_not_an_open_door(
    host: str, keys: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HARTIST_API_KEY", keys)
    assert main(["serve", "--host", host, "--port", "0", "--model", "no/such/model", "--allow-anonymous"]) == 2
    assert "HARTIST_API_KEY is set but holds no key" in capsys.readouterr().err


def test_a_command_that_would_listen_to_all_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    server = Server(tmp_path / "log.txt", "--host", "0.0.0.0")
    assert server.process.wait(60) == 2
    assert refused(server.log.read_text())


# ----------------------------------------------------------------- hosts and origins


def test_a_page_of_another_site_gets_nothing_even_with_the_key(keyed: InProcess) -> None:
    host = "127.0.0.1:8000"
    for origin in (
        "https://evil.example",
        "http://127.0.0.1",
        "http://127.0.0.1:9000",
        "http://127.0.0.1:8000.evil.example",
        "http://evil.example/127.0.0.1:8000",
        "http://evil.example@127.0.0.1:8000",
        "null",
        "",
        "127.0.0.1:8000",
        "http://[",
        "://",
        "http://[::1",
        "file://",
    ):
        for path in (GENERATE, "/v1/models", "/metrics", "/healthz"):
            method = "POST" if path == GENERATE else "GET"
            headers = {b"Origin": origin.encode(), b"Host": host.encode(), **bearer(KEYS[0])}
            reply = keyed.ask(method, path, json=ASK, headers=headers)
            assert (reply.status_code, code(reply)) == (403, "foreign_origin"), (origin, path)
    for origin in (f"http://{host}", f"https://{host}"):  # the page itself, maybe behind a proxy that speaks TLS
        reply = keyed.ask("POST", GENERATE, json=ASK, headers={b"Origin": origin.encode(), **bearer(KEYS[0])})
        assert reply.status_code == 200


def test_a_preflight_permits_nothing(keyed: InProcess) -> None:
    for origin, status in (("https://evil.example", 403), ("http://127.0.0.1:8000", 405)):
        headers = {
            b"Origin": origin.encode(),
            b"Access-Control-Request-Method": b"POST",
            b"Access-Control-Request-Headers": b"authorization, content-type",
            b"Access-Control-Request-Private-Network": b"true",
        }
        for more in ({}, bearer(KEYS[0])):
            reply = keyed.ask("OPTIONS", GENERATE, headers={**headers, **more})
            assert reply.status_code == (status if more or status == 403 else 401)
            assert not [name for name in reply.headers if name.startswith("access-control-")]
    reply = keyed.ask("GET", "/v1/models", headers=bearer(KEYS[0]))
    assert not [name for name in reply.headers if name.startswith("access-control-")]


def test_only_its_own_names_are_served(server: Server) -> None:
    for name in (
        "127.0.0.1",
        f"localhost:{server.port}",
        "LOCALHOST",
        "[::1]:80",
        "pictures.example",
        "PICTURES.example:",
    ):
        headers = {**bearer(KEYS[0]), b"Host": name.encode()}
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200, name
    for name in ("evil.example", "localhost.evil.example", "evil.example:80", "x.pictures.example", "[::2]", "0", ".."):
        headers = {**bearer(KEYS[0]), b"Host": name.encode()}
        for path in ("/v1/models", "/", "/metrics"):
            reply = httpx.get(server.url + path, headers=headers)
            assert reply.status_code == 403, name
            assert "--allow-host" in reply.json()["error"]["message"]
    assert httpx.get(f"{server.url}/readyz", headers={"Host": "evil.example"}).status_code == 200  # a load balancer's


MALFORMED_HOSTS = [
    b"[",
    b"[::1",
    b"127.0.0.1@evil.example",
    b"evil.example@127.0.0.1",
    b"127.0.0.1/../x",
    b"127.0.0.1?x",
    b"127.0.0.1#x",
    b"127.0.0.1 x",
    b"127.0.0.1:80:80",
    b"127.0.0.1:x",
    b"\xff",
]


@pytest.mark.parametrize("host", MALFORMED_HOSTS)
def test_a_host_that_is_none_is_refused(keyed: InProcess, host: bytes) -> None:
    reply = keyed.ask("GET", "/v1/models", headers={**bearer(KEYS[0]), b"Host": host})
    assert (reply.status_code, code(reply)) == (400, "invalid_host")


def test_the_url_of_a_picture_leads_here_whatever_the_host_says() -> None:
    with in_process() as anyone:
        for host in MALFORMED_HOSTS:
            reply = anyone.ask("POST", GENERATE, json={**ASK, "response_format": "url"}, headers={b"Host": host})
            assert (reply.status_code, code(reply)) == (400, "invalid_host")
        reply = anyone.ask("POST", GENERATE, json={**ASK, "response_format": "url"}, headers={"Host": "any.example:81"})
        url = reply.json()["data"][0]["url"]
        assert url.startswith("http://any.example:81/v1/images/results/")
        assert anyone.ask("GET", url).content.startswith(b"\x89PNG")


# ----------------------------------------------------------------- paths and addresses

TARGETS = [
    "/v1/images/results/../../etc/passwd",
    "/v1/images/results/../../../../../../etc/passwd",
    "/v1/images/results/%2e%2e/%2e%2e/etc/passwd",
    "/v1/images/results/..%2f..%2f..%2f..%2fetc%2fpasswd",
    "/v1/images/results/%252e%252e%252fetc%252fpasswd",
    "/v1/images/results/%252e%252e/%252e%252e/etc/passwd",
    "/v1/images/results/..\\..\\etc\\passwd",
    "/v1/images/results/..%5c..%5cetc%5cpasswd",
    "/v1/images/results/%00",
    "/v1/images/results/..%2fetc%2fpasswd%00.png",
    "/v1/images/results/%c0%ae%c0%ae%c0%afetc%c0%afpasswd",
    "/v1/images/results//etc/passwd",
    "/v1/images/results/%2fetc%2fpasswd",
    "/v1/images/results/" + "a" * 30000,
    "/v1/images/results/file:///etc/passwd",
    "/v1/models/..%2f..%2fetc%2fpasswd",
    "/v1/models/%00%ff%fe",
    "/v1/models/http:%2f%2f127.0.0.1%2f",
    "/etc/passwd",
    "//etc/passwd",
    "/../../etc/passwd",
    "/..%2f..%2fetc%2fpasswd",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/assets/../../../../etc/passwd",
    "/assets/..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
    "/static/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "/static/..%5c..%5cetc%5cpasswd",
    "/assets//etc/passwd",
    "/assets/%2fetc%2fpasswd",
    "/static/%00",
    "/file=/etc/passwd",
    "/gradio_api/file=/etc/passwd",
    "/gradio_api/file%3d%2fetc%2fpasswd",
    "/theme.css/../../etc/passwd",
    "/theme.css?file=/etc/passwd",
    "/?__theme=/etc/passwd&view=../../etc/passwd&prompt=file:///etc/passwd",
    "file:///etc/passwd",
    "http://127.0.0.1/etc/passwd",
    "http://evil.example/v1/models",
    "http://127.0.0.1:80/v1/images/results/../../etc/passwd",
    "https:/etc/passwd",
    "*",
    "127.0.0.1:443",
    "/;/etc/passwd",
    "/%",
    "/%zz",
    "/~root/.ssh/id_rsa",
    "/.git/config",
    "/proc/self/environ",
]


@pytest.mark.parametrize("target", TARGETS, ids=[target[:60] for target in TARGETS])
def test_no_path_leads_to_a_file(server: Server, target: str) -> None:
    """Over a bare socket: clients tidy paths up before they send them."""
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "CONNECT", "TRACE", "PROPFIND"):
        head = f"{method} {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEYS[0]}\r\n"
        answer = exchange(server.port, f"{head}Content-Length: 0\r\nConnection: close\r\n\r\n".encode())
        status = int(answer.split()[1])
        page = target.startswith(("/?", "/theme.css?"))
        assert status in ((200, 404, 405) if page else (400, 403, 404, 405)), (method, answer[:200])
        for secret in (b"root:", b"Traceback", KEYS[0].encode(), b"HARTIST_API_KEY"):
            assert secret not in answer


def test_no_file_and_no_address_in_a_request_is_opened(server: Server, tmp_path: Path) -> None:
    """A pipe would show that it was opened to be read, a listening socket that somebody called."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    relative = os.path.relpath(pipe)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]
        url = f"http://127.0.0.1:{port}/x.png"
        for name in (url, f"//127.0.0.1:{port}/", f"https://localhost:{port}", str(pipe), f"file://{pipe}", relative):
            for field in (
                "prompt",
                "negative_prompt",
                "model",
                "size",
                "user",
                "style",
                "quality",
                "background",
                "image",
            ):
                ask = {**ASK, field: name, "n": 1}
                reply = httpx.post(server.url + GENERATE, json=ask, headers=bearer(KEYS[0]), timeout=30)
                assert reply.status_code in (200, 400, 404)
            quoted = name.replace("/", "%2f")
            for path in (f"/v1/models/{quoted}", f"/v1/images/results/{quoted}", f"/?prompt={quoted}"):
                assert httpx.get(server.url + path, headers=bearer(KEYS[0])).status_code in (200, 404)
            headers = {"X-Forwarded-Host": name, "Referer": name, "Forwarded": f"host={name}", "X-Original-URL": name}
            reply = httpx.get(
                f"{server.url}/v1/models",
                headers={**{k.encode(): v.encode() for k, v in headers.items()}, **bearer(KEYS[0])},
            )
            assert reply.status_code == 200
        with pytest.raises(BlockingIOError):
            listener.accept()
    with pytest.raises(OSError, match="No such device"):  # nobody reads
        os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)


# ----------------------------------------------------------------- rates and sizes


def test_a_rate_is_each_keys_own() -> None:
    with in_process(AccessRules(keys=KEYS, images_per_minute=3)) as limited:

        def ask(key: str, n: int = 1) -> httpx.Response:
            return limited.ask("POST", GENERATE, json={**ASK, "n": n}, headers=bearer(key))

        assert ask(KEYS[0], 2).status_code == 200
        refused = ask(KEYS[0], 2)
        assert (refused.status_code, code(refused)) == (429, "rate_limit_exceeded")
        assert 15 <= int(refused.headers["retry-after"]) <= 20
        assert ask(KEYS[0]).status_code == 200  # what was refused counted nothing
        assert ask(KEYS[0]).status_code == 429
        assert ask(KEYS[1], 3).status_code == 200
        never = ask(KEYS[2], 4)  # no waiting helps
        assert (never.status_code, code(never)) == (400, "rate_limit_too_low")
        assert ask(KEYS[2], 3).status_code == 200
        assert limited.ask("GET", "/v1/models", headers=bearer(KEYS[0])).status_code == 200  # costs nothing


def test_a_rate_without_keys_is_each_addresses_own() -> None:
    with on_loopback(instant_app(AccessRules(images_per_minute=1))) as port:

        def ask(address: str) -> int:
            body = json.dumps(ASK).encode()
            head = f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
            with socket.create_connection(("127.0.0.1", port), 20, (address, 0)) as connection:
                connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
                return int(connection.recv(100).split()[1])

        assert [ask("127.0.0.2"), ask("127.0.0.2"), ask("127.0.0.3")] == [200, 429, 200]


def padded(size: int) -> bytes:
    """A request of so many bytes."""
    text = json.dumps(ASK).encode()
    return text + b" " * (size - len(text))


def test_a_body_may_have_so_many_bytes_however_it_is_sent() -> None:
    limit = 4096
    with on_loopback(instant_app(AccessRules(max_body=limit, max_upload=2 * limit))) as port:
        url = f"http://127.0.0.1:{port}{GENERATE}"

        def parts(size: int) -> Iterator[bytes]:
            whole = padded(size)
            yield from (whole[i : i + 1000] for i in range(0, size, 1000))

        for content, other in ((padded, 0), (parts, 1)):
            assert httpx.post(url, content=content(limit), headers=JSON).status_code == 200
            for size in (limit + 1, 10 * limit):
                reply = httpx.post(url, content=content(size), headers=JSON)
                assert (reply.status_code, code(reply)) == (413, "body_too_large")
                assert reply.request.headers.get("transfer-encoding") == ("chunked" if other else None)
        head = f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nContent-Length: {10**19}\r\nConnection: close\r\n\r\n"
        assert exchange(port, head.encode() + b"x" * 100).split()[1] == b"413"


def test_all_bodies_together_have_a_limit_too() -> None:
    rules = AccessRules(max_body=4096, max_bodies=10_000)
    with on_loopback(instant_app(rules)) as port:
        head = f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 4096\r\n\r\n"
        waiting = [socket.create_connection(("127.0.0.1", port), 20) for _ in range(3)]
        for connection in waiting[:2]:
            connection.sendall(head.encode() + padded(4095))
        time.sleep(0.3)
        waiting[2].sendall(head.encode() + padded(4096))
        answer = waiting[2].recv(4096)
        assert answer.split()[1] == b"503"
        assert b"retry-after: 5" in answer.lower()
        waiting[0].close()  # makes room
        time.sleep(0.3)
        for _ in range(2):
            reply = httpx.post(f"http://127.0.0.1:{port}{GENERATE}", content=padded(4096), headers=JSON)
            assert reply.status_code == 200
        waiting[1].sendall(b" ")
        assert waiting[1].recv(4096).split()[1] == b"200"
        for connection in waiting[1:]:
            connection.close()


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    with on_loopback(instant_app(AccessRules(body_seconds=0.5))) as port:
        head = f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        for framing, drop in (("Content-Length: 100", b" "), ("Transfer-Encoding: chunked", b"1\r\n \r\n")):
            started = time.monotonic()
            with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
                connection.sendall(f"{head}{framing}\r\n\r\n".encode())
                connection.settimeout(0.05)
                answer = b""
                while not answer:  # a byte now and then makes no difference
                    connection.sendall(drop)
                    try:
                        answer = connection.recv(4096)
                    except TimeoutError:
                        assert time.monotonic() - started < 10
            assert answer.split()[1] == b"408"
            assert b"body_too_slow" in answer
            assert time.monotonic() - started > 0.4
        assert httpx.post(f"http://127.0.0.1:{port}{GENERATE}", json=ASK).status_code == 200
