"""Two runs of one benchmark, figure by figure: by how much they differ, and whether that is more than chance

Both made pictures of the same items, so the difference is resampled in pairs: what makes an item hard is in both runs
and cancels. A difference is called clear if its 95 % interval has no 0 in it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hartist.errors import UserError, quoted
from hartist.evaluation.bootstrap import DISTANCE_RESAMPLES, LEVEL, RESAMPLES, Interval, percentile_interval
from hartist.evaluation.harness.result import Figure, Result, read_result
from hartist.evaluation.report.intervals import Resampling, ResultRows, same_reference
from hartist.evaluation.report.wording import interval_text, number, setting_text, title, titled

FORMAT, VERSION = "hartist-comparison", 1


@dataclass(frozen=True)
class Difference:
    """One figure of both runs."""

    a: Figure
    b: Figure
    interval: Interval | None
    """Of b − a; None where the figure can't be resampled."""

    @property
    def value(self) -> float:
        return self.b.value - self.a.value

    @property
    def is_clear(self) -> bool:
        return self.interval is not None and 0.0 not in self.interval

    @property
    def verdict(self) -> str:
        """In words: who is better, if that is clear."""
        if self.interval is None:
            return "no interval"
        if not self.is_clear:
            return "not clear"
        return "B is better" if (self.value < 0) == (self.a.better == "lower") else "A is better"


@dataclass(frozen=True)
class Comparison:
    """All figures that both runs have."""

    a: Result
    b: Result
    how: Resampling
    differences: tuple[Difference, ...]
    only_a: tuple[Figure, ...]
    only_b: tuple[Figure, ...]

    def to_json(self) -> dict[str, Any]:
        """Of the whole comparison; what the results say of themselves is shortened to what tells them apart."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "benchmark": dataclasses.asdict(self.a.benchmark),
            "a": facts(self.a),
            "b": facts(self.b),
            "level": LEVEL,
            "resamples": {
                "means": self.how.resamples or RESAMPLES,
                "distances": self.how.resamples or DISTANCE_RESAMPLES,
                "seed": self.how.seed,
                "reference": "resampled" if self.how.resample_reference else "fixed",
            },
            "figures": [
                {
                    "metric": each.a.metric,
                    "network": each.a.network,
                    "category": each.a.category,
                    "better": each.a.better,
                    "a": each.a.value,
                    "b": each.b.value,
                    "difference": each.value,
                    "interval": None if each.interval is None else [each.interval.low, each.interval.high],
                    "clear": each.is_clear,
                }
                for each in self.differences
            ],
        }


def compare(a_path: Path, b_path: Path, how: Resampling) -> Comparison:
    """Compare two results, given as files or folders; `how.progress` shows a bar over the figures.

    Raises UserError, in one line, for what is no result, results of different benchmarks, results without a common
    figure, rows that are missing or of other runs, and distances to different real pictures.
    """
    a, b = (ResultRows(path, read_result(path)) for path in (a_path, b_path))
    check_same_benchmark(a, b)
    theirs = {figure.key: figure for figure in b.result.figures}
    shared = [(figure, theirs[figure.key]) for figure in a.result.figures if figure.key in theirs]
    if not shared:
        raise UserError(f"{a_path} and {b_path} have no figure in common; evaluate both with the same metrics")
    for rows, figures in ((a, [x for x, _ in shared]), (b, [y for _, y in shared])):
        rows.require(figures)
    differences = []
    with tqdm(shared, desc="comparing", unit="figure", leave=False, disable=None if how.progress else True) as bar:
        for x, y in bar:
            bar.set_postfix_str(title(x)[:30])
            differences.append(Difference(x, y, _interval(a, x, b, y, how)))
    keys = {x.key for x, _ in shared}
    return Comparison(
        a.result,
        b.result,
        how,
        tuple(differences),
        *(tuple(figure for figure in rows.result.figures if figure.key not in keys) for rows in (a, b)),
    )


def check_same_benchmark(a: ResultRows, b: ResultRows) -> None:
    """Raise a UserError if two results are not of the same items under the same settings."""
    one, two = a.result.benchmark, b.result.benchmark
    if one.name != two.name:
        raise UserError(
            f"{a.path} is of the benchmark {quoted(one.name)}, {b.path} of {quoted(two.name)}; take two of the same"
        )
    changed = changes(one.settings, two.settings)
    if changed:
        raise UserError(
            f"{a.path} and {b.path} measure {quoted(one.name)} with different settings ({'; '.join(changed)}); "
            "evaluate one of them again"
        )
    if one.fingerprint != two.fingerprint or a.result.pictures != b.result.pictures:
        raise UserError(
            f"{a.path} and {b.path} are of different items of {quoted(one.name)} (fingerprints {one.fingerprint[:12]} "
            f"and {two.fingerprint[:12]}); evaluate one of them again on the other's data"
        )


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What differs between two groups of settings, in words."""
    names = dict.fromkeys([*a, *b])
    return [
        f"{name.replace('_', ' ')} {setting_text(a.get(name))} → {setting_text(b.get(name))}"
        for name in names
        if json.dumps(a.get(name)) != json.dumps(b.get(name))
    ]


