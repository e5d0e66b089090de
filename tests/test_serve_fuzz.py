"""Whatever is sent, the server refuses it in words and goes on: a share by default, ten thousand cases if run as slow.

Most go straight to the application, over a backend whose pictures cost nothing; some over a socket, and some to
`hartist serve` itself, whose memory is watched.
"""

from __future__ import annotations

import gc
import json
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hartist.serving.access import AccessRules
from hartist.serving.app import Server as ServerState
from hartist.serving.schemas import ImageRequest
from instant import GENERATE, InProcess, in_process, instant_app, on_loopback
from servers import Server
from tiny import write_tiny_text_model

ASK = {"prompt": "a cat", "seed": 3}
JSON = [(b"host", b"127.0.0.1:8000"), (b"content-type", b"application/json")]
CASES: Counter[str] = Counter()
"""Judged so far, by kind."""


def judge(kind: str, status: int, body: bytes, media_type: str = "") -> None:
    """What must hold for every answer. 503 means that the server is loading, 429 that too much was asked."""
    CASES[kind] += 1
    assert status < 500 or status == 503, (status, body[:500])
    assert b"Traceback" not in body
    if status >= 400:
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert isinstance(error["message"] + error["type"], str)
        assert len(error["message"]) < 1000
    elif media_type.startswith("text/event-stream"):
        assert b'"type":"server_error"' not in body.replace(b" ", b"")


def fuzz(strategy: st.SearchStrategy[Any], check: Callable[[Any], None], cases: int) -> None:
    """`check` on so many examples."""

    def judged(case: Any) -> None:
        check(case)

    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    given(strategy)(settings(max_examples=cases, deadline=None, database=None, suppress_health_check=quiet)(judged))()


# ----------------------------------------------------------------- what is sent

PATHS = [
    "file:///etc/passwd",
    "../../../etc/passwd",
    "..\\..\\windows",
    "/proc/self/environ",
    "http://127.0.0.1:1/",
    "\\\\host\\share",
    "con",
    "a\x00b",
]
NASTY = [
    "",
    " ",
    "\x00",
    "\x1b[2J",
    "\r\nSet-Cookie: a=b",
    "\ud800",
    "\udfff\ud800",
    "\uffff",
    "\u202e",
    "\u2028",
    "🏳️‍🌈" * 50,
    "e\u0301" * 100,
    "<script>alert(1)</script>",
    "{{7*7}}${7*7}%s%n",
    "'; DROP TABLE x; --",
    "auto",
    "8x8",
    "-8x-8",
    "99999999999x99999999999",
    "instant",
    "NaN",
    "null",
    "x" * 5000,
]
texts = st.text(max_size=30) | st.text(st.characters(categories=["Cs", "Cc", "Co", "Cn"]), max_size=8)
strings = st.sampled_from(PATHS + NASTY) | texts
numbers = (
    st.integers(-3, 12)
    | st.sampled_from([2**31, 2**32, 2**53, 2**63 - 1, 2**63, -(2**63), 2**64, 10**40, 10**400, -(10**400)])
    | st.floats()
    | st.sampled_from([1e308, 5e-324, -0.0, 1.0, 2.0, 0.5])
)
scalars = st.none() | st.booleans() | numbers | strings
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(strings, inner, max_size=4), max_leaves=12
)
sensible: dict[str, st.SearchStrategy[Any]] = {
    "prompt": strings | st.sampled_from(["a cat", "a dog"]),
    "model": st.sampled_from([None, "instant"]),
    "n": st.integers(1, 3),
    "size": st.sampled_from([None, "auto", "8x8"]),
    "response_format": st.sampled_from([None, "b64_json", "url"]),
    "output_format": st.sampled_from([None, "png", "jpeg", "webp"]),
    "output_compression": st.none() | st.integers(0, 100),
    "stream": st.none() | st.booleans(),
    "partial_images": st.none() | st.integers(0, 100),
    "seed": st.none() | st.integers(-(2**63) + 1, 2**63 - 1),
    "negative_prompt": st.none() | strings,
    "guidance": st.none() | st.floats(0, 100),
    "top_k": st.none() | st.integers(0, 10**6),
    "top_p": st.none() | st.floats(0, 1),
    "temperature": st.none() | st.floats(0, 100),
    "residual": st.none() | st.booleans(),
    "diffusion_steps": st.none() | st.integers(1, 1000),
    "fast": st.none() | st.booleans(),
    **dict.fromkeys(("quality", "style", "background", "moderation", "user"), st.none() | strings),
}
FIELDS = list(ImageRequest.model_fields)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """JSON objects that mostly look like requests: some fields sensible, some of anything, some twice or unknown."""
    names = draw(st.lists(st.sampled_from(FIELDS), max_size=6))
    pairs = [(name, draw(sensible[name])) for name in ["prompt", *names]]
    if draw(st.booleans()):
        pairs.append((draw(st.sampled_from(FIELDS) | strings), draw(values)))
    if draw(st.booleans()):
        pairs = draw(st.permutations(pairs))
    ascii_only = draw(st.booleans())
    text = ",".join(
        f"{json.dumps(name, ensure_ascii=ascii_only)}:{json.dumps(value, ensure_ascii=ascii_only)}"
        for name, value in pairs
    )
    return f"{{{text}}}".encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A request with some bytes changed, cut out or put in, or any bytes at all."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(draw(bodies()))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = at + draw(st.integers(0, 4))
        data[at:end] = draw(st.binary(max_size=4) | st.sampled_from([b'"', b"{", b"]", b"\\u", b"1e9", b",,", b"\x00"]))
    return bytes(data)


