"""The page of `hartist serve`: in a real browser, against a live server that asks for a key."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

import tiny
from hartist.generation.png import read_metadata
from hartist.generation.shortcuts import FAST
from servers import Server

if find_spec("gradio") is None:
    pytest.skip("the page needs gradio", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
KEY = "open-sesame"
SIDES = (1, 2, 3, 4, 6, 8, 10, 12, 16)
"""Enough work that a browser can keep up with the previews."""
PIXELS = 8 * SIDES[-1]
PATIENCE = 240.0
"""Seconds for one step on a busy machine."""
FINISHED = ".stage .tile.finished .download"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "SIDES", SIDES)
        return tiny.write_tiny_text_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that asks for a key; pictures are made one by one."""
    folder = tmp_path_factory.mktemp("server")
    environment = {"HARTIST_API_KEY": KEY, "GRADIO_TEMP_DIR": str(folder / "gradio")}
    running = Server(folder / "log.txt", "--model", model, "--max-batch", 1, **environment)
    running.wait_ready(PATIENCE)
    yield running
    assert running.stop() == 0, running.log.read_text()
    assert "Traceback" not in running.log.read_text()
    assert not [path for path in folder.rglob("gradio/**/*") if path.is_file()]  # nothing of a visitor's is on disk


@pytest.fixture(scope="module")
def api(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=PATIENCE) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def visit(server: Server, browser: sync_api.Browser) -> Iterator[Callable[..., sync_api.Page]]:
    """Opens the page in a context of its own. Nothing may be asked of another host meanwhile, or go wrong."""
    contexts: list[sync_api.BrowserContext] = []
    foreign: list[str] = []
    wrong: list[str] = []

    def note(request: sync_api.Request) -> None:
        address = urlsplit(request.url)
        if address.scheme not in ("data", "blob") and address.netloc != f"127.0.0.1:{server.port}":
            foreign.append(request.url)

    def listen(message: sync_api.ConsoleMessage) -> None:
        if "Content Security Policy" in message.text:
            wrong.append(message.text)

    def open_page(query: str = "", width: int = 1280, height: int = 900, key: str | None = KEY) -> sync_api.Page:
        credentials = {"username": "anyone", "password": key} if key else None
        context = browser.new_context(viewport={"width": width, "height": height}, http_credentials=credentials)
        contexts.append(context)
        context.set_default_timeout(PATIENCE * 1000)
        context.on("request", note)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", listen)
        page.goto(server.url + "/" + query)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not foreign
    assert not wrong


def ready(page: sync_api.Page) -> sync_api.Page:
    """Wait until the form has the model's settings."""
    sync_api.expect(page.locator("#about")).to_contain_text("scales", timeout=PATIENCE * 1000)
    return page


def fill_in(page: sync_api.Page, prompt: str, **fields: object) -> None:
    page.locator("#prompt textarea").fill(prompt)
    for label, value in fields.items():
        page.get_by_label(label.replace("_", " "), exact=False).first.fill(str(value))


def says(page: sync_api.Page, place: str, text: str | re.Pattern[str]) -> None:
    sync_api.expect(page.locator(place).first).to_contain_text(text, timeout=PATIENCE * 1000)


def download(page: sync_api.Page, target: Path) -> bytes:
    with page.expect_download() as caught:
        page.locator(FINISHED).first.click()
    caught.value.save_as(target)
    return target.read_bytes()


# ----------------------------------------------------------------- in a browser