def facts(result: Result) -> dict[str, Any]:
    """What tells a run from others of its benchmark."""
    return {
        "model": dataclasses.asdict(result.model),
        "sampling": dict(result.sampling),
        "seeds": result.seeds,
        "software": dict(result.software),
    }


def _interval(a: ResultRows, x: Figure, b: ResultRows, y: Figure, how: Resampling) -> Interval | None:
    if (x.kind, x.better) != (y.kind, y.better):
        raise UserError(f"{title(x)} is a {x.kind} in {a.path} and a {y.kind} in {b.path}; evaluate one of them again")
    if x.kind in ("frechet", "kernel") and x.rows and y.rows and not same_reference(a, b, x):
        raise UserError(
            f"{title(x)} was taken to different real pictures in {a.path} and {b.path}; "
            "evaluate one of them again with the other's data"
        )
    resampled = [rows.resample(figure, how) for rows, figure in ((a, x), (b, y))]
    if resampled[0] is None or resampled[1] is None:
        return None
    return percentile_interval(resampled[1] - resampled[0])


# ----------------------------------------------------------------- a table


def format_comparison(comparison: Comparison, a_name: str, b_name: str) -> str:
    """What differs in the settings, then a row a figure, its categories below it, then what the columns are."""
    a, b = comparison.a, comparison.b
    changed = changes(
        {"model": a.model.name, "weights": a.model.fingerprint[:12], "seeds": a.seeds, **a.sampling},
        {"model": b.model.name, "weights": b.model.fingerprint[:12], "seeds": b.seeds, **b.sampling},
    )
    lines = [
        f"{a.benchmark.name}, {a.pictures} pictures each",
        f"A  {a_name}: {a.model.name}",
        f"B  {b_name}: {b.model.name}",
        f"A → B: {'; '.join(changed) if changed else 'the same model and settings'}",
        "",
    ]
    head = ("", "A", "B", "B − A", "95 % interval", "")
    rows = [head]
    for each in by_figure(comparison.differences):
        name = f"  {each.a.category}" if each.a.category is not None else titled(each.a)
        rows.append(
            (
                name,
                number(each.a.value),
                number(each.b.value),
                number(each.value, signed=True),
                interval_text(each.interval, signed=True),
                each.verdict,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3, 4)), row[5]]
        lines.append("  ".join(cells).rstrip())
    lines += ["", *_explanation(comparison)]
    return "\n".join(lines)


def by_figure(differences: tuple[Difference, ...]) -> list[Difference]:
    """Each overall figure before its categories."""
    order = {key: i for i, key in enumerate(dict.fromkeys(each.a.key[:2] for each in differences))}
    return sorted(differences, key=lambda each: (order[each.a.key[:2]], each.a.category is not None))


def _explanation(comparison: Comparison) -> list[str]:
    how, resampled = comparison.how, [each for each in comparison.differences if each.interval is not None]
    reference = "real pictures resampled as well" if how.resample_reference else "real pictures fixed"
    lines = [
        "↓ the lower the better, ↑ the higher the better",
        f"interval: {how.resamples or RESAMPLES} resamples of the pictures, in pairs; distances "
        f"{how.resamples or DISTANCE_RESAMPLES}, {reference}",
    ]
    if len(resampled) > 1:
        lines.append(
            f"clear: no 0 in the interval; of {len(resampled)} figures without any difference about "
            f"{(1 - LEVEL) * len(resampled):.1g} would look clear by chance"
        )
    for name, figures in (("A", comparison.only_a), ("B", comparison.only_b)):
        if figures:
            lines.append(f"only in {name}: {', '.join(dict.fromkeys(title(figure) for figure in figures))}")
    return lines