TYPES = [
    b"application/json",
    b"application/json; charset=utf-16",
    b"application/json; charset=\xff",
    b"application/problem+json",
    b"text/plain",
    b"multipart/form-data",
    b"multipart/form-data; boundary=x",
    b"application/x-www-form-urlencoded",
    b"",
    b";;;",
]
HEADERS = [
    b"host",
    b"origin",
    b"authorization",
    b"content-length",
    b"content-type",
    b"content-encoding",
    b"accept",
    b"range",
    b"cookie",
    b"if-none-match",
    b"x-forwarded-for",
    b"x-forwarded-proto",
    b"x-http-method-override",
    b"expect",
    b"upgrade",
    b"connection",
    b"te",
]
HEADER_VALUES = [
    b"[",
    b"http://[::1",
    b"[::1]:99999",
    b"a" * 5000,
    b"-1",
    b"9" * 40,
    b"\xb2",
    b"1e3",
    b"gzip, br, zstd",
    b"bytes=0-1,5-, -9",
    b"Basic =",
    b"Basic Og==",
    b"Bearer \xff",
    b"websocket",
    b"100-continue",
    b"*/*;q=x",
    b"http://127.0.0.1:8000",
    b"127.0.0.1:8000",
    b"null",
    b"%00",
]
field_bytes = st.binary(max_size=30).map(lambda value: re.sub(rb"[\x00-\x08\x0a-\x1f\x7f]", b"", value).strip())
"""A server passes on no others."""
headers = st.lists(st.tuples(st.sampled_from(HEADERS), st.sampled_from(HEADER_VALUES) | field_bytes), max_size=4)
methods = st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "get", "X"])
ROUTES = [
    GENERATE,
    "/v1/models",
    "/v1/models/",
    "/v1/images/results/",
    "/healthz",
    "/readyz",
    "/metrics",
    "/openapi.json",
]
segments = st.sampled_from(["..", ".", "", "%2e%2e", "\\", "\x00", "etc", "passwd", ";", "*"]) | st.text(max_size=10)
paths = st.builds(
    lambda start, rest: start + "/".join(rest),
    st.sampled_from([*ROUTES, "/", "", "http://x/"]),
    st.lists(segments, max_size=3),
)