def test_a_picture_comes_into_focus_and_can_be_had_again(
    visit: Callable[..., sync_api.Page], api: httpx.Client, tmp_path: Path
) -> None:
    page = ready(visit())
    page.evaluate(
        """() => {
            window.seen = [];
            window.captions = [];
            const stage = document.querySelector(".stage");
            new MutationObserver(() => {
                for (const image of stage.querySelectorAll("img"))
                    if (!window.seen.includes(image.src)) window.seen.push(image.src);
                const caption = stage.querySelector(".caption")?.textContent;
                if (caption && !window.captions.includes(caption)) window.captions.push(caption);
            }).observe(stage, { childList: true, subtree: true, characterData: true });
        }"""
    )
    fill_in(page, "a red apple", Guidance=2.5)
    page.locator("#prompt textarea").press("Enter")
    page.locator(FINISHED).wait_for()
    seen = page.evaluate("window.seen")
    assert len([source for source in seen if source.startswith("data:image/webp")]) >= 3
    captions = page.evaluate("window.captions")
    scales = [text for text in captions if text.startswith("scale ")]
    assert len(scales) >= 3
    assert set(scales) <= {f"scale {k} of {len(SIDES)}: {side}×{side}" for k, side in enumerate(SIDES, start=1)}
    page.screenshot(path=tmp_path / "desktop.png", full_page=True)

    data = download(page, tmp_path / "made.png")
    made = read_metadata(tmp_path / "made.png")
    assert (made["prompt"], made["settings"]["guidance"]) == ("a red apple", 2.5)
    says(page, ".stage .caption", f"seed {made['seed']}")
    asked = {"prompt": "a red apple", "seed": made["seed"], "guidance": 2.5}
    reply = api.post("/v1/images/generations", json=asked).json()
    assert base64.b64decode(reply["data"][0]["b64_json"]) == data

    link = page.locator(".stage .link").get_attribute("href")
    assert parse_qs(urlsplit(link).query) == {
        "prompt": ["a red apple"],
        "seed": [str(made["seed"])],
        "guidance": ["2.5"],
    }
    again = visit(link)
    again.locator(FINISHED).wait_for()
    assert download(again, tmp_path / "again.png") == data
    assert again.locator("#prompt textarea").input_value() == "a red apple"
    assert again.locator("#seed input, #seed textarea").input_value() == str(made["seed"])

    page.locator(".gallery .thumb").click()
    says(page, ".viewer[open] dl", str(made["seed"]))
    page.screenshot(path=tmp_path / "viewer.png")


def test_a_fast_picture_is_made_by_the_switch_and_by_its_link(
    visit: Callable[..., sync_api.Page], api: httpx.Client, tmp_path: Path
) -> None:
    page = ready(visit())
    page.locator("#fast input").check()
    fill_in(page, "a red apple", Seed=5)
    page.locator("#go").click()
    page.locator(FINISHED).wait_for()
    data = download(page, tmp_path / "fast.png")
    settings = read_metadata(tmp_path / "fast.png")["settings"]
    assert {name: settings[name] for name in FAST} == FAST
    exact = api.post("/v1/images/generations", json={"prompt": "a red apple", "seed": 5}).json()
    assert base64.b64decode(exact["data"][0]["b64_json"]) != data
    reply = api.post("/v1/images/generations", json={"prompt": "a red apple", "seed": 5, "fast": True}).json()
    assert base64.b64decode(reply["data"][0]["b64_json"]) == data
    link = page.locator(".stage .link").get_attribute("href")
    assert parse_qs(urlsplit(link).query)["fast"] == ["1"]
    again = visit(link)
    again.locator(FINISHED).wait_for()
    assert again.locator("#fast input").is_checked()
    assert download(again, tmp_path / "again.png") == data


def test_the_page_fits_a_phone(visit: Callable[..., sync_api.Page], tmp_path: Path) -> None:
    page = ready(visit("?" + urlencode({"prompt": "a cat on a table", "seed": 3}), width=375, height=812))
    page.locator(FINISHED).wait_for()
    page.screenshot(path=tmp_path / "phone.png", full_page=True)
    for selector in ("#prompt", "#go", ".stage .frame", ".gallery"):
        box = page.locator(selector).bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 375
    assert page.locator(".stage .frame").bounding_box()["width"] > 280  # type: ignore[index]
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_stop_and_leaving_the_page_free_the_model(visit: Callable[..., sync_api.Page], api: httpx.Client) -> None:
    def figure(name: str) -> float:
        return float(re.search(rf"^{re.escape(name)} (\S+)$", api.get("/metrics").text, re.MULTILINE)[1])  # type: ignore[index]

    def busy() -> float:
        return figure("hartist_running_images") + figure("hartist_waiting_images")

    def wait_idle() -> None:
        end = time.monotonic() + PATIENCE
        while busy():
            assert time.monotonic() < end

    cancelled = 'hartist_images_total{outcome="cancelled"}'
    page = ready(visit())
    page.get_by_text("Advanced").click()
    fill_in(page, "a cat", Pictures=10, Diffusion_steps=1000)
    page.locator("#go").click()
    page.locator("#halt").click()
    says(page, ".note", "Stopped")
    page.locator("#go").wait_for()
    wait_idle()
    first = figure(cancelled)
    assert first >= 1

    page.locator("#go").click()
    sync_api.expect(page.locator(".stage .tile")).to_have_count(10, timeout=PATIENCE * 1000)  # not those of before
    page.locator(".stage .steps .done").first.wait_for()
    page.close()
    wait_idle()
    assert figure(cancelled) > first


