"""The HTTP API over a real model and a real socket, asked by OpenAI's own client."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from PIL import Image

from hartist.generation.png import read_metadata
from servers import Server
from tiny import write_tiny_text_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_text_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server") / "log.txt", "--model", model, "--no-page")
    running.wait_ready()
    yield running
    assert running.stop() == 0, running.log.read_text()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def picture(data: str | None) -> Image.Image:
    assert data is not None
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_openais_client_gets_pictures_that_say_how_they_were_made(client: openai.OpenAI, tmp_path: Path) -> None:
    reply = client.images.generate(prompt="a red apple", n=3, extra_body={"seed": 5, "guidance": 2.5})
    assert reply.data is not None
    assert [item.seed for item in reply.data] == [5, 6, 7]  # type: ignore[attr-defined]
    path = tmp_path / "second.png"
    path.write_bytes(base64.b64decode(reply.data[1].b64_json or ""))
    made = read_metadata(path)
    assert (made["prompt"], made["seed"], made["settings"]["guidance"]) == ("a red apple", 6, 2.5)
    again = client.images.generate(prompt="a red apple", extra_body={"seed": 6, "guidance": 2.5})
    assert again.data is not None
    assert base64.b64decode(again.data[0].b64_json or "") == path.read_bytes()


def test_a_stream_shows_the_picture_come_into_focus(client: openai.OpenAI) -> None:
    events = list(client.images.generate(prompt="a cat", stream=True, partial_images=2, extra_body={"seed": 1}))
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]  # type: ignore[union-attr]
    whole = client.images.generate(prompt="a cat", extra_body={"seed": 1})
    assert whole.data is not None
    assert events[-1].b64_json == whole.data[0].b64_json
    assert events[0].b64_json != events[1].b64_json


def test_pictures_can_be_fetched_by_url_and_in_other_formats(client: openai.OpenAI) -> None:
    for kind, name in (("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")):
        reply = client.images.generate(prompt="a cat", response_format="url", output_format=kind)  # type: ignore[call-overload]
        fetched = httpx.get(reply.data[0].url)
        assert fetched.headers["content-type"] == f"image/{kind}"
        assert Image.open(io.BytesIO(fetched.content)).format == name
    assert httpx.get(reply.data[0].url[:-1]).status_code == 404


def test_the_model_is_listed(client: openai.OpenAI, model: Path) -> None:
    listed = client.models.list().data
    assert [entry.id for entry in listed] == [client.models.retrieve(listed[0].id).id]
    with pytest.raises(openai.NotFoundError, match="this server has the model"):
        client.models.retrieve("dall-e-3")


@pytest.mark.parametrize(
    ("changes", "status", "part"),
    [
        ({"prompt": ""}, 400, "the prompt is empty"),
        ({"prompt": "x" * 5000}, 400, "4000 characters"),
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": "\ud800"}, 400, ""),
        ({"n": 0}, 400, "n:"),
        ({"n": 11}, 400, "n:"),
        ({"n": "2"}, 400, "n:"),
        ({"size": "1024x1024"}, 400, "this model makes pictures of"),
        ({"model": "dall-e-3"}, 404, "this server has the model"),
        ({"guidance": 1e9}, 400, "guidance"),
        ({"seed": 2**70}, 400, "seed"),
        ({"colour": "red"}, 400, "colour"),
    ],
)
def test_what_cannot_be_made_is_refused_in_openais_shape(
    server: Server, changes: dict[str, object], status: int, part: str
) -> None:
    body = json.dumps({"prompt": "a cat", **changes})
    reply = httpx.post(
        f"{server.url}/v1/images/generations", content=body, headers={"Content-Type": "application/json"}
    )
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert part in error["message"]
    assert "Traceback" not in reply.text


def test_figures_for_prometheus(server: Server) -> None:
    text = httpx.get(f"{server.url}/metrics").text
    assert 'hartist_images_total{outcome="finished"}' in text
    assert "hartist_ready_workers 1.0" in text


def test_replies_are_counted_by_route_and_times_are_taken(server: Server, client: openai.OpenAI) -> None:
    def figures() -> dict[str, float]:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.split()[-1]) for line in lines if not line.startswith("#")}

    def reply(route: str, status: int) -> str:
        return f'hartist_requests_total{{route="{route}",status="{status}"}}'

    route = "/v1/images/generations"
    before = figures()
    client.images.generate(prompt="a cat")
    list(client.images.generate(prompt="a cat", stream=True, partial_images=1))
    httpx.post(f"{server.url}{route}", content=b"{")
    httpx.get(f"{server.url}/v1/images/results/made-up")
    httpx.get(f"{server.url}/made-up")
    grown = {name: value - before.get(name, 0) for name, value in figures().items() if value != before.get(name, 0)}
    assert grown[reply(route, 200)] == 2
    assert grown[reply(route, 400)] == 1
    assert grown[reply("/v1/images/results/{name}", 404)] == 1
    assert not any("made-up" in name for name in grown)
    assert grown["hartist_request_seconds_count"] == 2
    assert grown["hartist_first_preview_seconds_count"] == 1
    assert 0 < grown["hartist_first_preview_seconds_sum"] < grown["hartist_request_seconds_sum"]


def test_a_missing_model_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    broken = write_tiny_text_model(tmp_path / "model")
    weights = broken / "transformer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    server = Server(tmp_path / "log.txt", "--model", broken, "--no-page")
    assert server.process.wait(60) == 2
    last = server.log.read_text().splitlines()[-1]
    assert last.startswith("hartist: error: ")
    assert "model.safetensors" in last
