"""The parts of `hartist serve`'s page, by themselves: links, the form, what is shown, and pictures that are sent in."""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hartist.commands.serve import _page
from hartist.errors import UserError
from hartist.generation.pipeline import Pipeline, override
from hartist.generation.png import encode_png
from hartist.generation.sampling import SamplingSettings
from hartist.generation.shortcuts import FAST
from hartist.serving.batch import run_batch
from hartist.serving.reconstruction import MAX_PIXELS, read_upload
from hartist.serving.results import Results
from hartist.serving.tasks import (
    Event,
    Failed,
    Finished,
    ImageTask,
    ModelInfo,
    Preview,
    Reconstructed,
    ReconstructTask,
)
from tiny import write_tiny_text_model

pytest.importorskip("gradio", reason="the page needs gradio")

from hartist.serving.page.reconstruct_tab import MAX_BYTES, decibels, picture_of
from hartist.serving.page.requests import from_form, from_query, to_query
from hartist.serving.page.stage import Stage


@given(
    prompt=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40),
    seed=st.integers(-(2**63) + 1, 2**63 - 1),
    guidance=st.floats(0, 100),
    temperature=st.floats(0, 100),
    top_k=st.none() | st.integers(0, 10**6),
    residual=st.booleans(),
    steps=st.none() | st.integers(1, 1000),
    fast=st.booleans(),
)
def test_a_link_leads_back_to_its_picture(
    prompt: str,
    seed: int,
    guidance: float,
    temperature: float,
    top_k: int | None,
    residual: bool,
    steps: int | None,
    fast: bool,
) -> None:
    own = SamplingSettings(guidance=2.0)
    settings = SamplingSettings(
        guidance=guidance, temperature=temperature, top_k=top_k, residual=residual, diffusion_steps=steps
    )
    if fast:
        settings = override(settings, **(FAST if steps is None else {**FAST, "diffusion_steps": steps}))
        own = override(own, **FAST)
    asked = from_query(to_query(ImageTask("x", prompt, seed, settings), SamplingSettings(guidance=2.0)))
    assert asked is not None
    assert (asked.prompt, asked.seed, asked.n, bool(asked.fast)) == (prompt, seed, 1, fast)
    for name in ("guidance", "temperature", "top_k", "residual", "diffusion_steps"):
        value = getattr(asked, name)
        assert (getattr(own, name) if value is None else value) == getattr(settings, name)


@given(st.text(max_size=200))
def test_any_other_link_is_understood_or_refused(query: str) -> None:
    try:
        asked = from_query(query)
    except ValueError:  # pydantic's, and UserError
        return
    assert asked is None or asked.prompt is not None


def test_the_form_says_what_is_wrong_with_a_seed() -> None:
    assert from_form("a cat", 2, " 7 ", guidance=None).seed == 7
    assert from_form("a cat", 2, "").seed is None
    for seed in ("7.5", "seven", "9" * 50):
        with pytest.raises(UserError, match="the seed is no whole number"):
            from_form("a cat", 1, seed)


def test_the_stage_tells_what_becomes_of_each_picture() -> None:
    png = encode_png(Image.new("RGB", (8, 8)))
    info = ModelInfo("m", 8, 8, 2, SamplingSettings(guidance=2.0), grids=((1, 1), (2, 3)))
    tasks = [ImageTask(name, "<b>Café!</b>", i, info.settings) for i, name in enumerate("abcde")]
    stage, results = Stage(info, tasks, kept := Results()), []

    async def work() -> None:
        stage.wait(1)
        results.append(stage.value())
        for event in (
            Preview("a", 1, 2, png),
            Finished("b", png, truncated_tokens=1),
            Finished("c", png, blocked=True),
            Failed("d", "no"),
        ):
            await stage.add(event)
        results.append(stage.value())
        stage.end("stopped", "Stopped")
        results.append(stage.value())

    asyncio.run(work())
    waiting, running, stopped = results
    assert (waiting["status"], waiting["note"]) == ("waiting", "Waiting: 1 picture in the queue")
    assert [p["caption"] for p in running["pictures"]] == [
        "scale 2 of 2: 2×3",
        "seed 1",
        "Withheld by the image filter",
        "no",
        "",
    ]
    assert [p["id"] for p in stopped["pictures"]] == ["a", "b", "c", "d"]
    assert waiting["number"] < running["number"] < stopped["number"]
    made = running["pictures"][1]
    assert kept.get(made["source"].rpartition("/")[2]).data == png  # type: ignore[union-attr]
    assert made["file"] == "b-caf-b-1.png"
    assert made["note"] == "The model did not read the last 1 token of this prompt."
    assert running["pictures"][2]["source"] == ""


def test_pictures_are_checked_before_they_are_decoded() -> None:
    def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    grey = Image.new("L", (30, 20), 100)
    for kind in ("PNG", "JPEG", "WEBP"):
        assert read_upload(encoded(grey, kind), 16, 24).shape == (16, 24, 3)
    for broken in (b"", b"text", encoded(grey, "GIF"), encoded(grey, "TIFF")):
        with pytest.raises(UserError, match="no PNG, JPEG or WebP"):
            read_upload(broken, 16, 16)
    with pytest.raises(UserError, match="damaged"):
        read_upload(encoded(grey, "PNG")[:45], 16, 16)
    large = bytearray(encoded(grey, "PNG"))
    for side, number in ((MAX_PIXELS // 1000, "32"), (10**6, "1000")):
        large[16:24] = side.to_bytes(4) + (1001).to_bytes(4)
        large[29:33] = zlib.crc32(large[12:29]).to_bytes(4)
        with pytest.raises(UserError, match=rf"has {number} megapixels|too large"):
            read_upload(bytes(large), 16, 16)


def test_one_broken_picture_fails_alone(tmp_path: Path) -> None:
    pipeline = Pipeline.from_pretrained(write_tiny_text_model(tmp_path / "model"))
    buffer = io.BytesIO()
    Image.new("RGB", (50, 40), "red").save(buffer, "PNG")
    tasks = [ReconstructTask("good", buffer.getvalue()), ReconstructTask("bad", b"x"), ReconstructTask("gone", b"")]
    events: list[Event] = []
    run_batch(pipeline, tasks, lambda: {"gone"}, events.append)
    good, bad = events
    assert isinstance(good, Reconstructed)
    assert isinstance(bad, Failed)
    assert (good.task_id, bad.task_id, bad.retry) == ("good", "bad", False)
    assert Image.open(io.BytesIO(good.original)).getpixel((0, 0)) == (255, 0, 0)
    assert len({good.original, good.discrete, good.png}) == 3
    assert "x" * 20 not in repr(ReconstructTask("x", b"x" * 20))


def test_what_an_event_carries_is_checked() -> None:
    assert picture_of({"base64": base64.b64encode(b"data").decode()}) == b"data"
    for wrong in (None, [], {}, {"base64": 5}, {"base64": ""}):
        with pytest.raises(UserError, match="no picture was sent"):
            picture_of(wrong)
    with pytest.raises(UserError, match="damaged"):
        picture_of({"base64": "%%%"})
    with pytest.raises(UserError, match="more than 8 MB"):
        picture_of({"base64": "A" * (MAX_BYTES * 4 // 3 + 8)})
    assert decibels(float("inf")) == "no difference"


def test_without_gradio_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "hartist.serving.page.mount", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"gradio; pip install 'hartist\[serve\]', or leave it out with --no-page"):
        _page(argparse.Namespace(no_page=False))
    assert _page(argparse.Namespace(no_page=True)) is None