EXTREMES = {
    "nested lists": b"[" * 1_000_000,
    "nested closed lists": b"[" * 500_000 + b"]" * 500_000,
    "nested objects": b'{"a":' * 190_000,
    "nested value": b'{"prompt":"x","user":' + b"[" * 400_000 + b"]" * 400_000 + b"}",
    "nested within python's limits": b'{"prompt":"x","seed":' + b"[" * 900 + b"]" * 900 + b"}",
    "a long number": b'{"prompt":"x","seed":' + b"9" * 900_000 + b"}",
    "a long number within python's limits": b'{"prompt":"x","seed":' + b"9" * 4000 + b"}",
    "a long number for a float": b'{"prompt":"x","guidance":' + b"9" * 4000 + b"}",
    "a long fraction": b'{"prompt":"x","guidance":0.' + b"9" * 900_000 + b"}",
    "a large exponent": b'{"prompt":"x","guidance":1e999999999}',
    "a long list": b'{"prompt":[' + b"0," * 500_000 + b"0]}",
    "many unknown fields": b'{"prompt":"x"' + b"".join(b',"%x":0' % i for i in range(90_000)) + b"}",
    "one field again and again": b'{"prompt":"x"' + b',"n":99' * 140_000 + b"}",
    "a long prompt": json.dumps({"prompt": "x" * 1_000_000}).encode(),
    "a long prompt of emoji": json.dumps({"prompt": "🦊" * 4000}).encode(),
    "a long prompt of escapes": b'{"prompt":"' + b"\\u0000" * 170_000 + b'"}',
    "a long name": b'{"prompt":"x","' + b"n" * 1_000_000 + b'":0}',
    "long ignored fields": json.dumps({"prompt": "x", "user": "u" * 500_000, "style": "s" * 500_000}).encode(),
    "a long model": json.dumps({"prompt": "x", "model": "m" * 1_000_000}).encode(),
    "only spaces": b" " * 1_000_000,
    "only zeros": bytes(1_000_000),
    "utf-16": json.dumps(ASK).encode("utf-16"),
    "utf-32 without a mark": json.dumps(ASK).encode("utf-32-le"),
    "utf-8 with a mark": b"\xef\xbb\xbf" + json.dumps(ASK).encode(),
    "overlong utf-8": b'{"prompt":"\xc0\xaf\xe0\x80\xaf"}',
    "surrogates as utf-8": b'{"prompt":"\xed\xa0\x80"}',
    "an escaped surrogate in a name": b'{"prompt":"x","\\ud800":1}',
    "huge numbers everywhere": json.dumps(
        {**ASK, **dict.fromkeys(("n", "size", "top_k", "diffusion_steps"), 10**300)}
    ).encode(),
}


# ----------------------------------------------------------------- straight to the application


@pytest.fixture(scope="module")
def app() -> Iterator[InProcess]:
    with in_process(AccessRules(hosts=("127.0.0.1",))) as running:
        yield running


@pytest.fixture(autouse=True)
def _the_same_picture_afterwards(app: InProcess) -> Iterator[None]:
    """Nothing that was sent changes what others get, or is left behind."""
    before = app.ask("POST", GENERATE, json=ASK).json()["data"]
    yield
    assert app.ask("POST", GENERATE, json=ASK).json()["data"] == before
    state: ServerState = app.app.state.server
    assert state.scheduler.waiting == state.scheduler.running == 0
    statistics = state.scheduler.statistics
    assert statistics.failed == 0


def send_json(app: InProcess, body: bytes) -> None:
    status, answer_headers, answer = app.call("POST", GENERATE, [body], JSON)
    judge("json", status, answer, answer_headers.get("content-type", ""))


def send_request(app: InProcess, case: tuple[str, str, bytes, list[bytes], list[tuple[bytes, bytes]]]) -> None:
    method, path, query, parts, more = case
    status, answer_headers, answer = app.call(method, path, parts, [*more, *JSON], query)
    judge("requests", status, answer, answer_headers.get("content-type", ""))


queries = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30).map(str.encode) | st.binary(
    max_size=9
)
requests = st.tuples(methods, paths, queries, st.lists(damaged() | bodies(), max_size=3), headers)
typed = st.tuples(
    st.just("POST"),
    st.just(GENERATE),
    st.just(b""),
    st.lists(damaged() | bodies(), max_size=3),
    st.lists(st.tuples(st.just(b"content-type"), st.sampled_from(TYPES)), min_size=1, max_size=2),
)


