"""`hartist report`: what is on the page, that it stands alone, and what it says of memorisation and of several runs."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from PIL import Image
from torch import Tensor

from evaluated import NETWORK, PROMPTS, SIDE, WIDTH, write_run
from hartist.cli import main
from hartist.evaluation.features import FeatureNetwork
from hartist.evaluation.harness.result import BenchmarkFacts, ModelFacts, Result, read_result, write_result
from hartist.evaluation.report import memorisation
from hartist.evaluation.report.html import text as html_text
from hartist.evaluation.report.markdown import text as markdown_text
from hartist.evaluation.report.memorisation import closeness, nearest
from hartist.evaluation.report.plots import Point, bar_plot, line_plot
from hartist.evaluation.report.samples import draw, extremes
from hartist.evaluation.report.sweep import find_sweep

XHTML, SVG = "{http://www.w3.org/1999/xhtml}", "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, guidance, shift in (("a", 4.5, 0.0), ("b", 1.0, 0.6), ("c", 10.0, 0.3)):
        write_run(folder / name, shift=shift, settings={"guidance": guidance})
    return folder


@pytest.fixture(scope="module")
def page(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of one run."""
    out = tmp_path_factory.mktemp("report")
    assert main(["report", str(runs / "a"), "--out", str(out), "--resamples", "30", "-q"]) == 0
    return out


def report(*arguments: object) -> None:
    assert main(["report", *map(str, arguments), "--resamples", "30", "-q"]) == 0


