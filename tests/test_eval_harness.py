"""The evaluation harness: seeds, interruptions, shards, recipes, and what a result says."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from evaluations import POINTS, evaluate, picture, thumbnail, use_stand_ins, write_emoji
from hartist import Pipeline, UserError
from hartist.cli import main
from hartist.evaluation.benchmarks.base import Item, fingerprint
from hartist.evaluation.benchmarks.emoji import Emoji
from hartist.evaluation.distances import fit_gaussian, frechet_distance, kernel_distance
from hartist.evaluation.features import BATCH, FeatureNetwork
from hartist.evaluation.harness import prepare
from hartist.evaluation.harness import run as run_module
from hartist.evaluation.harness.features import cached_features, steady
from hartist.evaluation.harness.generate import Shard
from hartist.evaluation.harness.plan import plan_pictures
from hartist.evaluation.harness.result import Result, read_result, read_rows
from hartist.evaluation.harness.seeds import own_seed, seed_of
from runs import finish, python
from tiny import write_tiny_text_model

FLAGS = ("--batch-size", 3, "--metrics", "frechet,kernel,precision,diversity,is,clip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("harness")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return write_tiny_text_model(folder / "tiny")


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    return write_emoji(folder / "emoji")


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    use_stand_ins(monkeypatch.setattr)


@pytest.fixture(scope="module")
def whole(model: Path, data: Path, folder: Path) -> Path:
    """A run that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        use_stand_ins(patch.setattr)
        assert evaluate(model, "emoji", data, folder / "whole", *FLAGS) == 0
    return folder / "whole"


def pictures(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "pictures").iterdir())}


def figures(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "result.json").read_text())["figures"]


def failure(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one line that an evaluation ends with which can't be done."""
    assert evaluate(*arguments) == 2
    message = capsys.readouterr().err
    assert re.fullmatch(r"(hartist: .* left out: .*\n)*hartist: error: [^\n]+\n", message), message
    return message


# --- seeds ----------------------------------------------------------------------------------------


def test_a_seed_is_what_its_definition_says() -> None:
    eight = hashlib.sha256(b"mjhq\0a caf\xc3\xa9\x002").digest()[:8]
    assert own_seed("mjhq", "a café", 2) == int.from_bytes(eight, "big") % 2**63
    assert own_seed("imagenet", 207, 0) == own_seed("imagenet", "207", 0) == 2438235139931166651


@given(st.lists(st.tuples(st.text(), st.integers(0, 99)), min_size=2, max_size=20, unique=True), st.text())
def test_seeds_differ_by_picture_and_fixed_ones_do_not(keys: list[tuple[str, int]], benchmark: str) -> None:
    items = [Item(str(i), prompt, index) for i, (prompt, index) in enumerate(keys)]
    own = [seed_of(benchmark, item) for item in items]
    assert len(set(own)) == len(items)
    assert all(0 <= seed < 2**63 for seed in own)
    assert [seed_of(benchmark, item) for item in reversed(items)] == own[::-1]
    assert [seed_of(benchmark, item, "fixed") for item in items] == [index for _, index in keys]


def test_a_limit_or_another_order_leaves_every_seed_as_it_is(data: Path) -> None:
    every = {p.id: p.seed for p in plan_pictures("emoji", Emoji(data).items(), "per-image", {})}
    some = {p.id: p.seed for p in plan_pictures("emoji", Emoji(data, limit=2).items()[::-1], "per-image", {})}
    assert len(every) == 16
    assert len(set(every.values())) == 16  # of which two have the same prompt
    assert len(some) == 6
    assert some.items() <= every.items()


def test_seeds_reach_the_pictures_whatever_the_batch(whole: Path, model: Path, data: Path, tmp_path: Path) -> None:
    assert evaluate(model, "emoji", data, tmp_path / "out", "--batch-size", 7, "--metrics", "none", "--limit", 3) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in (whole / "manifest.jsonl").read_text().splitlines()]
    seeds = {line["id"]: line["seed"] for line in before}
    index = {item.id: item.index for item in Emoji(data).items()}
    assert sorted(index.values()) == [0] * 14 + [1] * 2
    assert len(lines) == 9
    for line in lines:
        assert line["seed"] == seeds[line["id"]] == own_seed("emoji", line["prompt"], index[line["id"]])
        alone = Pipeline.from_pretrained(model, device="cpu")(line["prompt"], seed=line["seed"], smoothing=False)[0]
        with Image.open(tmp_path / "out" / line["file"]) as image:
            assert np.abs(np.asarray(image).astype(int) - np.asarray(alone)).max() <= 1


