"""From runs to the page that tells of them"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from hartist.evaluation.bootstrap import DISTANCE_RESAMPLES, RESAMPLES, Interval
from hartist.evaluation.harness.result import Figure
from hartist.evaluation.report import memorisation_section, plots
from hartist.evaluation.report.content import (
    Card,
    Gallery,
    Page,
    Part,
    Plots,
    Section,
    Shown,
    Table,
    Text,
    Tile,
    Tiles,
)
from hartist.evaluation.report.intervals import Resampling
from hartist.evaluation.report.options import Options
from hartist.evaluation.report.runs import Run
from hartist.evaluation.report.samples import Assets, draw, extremes
from hartist.evaluation.report.sweep import Sweep, find_sweep
from hartist.evaluation.report.wording import interval_text, number, setting_text, title, titled

MOST_BARS = 40
"""Categories that a plot has room for."""
ENDS = 6
"""Best and worst pictures of each metric."""
COMPARED = 8
"""Prompts whose pictures are shown of every run, where there are several."""


@dataclass(frozen=True)
class Measured:
    """A figure and its interval."""

    figure: Figure
    interval: Interval | None


Key = tuple[str, str | None, str | None]
Found = Sequence[dict[Key, Measured]]
"""Of each run, its figures by key."""


def build_page(runs: Sequence[Run], options: Options) -> Page:
    """Everything about the runs, which are of one benchmark. Raises UserError for broken pictures and foreign rows."""
    plots.require_matplotlib()
    sweep = find_sweep([run.result for run in runs], [run.folder.name for run in runs])
    order = sweep.order
    runs = [runs[i] for i in order]
    sweep = dataclasses.replace(sweep, places=[sweep.places[i] for i in order])
    assets = Assets()
    memorised = memorisation_section.prepare(runs, options)  # first, because a network may be missing
    measured = measure(runs, options.resampling)
    several = len(runs) > 1
    names = [f"{sweep.axis} {place.label}" for place in sweep.places] if several else [""]
    best = _best(measured)
    note = [Text(f"Of the run with {names[best]}, the best by {title(_overall(measured)[0])}.")] if several else []
    sections = [_figures(measured, sweep, assets)]
    sections += _categories(measured[best], note, assets)
    sections.append(_samples(runs, sweep, options, assets))
    sections += _ends(runs[best], note, assets)
    if memorised is not None:
        sections.append(memorisation_section.section(runs, names, best, memorised, options, assets))
    sections.append(_recipe(runs, names, options.resampling))
    first = runs[0].result
    models = list(dict.fromkeys(run.result.model.name for run in runs))
    heading = options.title or f"{first.benchmark.name}: {', '.join(models)}"
    count = f"{len(runs)} runs of {first.pictures} pictures" if len(runs) > 1 else f"{first.pictures} pictures"
    return Page(heading, f"Benchmark {first.benchmark.name}, {count}", sections, assets.files)


def measure(runs: Sequence[Run], how: Resampling) -> Found:
    """The figures of each run with their intervals, by key."""
    work = [(i, figure) for i, run in enumerate(runs) for figure in run.result.figures]
    found: list[dict[Key, Measured]] = [{} for _ in runs]
    for i, figure in tqdm(work, desc="resampling", unit="figure", leave=False, disable=None if how.progress else True):
        found[i][figure.key] = Measured(figure, runs[i].rows.interval(figure, how))
    return found


def _best(measured: Found) -> int:
    """The best run by the first overall figure: what there is room for of one run only is shown of this one."""
    figures = _overall(measured)
    if not figures:
        return 0
    sign = 1 if figures[0].better == "lower" else -1
    found = {i: sign * run[figures[0].key].figure.value for i, run in enumerate(measured) if figures[0].key in run}
    return min(found, key=lambda i: found[i])


def _overall(measured: Found) -> list[Figure]:
    """One figure of every overall metric that any run has."""
    return list({key: each.figure for run in measured for key, each in run.items() if key[2] is None}.values())


def _figures(measured: Found, sweep: Sweep, assets: Assets) -> Section:
    figures = _overall(measured)
    if len(measured) == 1:
        tiles = []
        for figure in figures:
            each = measured[0][figure.key]
            detail = interval_text(each.interval) or f"{figure.count} pictures"
            tiles.append(Tile(titled(figure), number(figure.value), detail))
        note = "Below each figure its 95 % interval. ↓ the lower the better, ↑ the higher the better."
        return Section("Figures", [Tiles(tiles), Text(note)])
    head = [sweep.axis, *map(titled, figures)]
    if any(place.series for place in sweep.places):
        head[0] = f"{sweep.axis}, and what else differs"
    rows = []
    for place, run in zip(sweep.places, measured, strict=True):
        cells = []
        for figure in figures:
            cells.append(_with_interval(run.get(figure.key)))
        rows.append([place.label, *cells])
    drawn = []
    for i, figure in enumerate(figures):
        series: dict[str, list[plots.Point]] = {}
        for place, run in zip(sweep.places, measured, strict=True):
            if figure.key in run:
                each = run[figure.key]
                series.setdefault(place.series, []).append(plots.Point(place.x, each.figure.value, each.interval))
        name = assets.plot(f"against-{i}", plots.line_plot(series, sweep.axis))
        drawn.append(Shown(name, f"{title(figure)} against {sweep.axis}", f"{titled(figure)} against {sweep.axis}"))
    note = "In brackets and as vertical bars: 95 % intervals. ↓ the lower the better, ↑ the higher the better."
    return Section(f"Figures against {sweep.axis}", [Plots(drawn), Table(head, rows), Text(note)])


def _categories(run: dict[Key, Measured], note: Sequence[Text], assets: Assets) -> list[Section]:
    """Bars and a table by category, of one run: the others' are in their own reports."""
    by_metric: dict[tuple[str, str | None], list[Measured]] = {}
    for key, each in run.items():
        if key[2] is not None:
            by_metric.setdefault(key[:2], []).append(each)
    if not by_metric:
        return []
    drawn = []
    for i, (metric, group) in enumerate(by_metric.items()):
        if len(group) > MOST_BARS:
            continue
        overall = run.get((*metric, None))
        points = [plots.Point(str(each.figure.category), each.figure.value, each.interval) for each in group]
        first = group[0].figure
        if overall is None or first.kind == "frechet":  # which rises as pictures get fewer
            svg = plots.bar_plot(points)
        else:
            svg = plots.bar_plot(points, overall.figure.value)
        drawn.append(Shown(assets.plot(f"categories-{i}", svg), f"{title(first)} by category", titled(first)))
    categories = list(dict.fromkeys(each.figure.category for group in by_metric.values() for each in group))
    rows = []
    for category in categories:
        cells = [str(category)]
        for metric in by_metric:
            cells.append(_with_interval(run.get((*metric, category))))
        rows.append(cells)
    head = ["category", *(titled(group[0].figure) for group in by_metric.values())]
    parts: list[Part] = [Plots(drawn), Table(head, rows)]
    if any(group[0].figure.kind == "frechet" for group in by_metric.values()):
        parts.append(
            Text(
                "A Fréchet distance rises as pictures get fewer, so those of categories are not to be held against the "
                "overall one, but against the same category of another run."
            )
        )
    return [Section("By category", [*note, *parts])]