def fail(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["report", *map(str, arguments), "--resamples", "30", "-q"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    return printed.err


def parse(folder: Path) -> ET.Element:
    """The HTML, read as strictly as XML."""
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert source.startswith("<!DOCTYPE html>\n")
    return ET.fromstring(source.removeprefix("<!DOCTYPE html>\n"))


def words(element: ET.Element) -> str:
    return " ".join("".join(element.itertext()).split())


# ---------------------------------------------------------------------- the page


def test_the_page_is_well_formed_and_loads_nothing(page: Path) -> None:
    root = parse(page)
    pictures = list(root.iter(f"{XHTML}img"))
    assert len(pictures) == 24 + 2 * 6
    for element in pictures:
        kind, _, data = element.attrib["src"].partition(",")
        assert kind == "data:image/webp;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            assert image.size == (SIDE, SIDE)
    names = {"src", "srcset", "data", "action", "href", "{http://www.w3.org/1999/xlink}href"}
    ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(set(ids)) == len(ids)
    for element in root.iter():
        assert not element.tag.endswith(("script", "link", "iframe"))
        for name in names & set(element.attrib):
            value = element.attrib[name]
            assert value.startswith("data:image/webp;base64,") or value.removeprefix("#") in ids
    source = (page / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\((?!#)", source)
    assert set(re.findall(r"url\(#([^)]+)\)", source)) <= set(ids)


def test_every_picture_that_the_markdown_names_exists(page: Path) -> None:
    source = (page / "report.md").read_text(encoding="utf-8")
    named = [unquote(path) for path in re.findall(r"(?<!\\)!\[(?:\\.|[^\]\\])*\]\(([^)]*)\)", source)]
    assert len(named) == 24 + 2 * 6 + 3
    assert {page / name for name in named} == set((page / "report_files").iterdir())
    for path in (page / "report_files").glob("*.svg"):
        assert ET.fromstring(path.read_text(encoding="utf-8")).tag == f"{SVG}svg"


def test_figures_stand_there_with_their_intervals(runs: Path, page: Path) -> None:
    tiles = [words(tile) for tile in parse(page).iter(f"{XHTML}div") if tile.attrib.get("class") == "tile"]
    assert len(tiles) == 4
    for figure, tile in zip([f for f in read_result(runs / "a").figures if f.category is None], tiles, strict=False):
        assert f"{figure.value:.4g}".replace("-", "−") in tile or figure.metric == "clip_score"
    assert re.search(r"Fréchet distance \(Tiny network\) ↓[\d.]+ … [\d.]+$", tiles[0])
    assert tiles[2].endswith("40 pictures")  # recall, which can't be resampled
    assert "agreement with the prompt (Tiny judge) ↑" in tiles[3]


def test_the_recipe_is_part_of_the_page(runs: Path, page: Path) -> None:
    result = read_result(runs / "a")
    for source in (words(parse(page)), (page / "report.md").read_text(encoding="utf-8")):
        for fact in (result.model.fingerprint, result.benchmark.fingerprint, "1,234,567", "2.13.0", "seconds of"):
            assert fact in source
        assert "diffusion steps" in source


def test_prompts_are_shown_as_they_are_and_do_nothing(page: Path) -> None:
    root = parse(page)
    captions = {words(caption) for caption in root.iter(f"{XHTML}figcaption")}
    assert set(PROMPTS) <= {re.sub(r" ?−?[\d.]+$", "", caption) for caption in captions}
    assert not list(root.iter(f"{XHTML}script"))
    source = (page / "report.md").read_text(encoding="utf-8")
    assert "<script" not in re.sub(r"\\.", "", source)
    assert r"\<script\>alert(" in source
    assert r"\*x\* \| \[y\](z)" in source
    assert r"\`code\` \_u\_ \$5 \#1 \~a\~ \\ \!" in source


def test_texts_that_no_file_may_hold_are_replaced() -> None:
    assert html_text("a\0b\x1b <i>&\"'") == "a\ufffdb\ufffd &lt;i&gt;&amp;&quot;&#x27;"
    assert markdown_text("a\n# b\r\n|c") == r"a \# b \|c"


def test_the_same_run_gives_the_same_page(runs: Path, page: Path, tmp_path: Path) -> None:
    report(runs / "a", "--out", tmp_path)
    for name in ("report.html", "report.md"):
        assert (tmp_path / name).read_bytes() == (page / name).read_bytes()
    report(runs / "a", "--out", tmp_path, "--seed", 1)
    assert (tmp_path / "report.md").read_bytes() != (page / "report.md").read_bytes()


def test_what_else_is_in_the_folder_stays(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    report(runs / "a", "--out", tmp_path, "--samples", 2, "--title", "<Mine>")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    root = parse(tmp_path)
    assert [words(title) for title in root.iter(f"{XHTML}h1")] == ["<Mine>"]
    assert len(list(root.iter(f"{XHTML}img"))) == 2 + 2 * 6


# ---------------------------------------------------------------------- several runs


def test_several_runs_are_plotted_against_what_differs(runs: Path, tmp_path: Path) -> None:
    report(*(runs / name for name in "abc"), "--out", tmp_path)
    root = parse(tmp_path)
    assert next(words(title) for title in root.iter(f"{XHTML}h2")) == "Figures against guidance"
    rows = [[words(cell) for cell in row] for row in root.iter(f"{XHTML}tr")]
    assert rows[0][0] == "guidance"
    assert [row[0] for row in rows[1:4]] == ["1", "4.5", "10"]  # in the order of the axis, not of the names
    assert (tmp_path / "report_files" / "against-3.svg").is_file()
    assert "Of the run with guidance 4.5, the best by Fréchet distance" in words(root)
    compared = [figure for figure in root.iter(f"{XHTML}figure") if len(list(figure.iter(f"{XHTML}img"))) == 3]
    assert len(compared) == 8


def results(*changes: dict[str, object]) -> list[Result]:
    """One for each of these changes, of settings or of the model or the seeds."""
    found = []
    for change in changes:
        sampling = {"guidance": 4.5, "diffusion_steps": None, "smoothing": False}
        facts = {"model": ModelFacts("m", "f" * 64, 1), "seeds": "per-image"}
        for name, value in change.items():
            (facts if name in facts else sampling)[name] = value
        benchmark = BenchmarkFacts("tiny", "0" * 64)
        found.append(Result(benchmark, facts["model"], sampling, facts["seeds"], {}, {}, {}, 1, (), ()))
    return found


def axis(*changes: dict[str, object]) -> tuple[str, list[object]]:
    sweep = find_sweep(results(*changes), [f"run{i}" for i in range(len(changes))])
    return sweep.axis, [(place.x, place.series) if place.series else place.x for place in sweep.places]


def test_the_axis_is_the_setting_that_differs() -> None:
    assert axis({"guidance": 1.0}, {"guidance": 3.0}) == ("guidance", [1.0, 3.0])
    assert axis({"diffusion_steps": 4}, {"diffusion_steps": 8}) == ("diffusion steps", [4, 8])
    assert axis({"diffusion_steps": 4}, {}) == ("diffusion steps", [4, "the model’s own"])
    assert axis({"smoothing": True}, {}) == ("smoothing", ["on", "off"])
    assert axis({"seeds": "fixed"}, {}) == ("seeds", ["fixed", "per-image"])
    assert axis({}, {"model": ModelFacts("n", "e" * 64, 1)}) == ("model", ["m", "n"])
    assert axis({}, {"model": ModelFacts("m", "e" * 64, 1)}) == ("model", ["m ffffffff", "m eeeeeeee"])


def test_runs_alike_in_all_settings_are_told_apart_by_their_folders() -> None:
    assert axis({}, {}) == ("run", ["run0", "run1"])
    assert axis({"guidance": 1.0}, {"guidance": 1.0}, {}) == ("run", ["run0", "run1", "run2"])


def test_what_differs_beside_the_axis_makes_lines_of_its_own() -> None:
    name, places = axis(*({"guidance": g, "smoothing": s} for s in (False, True) for g in (3.0, 1.0)))
    assert name == "guidance"
    assert places == [(3.0, "smoothing off"), (1.0, "smoothing off"), (3.0, "smoothing on"), (1.0, "smoothing on")]
    sweep = find_sweep(
        results(*({"guidance": g, "smoothing": s} for s in (False, True) for g in (3.0, 1.0))), list("abcd")
    )
    assert sweep.order == [1, 0, 3, 2]


def test_plots_take_their_colours_from_the_page_and_their_texts_literally() -> None:
    bars = bar_plot([Point("a $5 & <b>", 1.0), Point("猫", 2.0)], 1.5).decode()
    lines = line_plot({"x": [Point("off", 1.0)], "y": [Point("on", 2.0)]}, "smoothing").decode()
    for svg in (bars, lines):
        ET.fromstring(svg)
        assert not re.search(r"#0101\d\d|#0102\d\d|#000000|#ffffff", svg.replace("--ground: #ffffff", ""))
        assert "currentColor" in svg
    texts = [element.text for element in ET.fromstring(bars).iter(f"{SVG}text")]
    assert {"a $5 & <b>", "猫"} <= set(texts)


# ---------------------------------------------------------------------- pictures


def test_pictures_at_random_are_drawn_by_the_seed() -> None:
    assert draw(1000, 10, 0) == draw(1000, 10, 0) != draw(1000, 10, 1)
    assert draw(5, 10, 0) == [0, 1, 2, 3, 4]


def test_best_and_worst_leave_out_what_was_not_measured() -> None:
    values = torch.tensor([0.3, torch.nan, 0.9, 0.1, 0.5])
    ends = extremes(values, 2, lower_is_better=False)
    assert (ends.best, ends.worst) == ([2, 4], [3, 0])
    ends = extremes(values, 9, lower_is_better=True)
    assert (ends.best, ends.worst) == ([3, 0], [2, 4])  # nothing is in both


def test_the_nearest_training_picture_of_a_copy_is_its_original() -> None:
    training = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0))
    found = nearest(training[[7, 3]] * 5, training, k=2)  # the cosine knows no length
    assert found.place_NK[:, 0].tolist() == [7, 3]
    assert torch.allclose(found.nearest_N, torch.ones(2))
    assert (found.similarity_NK[:, 1] < 1).all()


def test_copies_are_told_from_pictures_that_are_merely_alike() -> None:
    generator = torch.Generator().manual_seed(0)

    def fresh(count: int) -> Tensor:
        return torch.randn(count, WIDTH, generator=generator)

    training = fresh(400)
    held_out = nearest(fresh(2000), training)
    assert closeness(nearest(fresh(2000), training), held_out).share_above == pytest.approx(0.01, abs=0.01)
    half = torch.cat([fresh(200), training[:200] + 1e-4 * fresh(200)])
    found = closeness(nearest(half, training), held_out)
    assert found.share_above == pytest.approx(0.5, abs=0.02)
    assert found.held_out_in_training == 0
    assert closeness(nearest(half, training), nearest(training[:30], training)).held_out_in_training == 30


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Training pictures, and a network that sees them."""
    for i in range(5):
        (tmp_path / "train" / "deep").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2 * SIDE, SIDE), (50 * i, 90, 9)).save(tmp_path / "train" / "deep" / f"{i}.png")

    def load(name: str) -> FeatureNetwork:
        assert name == NETWORK
        weights = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
        return FeatureNetwork(name, "tiny", lambda pixels: pixels.float().mean((1, 2)) @ weights)

    monkeypatch.setattr(memorisation, "load_by_title", load)
    return tmp_path / "train"


def test_the_nearest_training_pictures_are_on_the_page(runs: Path, training: Path, tmp_path: Path) -> None:
    report(runs / "a", "--out", tmp_path / "out", "--training", training)
    root = parse(tmp_path / "out")
    (section,) = [s for s in root.iter(f"{XHTML}section") if s.attrib["id"] == "nearest-training-pictures"]
    assert "nearer to one of 5 training pictures than 99 % of 60 held-out real pictures are" in words(section)
    assert len(list(section.iter(f"{XHTML}img"))) == 2 * 6 * (1 + 3)
    assert len(list(section.iter(f"{SVG}svg"))) == 1
    rows = [[words(cell) for cell in row] for row in section.iter(f"{XHTML}tr")]
    assert [row[0] for row in rows] == ["pictures", "generated", "held-out real"]


# ---------------------------------------------------------------------- how it fails


def spoil_result(folder: Path, **facts: object) -> None:
    write_result(folder / "result.json", dataclasses.replace(read_result(folder), **facts))


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "is no folder of a run"),
    "no result": (lambda run: (run / "result.json").unlink(), "has no result.json; run `hartist evaluate` until"),
    "no figures": (lambda run: spoil_result(run, figures=()), "has no overall figure"),
    "no rows": (lambda run: shutil.rmtree(run / "rows"), "is missing beside it"),
    "no manifest": (lambda run: (run / "manifest.jsonl").unlink(), "manifest.jsonl does not exist"),
    "a damaged manifest": (lambda run: (run / "manifest.jsonl").write_text('{"file"'), "line 1 is no entry"),
    "a manifest of another place": (
        lambda run: (run / "manifest.jsonl").write_text('{"file": "../../x.png", "line": 1, "prompt": "x"}\n'),
        "points outside its folder",
    ),
    "a short manifest": (
        lambda run: (run / "manifest.jsonl").write_text((run / "manifest.jsonl").read_text().split("\n", 5)[5]),
        "lists 35 pictures, the result has 40",
    ),
    "a missing picture": (lambda run: (run / "pictures" / "0007.png").unlink(), "0007.png is missing (1 pictures"),
    "broken pictures": (
        lambda run: [path.write_bytes(b"no") for path in (run / "pictures").iterdir()],
        "cannot be read as an image",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_run_with_a_missing_piece_is_refused_in_one_line(
    name: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = SPOILT[name]
    run = shutil.copytree(runs / "a", tmp_path / "run")
    spoil(run)
    assert message in fail(capsys, run, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "report.html").exists()


def test_strangers_and_twins_are_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "other", count=8)
    assert "different settings (limit 40 → 8)" in fail(capsys, runs / "a", tmp_path / "other", "--out", tmp_path / "o")
    assert "is named twice" in fail(capsys, runs / "a", runs / "b" / ".." / "a", "--out", tmp_path / "o")


def test_flags_that_fit_no_run_are_refused(
    runs: Path, training: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert "is no folder" in fail(capsys, runs / "a", "--out", out, "--training", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no pictures" in fail(capsys, runs / "a", "--out", out, "--training", tmp_path / "empty")
    message = fail(capsys, runs / "a", "--out", out, "--training", training, "--network", "Inception")
    assert f"no features of it, but of {NETWORK}" in message
    (tmp_path / "file").write_text("x")
    assert "is a file" in fail(capsys, runs / "a", "--out", tmp_path / "file")


def test_matplotlib_is_asked_for_by_name(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'pip install "hartist[report]"' in fail(capsys, runs / "a", "--out", tmp_path / "out")