# --- interruptions and shards ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(folder: Path, model: Path, data: Path) -> Path:
    """Runs that were killed at every point, and one in two shards."""
    script = Path(__file__).with_name("evaluations.py")
    process = python(script, folder / "interrupted", model, data, *FLAGS)
    assert "Traceback" not in (output := finish(process)), output
    assert process.returncode == 0, output
    return folder / "interrupted"


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_goes_on_to_the_same_figures(
    point: str, interrupted: Path, whole: Path, model: Path, data: Path
) -> None:
    out = interrupted / point
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "pictures").glob("*.png")}
    assert len(kept) == {"first picture": 0, "picture": 5, "half a line": 3}.get(point, 16)
    assert evaluate(model, "emoji", data, out, *FLAGS) == 0
    assert figures(out) == figures(whole)
    assert pictures(out) == pictures(whole)
    assert all((out / "pictures" / name).stat().st_mtime_ns == time for name, time in kept.items())
    for path in sorted((whole / "rows").iterdir()):
        assert (out / "rows" / path.name).read_bytes() == path.read_bytes()


def test_two_shards_make_what_one_process_makes(interrupted: Path, whole: Path) -> None:
    out = interrupted / "shards"
    assert figures(out) == figures(whole)
    assert pictures(out) == pictures(whole)
    assert [path.name for path in out.glob("manifest*")] == ["manifest.jsonl"]
    lines = [json.loads(line)["id"] for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert lines == [item.id for item in Emoji(write_emoji(out / "data")).items()]


def test_torchrun_and_several_processes_make_the_same_pictures(
    whole: Path, model: Path, data: Path, tmp_path: Path
) -> None:
    flags = ["--batch-size", 3, "--metrics", "none", "-q", "--device", "cpu"]
    command = ["-m", "hartist", "evaluate", model, "--benchmark", "emoji", "--data", data, *flags]
    ranks = python(*command, "--out", tmp_path / "ranks", ranks=2)
    processes = python(*command, "--out", tmp_path / "processes", "--processes", 2)
    for process, name in ((ranks, "ranks"), (processes, "processes")):
        output = finish(process)
        assert process.returncode == 0, output
        assert pictures(tmp_path / name) == pictures(whole)


def test_the_same_command_again_costs_nothing_and_changes_nothing(
    whole: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is left to compute")

    monkeypatch.setattr(Pipeline, "generate", refuse)
    plain = prepare.load_network
    monkeypatch.setattr(prepare, "load_network", lambda *a: dataclasses.replace(plain(*a), compute=refuse))
    assert evaluate(model, "emoji", data, whole, *FLAGS) == 0
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_what_is_damaged_or_lost_is_made_again(whole: Path, model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ("--batch-size", 3, "--metrics", "frechet")
    assert evaluate(model, "emoji", data, out, *flags) == 0
    before, wanted = figures(out), pictures(out)
    (out / "pictures" / "train3.png").unlink()
    (out / "pictures" / "validation1.png").write_bytes(wanted["validation1.png"][:-9])
    (out / "result.json").unlink()
    assert evaluate(model, "emoji", data, out, *flags) == 0
    assert (figures(out), pictures(out)) == (before, wanted)


@pytest.mark.parametrize("environment", [{"RANK": "x"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "0"}])
def test_shards_that_cannot_be(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="torchrun"):
        Shard.from_environment()


def test_features_do_not_depend_on_the_batch_they_are_computed_in(tmp_path: Path) -> None:
    seen: list[int] = []

    def compute(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return pixels.float().flatten(1)[:, :5] + len(pixels)

    network = FeatureNetwork("Counting", "counting-1", compute)
    rows = [torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8) for _ in range(11)]
    every = cached_features(network, iter(rows), 11, tmp_path, "x", progress=False)
    first = cached_features(network, iter(rows[:3]), 3, None, "x", progress=False)
    assert torch.equal(first, every[:3])
    assert set(seen) == {BATCH}
    assert torch.equal(cached_features(network, iter(rows), 11, tmp_path, "x", progress=False), every)
    assert len(seen) == 3  # two batches, then one, then none
    assert torch.equal(steady(network).compute(rows[0][None]), every[:1])


# --- the recipe and the result --------------------------------------------------------------------


def test_a_result_says_how_it_came_about(whole: Path, model: Path) -> None:
    result = read_result(whole)
    assert result.benchmark.name == "emoji"
    items = Emoji(whole.parent / "emoji").items()
    assert result.benchmark.fingerprint == fingerprint(items)
    assert result.categories == ("train", "unseen_pair", "unseen_concept")
    assert (result.model.name, result.pictures, result.seeds) == ("tiny-text", 16, "per-image")
    transformer = Pipeline.from_pretrained(model).transformer
    assert result.model.parameters == sum(p.numel() for p in transformer.parameters())
    assert result.sampling["smoothing"] is False
    assert result.sampling["guidance"] == 3.0
    assert {"hartist", "torch", "python"} <= set(result.software)
    assert result.machine["batch_size"] == 3
    assert result.seconds["generation"] > 0
    assert Result.from_json(result.to_json(), "here") == result
    keys = [figure.key for figure in result.figures]
    assert len(set(keys)) == len(keys)


def test_figures_follow_from_their_rows(whole: Path) -> None:
    result = read_result(whole)
    checked = set()
    for figure in result.figures:
        if figure.rows is None:
            assert figure.kind == "other"
            continue
        rows = read_rows(whole, figure)
        chosen = torch.ones(16, dtype=torch.bool)
        if figure.category is not None:
            chosen = rows["categories"] == list(result.categories).index(figure.category)
        assert figure.count == int(chosen.sum())
        checked.add((figure.kind, figure.category is None))
        if figure.kind == "mean":
            assert figure.value == pytest.approx(rows["values"][chosen].mean().item())
            continue
        real = rows["reference"]
        if figure.category is not None:
            real = real[rows["reference_categories"] == list(result.categories).index(figure.category)]
        own = rows["generated"][chosen]
        if figure.kind == "frechet":
            assert figure.value == pytest.approx(frechet_distance(fit_gaussian(own), fit_gaussian(real)))
        else:
            assert figure.value == pytest.approx(kernel_distance(own, real))
    assert len(checked) == 6  # three kinds, overall and by category


def test_rows_are_the_features_of_the_pictures_in_the_order_of_the_items(whole: Path) -> None:
    rows = load_file(whole / "rows" / "inception-stand-in.safetensors")
    items = Emoji(whole.parent / "emoji").items()
    for i, item in enumerate(items):
        for name, path in (("generated", whole / "pictures" / f"{item.id}.png"), ("reference", item.reference)):
            with Image.open(path) as image:
                pixels = torch.from_numpy(np.array(image))[None]
            assert torch.allclose(rows[name][i], thumbnail().compute(pixels)[0])


def test_smoothing_is_off_unless_it_is_asked_for(data: Path, model: Path, tmp_path: Path) -> None:
    smooth = write_tiny_text_model(tmp_path / "smooth")
    config = json.loads((smooth / "config.json").read_text())
    text = json.dumps(config).replace('"smoothing": false', '"smoothing": true')
    (smooth / "config.json").write_text(text)
    assert Pipeline.from_pretrained(smooth).model.settings.smoothing
    common = ("emoji", data), ("--limit", 2, "--metrics", "frechet")
    assert evaluate(smooth, *common[0], tmp_path / "off", *common[1]) == 0
    assert evaluate(smooth, *common[0], tmp_path / "on", *common[1], "--smoothing") == 0
    assert read_result(tmp_path / "off").sampling["smoothing"] is False
    assert read_result(tmp_path / "on").sampling["smoothing"] is True
    assert pictures(tmp_path / "off") != pictures(tmp_path / "on")


def test_one_seed_for_all_prompts_is_told_and_seen(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(model, "emoji", data, tmp_path, "--seeds", "fixed", "--metrics", "frechet", "--limit", 3) == 0
    assert "ONE SEED" in capsys.readouterr().out
    assert read_result(tmp_path).seeds == "fixed"
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert {line["seed"] for line in lines} <= {0, 1}


def test_only_the_figures_of_inception_are_called_fid(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate(model, "emoji", data, tmp_path / "a", "--limit", 2, "--metrics", "fid,kid,is") == 0
    assert {figure.metric for figure in read_result(tmp_path / "a").figures} == {"fid", "kid", "inception_score"}
    assert "FID" in capsys.readouterr().out
    there = prepare.load_network

    def absent(name: str, device: Any) -> Any:
        if name.startswith("inception"):
            raise UserError("FID's Inception network is not here; run: curl")
        return there(name, device)

    monkeypatch.setattr(prepare, "load_network", absent)
    assert "run: curl" in failure(capsys, model, "emoji", data, tmp_path / "b", "--metrics", "fid")
    assert not (tmp_path / "b").exists()
    assert evaluate(model, "emoji", data, tmp_path / "c", "--limit", 2) == 0
    told = capsys.readouterr()
    assert "are no FID" in told.err
    assert "alignment is left out" in told.err
    assert re.search("Fréchet distance.*EfficientNet-Lite0", told.out)
    assert "FID" not in told.out
    names = {figure.metric for figure in read_result(tmp_path / "c").figures}
    assert {"frechet_distance", "kernel_distance", "diversity"} <= names
    assert "not of lite0" in failure(
        capsys, model, "emoji", data, tmp_path / "d", "--metrics", "kid", "--network", "lite0"
    )


# --- what can't be done ---------------------------------------------------------------------------


def test_a_folder_belongs_to_one_run(
    whole: Path, model: Path, data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = (whole / "result.json").read_bytes()
    for flags, part in (
        (("--seeds", "fixed"), "differs in its seeds"),
        (("--guidance", 2), "differs in its sampling"),
        (("--limit", 2), "differs in its benchmark"),
    ):
        message = failure(capsys, model, "emoji", data, whole, *FLAGS, *flags)
        assert part in message
        assert "--out" in message
    other = write_tiny_text_model(tmp_path / "other", name="other")
    assert "differs in its model" in failure(capsys, other, "emoji", data, whole, *FLAGS)
    assert (whole / "result.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--metrics", "fidd"], "no metric 'fidd'"),
        (["--metrics", ","], "no metric is named"),
        (["--metrics", "geneval"], "not on emoji"),
        (["--batch-size", "0"], "--batch-size 0 is out of range"),
        (["--processes", "0"], "--processes 0 is out of range"),
        (["--limit", "0"], "--limit 0 is out of range"),
        (["--per-prompt", "-1"], "--per-prompt -1 is out of range"),
        (["--guidance", "101"], "guidance 101.0 is outside"),
        (["--metrics", "alignment"], "--align"),
    ],
)
def test_flags_that_make_no_sense(
    flags: list[str], part: str, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert part in failure(capsys, model, "emoji", data, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_picture_of_another_size_is_refused(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--limit", 2, "--metrics", "frechet")
    make = run_module.make_missing

    def swap(out: Path, *arguments: Any, **options: Any) -> Any:
        entries = make(out, *arguments, **options)
        picture(next((out / "pictures").glob("*.png")), 1, (16, 16))
        return entries

    monkeypatch.setattr(run_module, "make_missing", swap)
    message = failure(capsys, model, "emoji", data, tmp_path / "out", *flags)
    assert "16×16, the model's pictures are 32×32" in message


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"format": "other"}, "not a result"),
        ({"version": 2}, "version 2"),
        ({"figures": [{"metric": "x"}]}, "damaged"),
        ({"seeds": "lucky"}, "damaged"),
        ({"pictures": None}, "damaged"),
        ({"figures": 3}, "damaged"),
    ],
)
def test_a_foreign_result_is_one_line(change: dict[str, Any], part: str, whole: Path, tmp_path: Path) -> None:
    values = json.loads((whole / "result.json").read_text()) | change
    (tmp_path / "result.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=part) as error:
        read_result(tmp_path)
    assert "\n" not in str(error.value)


def test_rows_outside_the_folder_are_not_read(whole: Path) -> None:
    figure = dataclasses.replace(read_result(whole).figures[0], rows="../../secret.safetensors")
    with pytest.raises(UserError, match="outside"):
        read_rows(whole, figure)


def test_the_help_of_the_command_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["evaluate", "--help"], ["evaluate", "emoji", "--help"], ["evaluate", "reconstruct", "--help"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
        text = capsys.readouterr().out
        assert "hartist evaluate" in text.partition("examples:\n")[2]
        assert max(map(len, text.splitlines())) <= 110
    assert main(["evaluate", "x", "--benchmark", "x", "--data", ".", "--out", "x", "--metrics", "?"]) == 0
    assert "frechet" in capsys.readouterr().out