def fuzz_application(app: InProcess, cases: int) -> None:
    fuzz(bodies(), lambda body: send_json(app, body), cases // 2)
    fuzz(damaged(), lambda body: send_json(app, body), cases // 4)
    fuzz(requests | typed, lambda case: send_request(app, case), cases // 4)


def test_any_request_is_answered_in_words(app: InProcess) -> None:
    fuzz_application(app, 600)


def test_any_header_may_have_any_value(app: InProcess) -> None:
    body = json.dumps(ASK).encode()
    for name in HEADERS:
        for value in HEADER_VALUES:
            send_request(app, ("POST", GENERATE, b"", [body], [(name, value)]))
            send_request(app, ("GET", "/v1/images/results/x", b"", [], [(name, value)]))


@pytest.mark.parametrize("query", [b"\x80", b"%ff%00", b"&&=;=&%", b"x=" + b"y" * 60_000, b"prompt=%ed%a0%80"])
def test_any_query_may_follow_any_path(app: InProcess, query: bytes) -> None:
    for path in [*ROUTES, "/"]:
        send_request(app, ("GET", path, query, [], []))


@pytest.mark.parametrize(
    "change", ['"guidance": "2.5"', '"temperature": false', '"n": true', '"n": 1.0', '"seed": "1"', '"stream": 1']
)
def test_what_is_no_number_is_not_taken_for_one(app: InProcess, change: str) -> None:
    status, _, answer = app.call("POST", GENERATE, [f'{{"prompt": "a cat", {change}}}'.encode()], JSON)
    assert status == 400
    assert json.loads(answer)["error"]["param"] == next(iter(json.loads(f"{{{change}}}")))


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_are_refused_soon(app: InProcess, name: str) -> None:
    """Nothing else is answered meanwhile, so it must not take long."""

    def seconds() -> float:
        started = time.process_time()
        send_json(app, EXTREMES[name])
        return time.process_time() - started

    # The least of three: a busy machine, or Python clearing up after the tests before, is not the server's doing.
    assert min(seconds() for _ in range(3)) < 0.5


# ----------------------------------------------------------------- by its own description


def schema_cases(port: int, examples: int) -> None:
    """Requests that fit the server's own OpenAPI description and some that don't; replies must fit it too."""
    import schemathesis
    from schemathesis.checks import CHECKS, load_all_checks
    from schemathesis.generation import GenerationMode

    load_all_checks()
    checks = CHECKS.get_by_names(
        [
            "not_a_server_error",
            "status_code_conformance",
            "response_schema_conformance",
            "negative_data_rejection",
            "unsupported_method",
        ]
    )
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 7
    for operation in operations:

        def check(case: Any) -> None:
            reply = case.call()
            judge("schema", reply.status_code, reply.content, *reply.headers.get("content-type", []))
            case.validate_response(reply, checks=checks)

        if operation.method == "post":
            for mode in GenerationMode:
                fuzz(operation.as_strategy(generation_mode=mode), check, examples)
        else:  # which takes nothing, or any name
            fuzz(operation.as_strategy(), check, max(10, examples // 10))


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with on_loopback(instant_app()) as number:
        yield number


def test_the_server_does_what_its_description_says(port: int) -> None:
    schema_cases(port, 100)


# ----------------------------------------------------------------- over a socket

lines = st.sampled_from(
    [
        f"POST {GENERATE} HTTP/1.1",
        f"POST {GENERATE} HTTP/1.0",
        "GET /healthz HTTP/1.1",
        "GET /v1/models HTTP/9.9",
        "GET http://127.0.0.1/v1/models HTTP/1.1",
        "OPTIONS * HTTP/1.1",
        "PRI * HTTP/2.0",
        "GET /%ff%00%zz HTTP/1.1",
        "GET  /healthz HTTP/1.1",
        "GET /healthz",
        "",
        "\x16\x03\x01",
    ]
).map(str.encode)
http_headers = st.sampled_from(
    [
        b"Host: 127.0.0.1",
        b"Host: 127.0.0.1",
        b"Host: [",
        b"Host:",
        b"Content-Type: application/json",
        b"Content-Length: 0",
        b"Content-Length: -1",
        b"Content-Length: 5",
        b"Content-Length: 5, 6",
        b"Content-Length: 99999999999999999999999",
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: \x0bchunked",
        b"Connection: keep-alive, Upgrade",
        b"Upgrade: websocket",
        b"Upgrade: h2c",
        b"Expect: 100-continue",
        b" folded: x",
        b"No colon",
        b"X: a\x00b",
        b"Origin: http://[",
        b"X-Forwarded-For: , ,",
        b"\xff: \xff",
        b": x",
    ]
)
json_request = bodies().map(
    lambda body: (
        (
            f"POST {GENERATE} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode()
        + body
    )
)


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """What arrives at the port: HTTP with something wrong about it, or no HTTP."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.binary(min_size=1, max_size=300))
    if kind < 6:
        data = bytearray(draw(json_request))
        for _ in range(max(0, kind - 3)):
            at = draw(st.integers(0, len(data)))
            data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
        return bytes(data)
    ends = draw(st.sampled_from([b"\r\n", b"\r\n", b"\n", b"\r"]))
    head = [draw(lines | st.binary(max_size=40)), *draw(st.lists(http_headers | field_bytes, max_size=5))]
    body = draw(st.sampled_from([b"", b"5\r\nhello\r\n0\r\n\r\n", b"zz\r\n", b"-1\r\n", b"{}"]) | bodies())
    return ends.join(head) + ends * 2 + body


def send_raw(port: int, data: bytes) -> None:
    """Judge every answer to these bytes; a connection that is closed without one is an answer too."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        try:
            connection.sendall(data)
            connection.settimeout(0.05)
            while part := connection.recv(65536):
                answer += part
        except TimeoutError:  # it waits for more; most likely rightly
            pass
        except ConnectionError:
            pass
    CASES["raw"] += 1
    while answer.startswith(b"HTTP/1."):
        head, found, rest = answer.partition(b"\r\n\r\n")
        status = int(head.split()[1])
        assert status < 500 or status == 503, (status, data[:500])
        length = re.search(rb"\r\ncontent-length: (\d+)", head.lower())
        if status < 400 or length is None or not found:  # 400 without a length: uvicorn's own, for what is no HTTP
            break
        body, answer = rest[: int(length[1])], rest[int(length[1]) :]
        if body:  # none for HEAD
            judge("raw answers", status, body)


def test_any_bytes_at_the_port_do_no_harm(port: int) -> None:
    fuzz(messages(), lambda data: send_raw(port, data), 120)
    assert httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200


# ----------------------------------------------------------------- hartist serve itself


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    environment = {"GRADIO_TEMP_DIR": str(folder / "gradio")}
    model = write_tiny_text_model(folder / "tiny")
    running = Server(folder / "log.txt", "--model", model, "--head-timeout", 2, **environment)
    running.wait_ready(300)
    yield running
    assert running.stop() == 0, running.log.read_text()[-3000:]
    assert "Traceback" not in running.log.read_text()


def memory(pid: int) -> float:
    """MiB of its own."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def fuzz_live(server: Server, cases: int) -> float:
    """MiB by which the server has grown, once it has seen everything once."""
    with httpx.Client(base_url=server.url, timeout=60) as client:

        def send(body: bytes) -> None:
            reply = client.post(GENERATE, content=body, headers={"Content-Type": "application/json"})
            judge("live", reply.status_code, reply.content, reply.headers["content-type"])

        def some(share: int) -> None:
            for body in EXTREMES.values():
                send(body)
            fuzz(bodies() | damaged(), send, share)
            fuzz(messages(), lambda data: send_raw(server.port, data), share)

        before = client.post(GENERATE, json=ASK).json()["data"]
        some(max(20, cases // 8))
        start = memory(server.process.pid)
        some(cases // 2)
        grown = memory(server.process.pid) - start
        assert client.post(GENERATE, json=ASK).json()["data"] == before
        assert client.get("/readyz").status_code == 200
    return grown


def test_the_server_keeps_its_memory_and_its_pictures(server: Server) -> None:
    assert fuzz_live(server, 100) < 16


@pytest.mark.slow
def test_ten_thousand_cases(app: InProcess, port: int, server: Server) -> None:
    CASES.clear()
    started = time.monotonic()
    fuzz_application(app, 10_000)
    schema_cases(port, 500)
    fuzz(messages(), lambda data: send_raw(port, data), 1_000)
    assert fuzz_live(server, 1_000) < 16
    gc.collect()
    print(f"{CASES.total()} cases in {time.monotonic() - started:.0f} s: {dict(CASES)}")
    assert CASES.total() >= 10_000