def _with_interval(each: Measured | None) -> str:
    if each is None:
        return ""
    return number(each.figure.value) + (f" ({interval_text(each.interval)})" if each.interval else "")


def _samples(runs: Sequence[Run], sweep: Sweep, options: Options, assets: Assets) -> Section:
    """Pictures of the same items by every run."""
    several = len(runs) > 1
    places = draw(len(runs[0].pictures), COMPARED if several else options.samples, options.resampling.seed)
    labels = [place.label if several else "" for place in sweep.places]
    note = f"Drawn with the seed {options.resampling.seed}" + (f"; below each its {sweep.axis}." if several else ".")
    cards = [
        Card(
            [
                Shown(assets.picture(run.pictures[i].path), run.pictures[i].prompt, name)
                for run, name in zip(runs, labels, strict=True)
            ],
            runs[0].pictures[i].prompt,
        )
        for i in places
    ]
    return Section("Pictures at random", [Text(note), Gallery(cards)])


def _ends(run: Run, note: Sequence[Text], assets: Assets) -> list[Section]:
    """The best and the worst pictures by each metric that has a value a picture, of one run."""
    sections = []
    for figure in run.result.figures:
        if figure.kind != "mean" or figure.category is not None or figure.rows is None:
            continue
        values_N = run.rows.of(figure).values_N
        assert values_N is not None
        ends = extremes(values_N, ENDS, lower_is_better=figure.better == "lower")
        parts: list[Part] = [*note]
        for what, places in (("The best:", ends.best), ("The worst:", ends.worst)):
            cards = [
                Card(
                    [Shown(assets.picture(run.pictures[i].path), run.pictures[i].prompt)],
                    run.pictures[i].prompt,
                    number(values_N[i].item()),
                )
                for i in places
            ]
            parts += [Text(what), Gallery(cards)]
        if ends.best:
            sections.append(Section(f"Best and worst by {title(figure)}", parts))
    return sections


def _recipe(runs: Sequence[Run], names: Sequence[str], how: Resampling) -> Section:
    """What it takes to get the figures again; the facts that all runs share stand once."""
    columns = [_facts(run) for run in runs]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    shared = [key for key in keys if len({column.get(key) for column in columns}) == 1]
    parts: list[Part] = [Table(["all runs" if names[0] else "", ""], [[k, columns[0][k]] for k in shared], False)]
    own = [key for key in keys if key not in shared]
    if own:
        parts.insert(0, Table(["", *names], [[key, *(c.get(key, "") for c in columns)] for key in own], numeric=False))
    reference = "resampled as well" if how.resample_reference else "fixed"
    parts.append(
        Text(
            f"Intervals: {how.resamples or RESAMPLES} resamples of the pictures for means, "
            f"{how.resamples or DISTANCE_RESAMPLES} for distances, the real pictures {reference}; seed {how.seed}."
        )
    )
    return Section("Settings, versions and hashes", parts)


def _facts(run: Run) -> dict[str, str]:
    result = run.result
    facts = {
        "model": result.model.name,
        "parameters": f"{result.model.parameters:,}",
        "model’s fingerprint": result.model.fingerprint,
        "benchmark’s fingerprint": result.benchmark.fingerprint,
        "seeds": {"per-image": "one for each picture", "fixed": "the same for every prompt"}[result.seeds],
    }
    groups = {"benchmark": result.benchmark.settings, "": result.sampling, "software": result.software}
    for name, group in ({**groups, "machine": result.machine}).items():
        prefix = f"{name}: " if name else ""
        facts |= {f"{prefix}{key.replace('_', ' ')}": setting_text(value) for key, value in group.items()}
    return facts | {f"seconds of {name}": f"{seconds:.1f}" for name, seconds in result.seconds.items()}
