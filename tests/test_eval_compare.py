"""Intervals by resampling, held to closed forms and simulations, and `hartist compare`."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from evaluated import NAMES, NETWORK, write_run
from hartist import UserError
from hartist.cli import main
from hartist.evaluation import bootstrap
from hartist.evaluation.bootstrap import (
    Interval,
    percentile_interval,
    resampled_frechet,
    resampled_kernel,
    resampled_means,
)
from hartist.evaluation.distances import fit_gaussian, frechet_distance, kernel_distance
from hartist.evaluation.harness.result import BenchmarkFacts, Figure, read_result, write_result
from hartist.evaluation.report.comparison import Difference
from hartist.evaluation.report.wording import title

ROWS = f"rows/{NETWORK.lower().replace(' ', '-')}.safetensors"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- intervals


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation() -> None:
    values = 3 + 2 * normal(2000)
    interval = percentile_interval(resampled_means(values, resamples=4000))
    half = 1.96 * values.std().item() / len(values) ** 0.5
    assert interval.low == pytest.approx(values.mean().item() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(values.mean().item() + half, abs=0.05 * half)


def test_intervals_of_means_cover_the_truth_as_often_as_they_say() -> None:
    covered = [0.5 in percentile_interval(resampled_means(0.5 + normal(60, seed=i), resamples=400)) for i in range(400)]
    assert 0.92 <= sum(covered) / len(covered) <= 0.98  # 0.95 within 3 standard errors


def test_values_that_were_not_measured_are_left_out_of_a_mean() -> None:
    values = normal(50)
    values[10:20] = torch.nan
    resampled = resampled_means(values, resamples=3000)
    assert resampled.mean().item() == pytest.approx(values.nanmean().item(), abs=0.01)
    expected = values[~values.isnan()].std().item() / 40**0.5
    assert resampled.std().item() == pytest.approx(expected, rel=0.1)


def test_means_are_the_same_however_many_resamples_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = resampled_means(normal(64), resamples=100)
    monkeypatch.setattr(bootstrap, "BLOCK", 7 * 64)
    assert torch.allclose(whole, resampled_means(normal(64), resamples=100))


@pytest.mark.parametrize("resampled", [resampled_frechet, resampled_kernel])
def test_draws_depend_on_the_seed_alone(resampled: Callable[..., torch.Tensor]) -> None:
    x, y = normal(30, 4), normal(40, 4, seed=1)
    for both in (False, True):
        first, again, other = (resampled(x, y, resamples=20, seed=seed, resample_reference=both) for seed in (5, 5, 6))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    assert not torch.equal(first, resampled(x, y, resamples=20, seed=5))


@pytest.mark.parametrize(("count", "width"), [(40, 6), (12, 30)])
def test_the_fast_distance_of_a_half_is_the_plain_one(count: int, width: int) -> None:
    x, target = normal(count, width).double() + 0.3, fit_gaussian(normal(50, width, seed=1))
    fast = bootstrap._frechet(x, x @ target.factor_RD.T, target).item()
    assert fast == pytest.approx(frechet_distance(fit_gaussian(x), target), rel=1e-6)


def test_resampled_frechet_distances_have_the_figure_as_their_mean() -> None:
    x, y = normal(40, 6) + 0.5, normal(70, 6, seed=1)
    figure = frechet_distance(fit_gaussian(x), fit_gaussian(y))
    assert resampled_frechet(x, y, resamples=50).mean().item() == pytest.approx(figure)


@pytest.mark.parametrize(("count", "width"), [(80, 4), (24, 40)])
def test_intervals_of_frechet_distances_cover_the_distance_at_this_number_of_pictures(count: int, width: int) -> None:
    """Gaussians of known mean and spread; with fewer pictures than features as well."""
    target = normal(200, width, seed=999)

    def sample(seed: int) -> torch.Tensor:
        return 1.3 * normal(count, width, seed=seed) + 0.4

    gaussian = fit_gaussian(target)
    figures = torch.tensor([frechet_distance(fit_gaussian(sample(i)), gaussian) for i in range(200)])
    truth, spread = figures.mean().item(), figures.std().item()
    resampled = [resampled_frechet(sample(i), target, resamples=60) for i in range(80)]
    covered = sum(truth in percentile_interval(each) for each in resampled)
    assert 0.86 <= covered / len(resampled) <= 1
    widths = torch.stack([each.std() for each in resampled])
    assert widths.mean().item() == pytest.approx(spread, rel=0.2)


def test_intervals_of_kernel_distances_cover_the_truth() -> None:
    target = normal(150, 4, seed=999)
    samples = [0.4 + normal(80, 4, seed=i) for i in range(200)]
    truth = sum(kernel_distance(x, target) for x in samples) / len(samples)  # unbiased at any number of pictures
    covered = sum(truth in percentile_interval(resampled_kernel(x, target)) for x in samples)
    assert 0.88 <= covered / len(samples) <= 0.99


def test_a_resampled_kernel_distance_is_a_weighted_one_without_pairs_of_a_picture_with_itself() -> None:
    x, y = normal(9, 3).double(), normal(7, 3, seed=1).double()
    found = resampled_kernel(x, y, resamples=5, seed=3, resample_reference=True)
    w = torch.cat(list(bootstrap._draws(9, 5, 3)))
    v = torch.cat(list(bootstrap._draws(7, 5, 4)))

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / 3 + 1) ** 3

    for r in range(5):
        pairs_x, pairs_y = torch.outer(w[r], w[r]).fill_diagonal_(0), torch.outer(v[r], v[r]).fill_diagonal_(0)
        expected = (
            (pairs_x * kernel(x, x)).sum() / pairs_x.sum()
            + (pairs_y * kernel(y, y)).sum() / pairs_y.sum()
            - 2 * w[r] @ kernel(x, y) @ v[r] / 63
        )
        assert found[r].item() == pytest.approx(expected.item())


def test_pairs_cancel_what_two_runs_share() -> None:
    hard, change = normal(300), 0.05 * normal(300, seed=1) + 0.02
    a, b = resampled_means(hard), resampled_means(hard + change)
    paired, unpaired = percentile_interval(b - a), percentile_interval(b - resampled_means(hard, seed=1))
    assert paired.high - paired.low < 0.15 * (unpaired.high - unpaired.low)
    assert 0.0 not in paired
    assert 0.0 in unpaired


def test_too_few_pictures_have_no_interval() -> None:
    for call in (
        lambda: resampled_means(torch.tensor([1.0, 2.0, 3.0, torch.nan])),
        lambda: resampled_frechet(normal(3, 2), normal(9, 2)),
        lambda: resampled_kernel(normal(3, 2), normal(9, 2)),
    ):
        with pytest.raises(UserError, match="at least 4 pictures, there are 3"):
            call()


# ---------------------------------------------------------------------- compare


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "a")
    write_run(folder / "worse", shift=0.6, noise=1, settings={"guidance": 2.0})
    return folder


@pytest.fixture
def pair(runs: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies that a test may spoil."""
    return shutil.copytree(runs / "a", tmp_path / "a"), shutil.copytree(runs / "worse", tmp_path / "worse")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["compare", *map(str, arguments), "-q"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def fail(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["compare", *map(str, arguments), "-q"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    return printed.err


def test_equal_runs_differ_by_nothing(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, runs / "a", runs / "a" / "result.json", "--json", tmp_path / "c.json")
    figures = json.loads((tmp_path / "c.json").read_text())["figures"]
    assert len(figures) == len(read_result(runs / "a").figures) == 10
    for figure in figures:
        assert figure["difference"] == 0
        assert figure["interval"] == (None if figure["metric"] == "recall" else [0, 0])
        assert not figure["clear"]
    assert "the same model and settings" in printed
    assert printed.count("not clear") == 9
    assert printed.count("no interval") == 1


def test_a_worse_run_is_found_out_figure_by_figure(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = run(capsys, runs / "a", runs / "worse", "--json", tmp_path / "c.json", "--resamples", 150)
    assert "A → B: guidance 4.5 → 2" in printed
    assert printed.count("A is better") == 9
    assert "B is better" in run(capsys, runs / "worse", runs / "a", "--resamples", 50)
    values = json.loads((tmp_path / "c.json").read_text())
    assert values["resamples"] == {"means": 150, "distances": 150, "seed": 0, "reference": "fixed"}
    for figure in values["figures"]:
        assert figure["difference"] == figure["b"] - figure["a"]
        if figure["interval"] is not None:
            low, high = figure["interval"]
            assert low < figure["difference"] < high
            assert figure["clear"] is not (low <= 0 <= high)
    assert [f["category"] for f in values["figures"] if f["metric"] == "clip_score"] == [None, *NAMES]


def test_the_reference_may_be_resampled_too(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    intervals = []
    for i, flags in enumerate(([], ["--resample-reference"])):
        run(capsys, runs / "a", runs / "worse", "--json", tmp_path / f"{i}.json", "--resamples", 100, *flags)
        figures = json.loads((tmp_path / f"{i}.json").read_text())["figures"]
        intervals.append({(f["metric"], f["category"]): f["interval"] for f in figures})
    fixed, resampled = intervals
    assert fixed["clip_score", None] == resampled["clip_score", None]
    for metric in ("frechet_distance", "kernel_distance"):
        assert fixed[metric, None] != resampled[metric, None]


def test_what_only_one_run_measured_is_named(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = pair
    result = read_result(b)
    write_result(
        b / "result.json",
        dataclasses.replace(result, figures=[figure for figure in result.figures if figure.metric != "recall"]),
    )
    assert f"only in A: recall ({NETWORK})" in run(capsys, a, b, "--resamples", 20)


def test_better_is_lower_or_higher() -> None:
    def difference(better: Literal["lower", "higher"], low: float, high: float) -> str:
        a, b = (Figure("m", None, None, value, 9, better, "mean") for value in (1.0, 1 + (low + high) / 2))
        return Difference(a, b, Interval(low, high)).verdict

    assert difference("lower", -2.0, -1.0) == difference("higher", 1.0, 2.0) == "B is better"
    assert difference("lower", 1.0, 2.0) == difference("higher", -2.0, -1.0) == "A is better"
    assert difference("lower", -1.0, 2.0) == difference("lower", 0.0, 2.0) == "not clear"


def test_nothing_but_clip_is_called_clip() -> None:
    def called(metric: str, network: str | None) -> str:
        return title(Figure(metric, network, None, 0.0, 1, "higher", "mean"))

    assert called("clip_score", "CLIP ViT-L/14") == "CLIP score (CLIP ViT-L/14)"
    assert called("clip_score", "alignment heads") == "agreement with the prompt (alignment heads)"
    assert called("fid", "Inception (clean-fid resizing)") == "FID, Inception (clean-fid resizing)"


# ---------------------------------------------------------------------- compare: how it fails


def change(folder: Path, **facts: object) -> None:
    write_result(folder / "result.json", dataclasses.replace(read_result(folder), **facts))


def change_rows(folder: Path, **tensors: torch.Tensor | None) -> None:
    rows = load_file(folder / ROWS) | tensors
    save_file({name: tensor for name, tensor in rows.items() if tensor is not None}, folder / ROWS)


BENCHMARK = BenchmarkFacts("tiny", "00" * 32, {"limit": 40})
SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (lambda b: (b / "result.json").unlink(), "does not exist"),
    "damaged JSON": (lambda b: (b / "result.json").write_text('{"format": "hart'), "not readable JSON"),
    "another kind of JSON": (lambda b: (b / "result.json").write_text("[]"), "not a result of `hartist evaluate`"),
    "a figure lacks its value": (
        lambda b: (b / "result.json").write_text((b / "result.json").read_text().replace('"value"', '"valve"', 1)),
        "is damaged",
    ),
    "another benchmark": (lambda b: change(b, benchmark=dataclasses.replace(BENCHMARK, name="mjhq")), "'mjhq'"),
    "other items": (lambda b: change(b, benchmark=BENCHMARK), "different items of 'tiny'"),
    "other settings": (
        lambda b: change(b, benchmark=dataclasses.replace(read_result(b).benchmark, settings={"limit": 7})),
        "limit 40 → 7",
    ),
    "no common figure": (
        lambda b: change(b, figures=[Figure("dpg", None, None, 1.0, 4, "higher", "other")]),
        "no figure in common",
    ),
    "missing rows": (lambda b: (b / ROWS).unlink(), f"{ROWS} is missing beside it, so that Fréchet distance"),
    "cut rows": (lambda b: (b / ROWS).write_bytes((b / ROWS).read_bytes()[:100]), "not a complete safetensors file"),
    "rows without features": (lambda b: change_rows(b, generated=None), "is not what Fréchet distance"),
    "rows of fewer pictures": (lambda b: change_rows(b, generated=torch.zeros(3, 6)), "3 rows for 40 pictures"),
    "rows of another run": (lambda b: change_rows(b, generated=normal(40, 6)), "they are of different runs"),
    "other real pictures": (lambda b: change_rows(b, reference=normal(60, 6)), "different real pictures"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_result_is_refused_in_one_line(
    name: str, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = SPOILT[name]
    spoil(pair[1])
    assert message in fail(capsys, *pair, "--resamples", 20)


@pytest.mark.parametrize("flags", [["--resamples", "3"], ["--resamples", "many"], ["--seed", "-1"]])
def test_flags_out_of_range_are_refused(flags: list[str], runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["compare", str(runs / "a"), str(runs / "a"), *flags])
    assert "is no number from" in capsys.readouterr().err