def test_what_cannot_be_made_is_told_in_words(visit: Callable[..., sync_api.Page]) -> None:
    script = "<img src=x onerror='window.broken = true'>"
    page = ready(visit("?" + urlencode({"prompt": script, "seed": "12x"})))
    says(page, ".note", "The seed is no whole number")
    says(page, ".toast-body", "The seed is no whole number")
    fill_in(page, "   ")
    page.locator("#go").click()
    says(page, ".note", "The prompt is empty")
    fill_in(page, script, Guidance=1000)
    page.locator("#go").click()
    says(page, ".note", "Guidance: should be less than or equal to 100")
    fill_in(page, script, Guidance=1, Pictures=2.5)
    page.locator("#go").click()
    says(page, ".note", "Pictures: should be a valid integer")
    fill_in(page, script, Guidance=1, Pictures=1)
    page.locator("#go").click()
    page.locator(FINISHED).wait_for()
    page.locator(".gallery .thumb").click()
    says(page, ".viewer h3", script)
    assert page.evaluate("window.broken") is None


def test_a_picture_is_reconstructed_by_both_paths(
    visit: Callable[..., sync_api.Page], api: httpx.Client, tmp_path: Path
) -> None:
    page = ready(visit())
    page.locator("button[role=tab]", has_text="Reconstruct").click()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 60, 3), np.uint8)).save(tmp_path / "noise.jpg")
    page.locator("#reconstruct input").set_input_files(tmp_path / "noise.jpg")
    tiles = page.locator(".paths .tile")
    sync_api.expect(tiles).to_have_count(3, timeout=PATIENCE * 1000)
    assert tiles.locator("strong").all_inner_texts() == ["Original", "Discrete", "Hybrid"]
    says(page, ".paths .tile:nth-child(2) .caption", re.compile(r"^\d+\.\d\d dB PSNR$"))
    says(page, ".paths .tile:nth-child(3) .caption", re.compile(r"^\d+\.\d\d dB PSNR$"))
    sources = [image.get_attribute("src") for image in tiles.locator("img").all()]
    assert len(set(sources)) == 3
    for source in sources:
        assert Image.open(io.BytesIO(api.get(str(source)).content)).size == (PIXELS, PIXELS)
    page.screenshot(path=tmp_path / "reconstructed.png", full_page=True)

    (tmp_path / "text.png").write_text("no picture at all")
    page.locator("#reconstruct input").set_input_files(tmp_path / "text.png")
    says(page, "#reconstruct .note", "This file is no PNG, JPEG or WebP picture")


def test_without_the_key_there_is_no_page(visit: Callable[..., sync_api.Page]) -> None:
    with pytest.raises(sync_api.Error, match="ERR_INVALID_AUTH_CREDENTIALS"):
        visit(key=None)
    assert "a valid API key is needed" in visit(key="wrong").content()


# ----------------------------------------------------------------- what else could be asked of it


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1/",
        "/gradio_api/info",
        "/gradio_api/component_server",
        "/gradio_api/heartbeat/x",
        "/monitoring",
        "/assets/%2e%2e/index.html",
        "/static/..%2f..%2f..%2froutes.py",
        "/login",
    ],
)
def test_gradios_other_routes_do_not_exist(api: httpx.Client, path: str) -> None:
    reply = api.get(path)
    assert reply.status_code in (403, 404)
    assert "root:" not in reply.text


def test_nothing_is_uploaded_and_no_address_is_opened(api: httpx.Client) -> None:
    assert api.post("/gradio_api/upload", files={"files": b"x"}).status_code == 404
    assert api.get("/v1/images/generations").status_code == 405  # the API's own paths stay the API's
    assert api.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    file = {"path": "http://127.0.0.1:9/x.png", "meta": {"_type": "gradio.FileData"}}
    good = {"data": [""], "fn_index": 0, "session_hash": "abc", "event_data": None, "trigger_id": None}
    for changes in (
        {"data": [file]},
        {"data": {"path": "x"}},
        {"event_data": {"base64": file}},
        {"session_hash": "../x"},
        {"session_hash": None},
        {"fn_index": 999},
        {"fn_index": True},
        {"data": [float("inf")]},
    ):
        reply = api.post("/gradio_api/queue/join", content=json.dumps({**good, **changes}))
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_event"), changes
    assert api.post("/gradio_api/queue/join", content=b"[" * 100_000).status_code == 400


def test_a_deep_link_of_gradios_is_not_followed(api: httpx.Client) -> None:
    assert api.get("/", params={"deep_link": "../../x", "view": "api"}).status_code == 200
