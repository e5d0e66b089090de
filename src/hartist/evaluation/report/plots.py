"""Plots as SVG, drawn by matplotlib and coloured by the page: figures against a setting, by category, histograms

Matplotlib is given colours that stand for CSS variables, which are put in their place afterwards: one drawing then
suits a light page and a dark one, and its texts stay texts.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from hartist.errors import UserError
from hartist.evaluation.bootstrap import Interval
from hartist.evaluation.report.style import COLOURS, PLOT_STYLE

TEXT, LINE = "#010101", "#010102"
SERIES = tuple(f"#0102{i:02x}" for i in range(len(COLOURS)))
"""Stand for the variables --series-0 and so on."""
VARIABLES = {TEXT: "currentColor", LINE: "var(--line)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)
}
WIDTH = 4.6
"""Inches of 72 points: about a phone's width, where it is shown at its own size."""
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hartist",  # the same ids every time
    "text.parse_math": False,  # a dollar is a dollar
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "text.color": TEXT,
    "xtick.color": LINE,
    "xtick.labelcolor": TEXT,
    "ytick.color": LINE,
    "ytick.labelcolor": TEXT,
}


@dataclass(frozen=True)
class Point:
    """One value over `x`, a number or a name, with its interval if there is one."""

    x: float | str
    value: float
    interval: Interval | None = None


def require_matplotlib() -> None:
    """Raise a UserError with the command that installs it unless matplotlib can be imported."""
    try:
        import_module("matplotlib.figure")
    except ImportError as error:
        raise UserError(
            f'the plots of a report need matplotlib ({error}); run: pip install "hartist[report]"'
        ) from error


def line_plot(series: Mapping[str, Sequence[Point]], x_label: str) -> bytes:
    """A line a series, with intervals as bars. Positions are even unless every x is a number."""
    points = [point for line in series.values() for point in line]
    names = None if all(isinstance(point.x, int | float) for point in points) else _unique(points)

    def draw(axes: Any) -> None:
        for i, (name, line) in enumerate(series.items()):
            x = [names.index(point.x) if names is not None else point.x for point in line]
            style = {"color": SERIES[i % len(SERIES)], "label": name or None}
            axes.plot(x, [point.value for point in line], marker="o", markersize=4, linewidth=1.6, **style)
            _whiskers(axes, x, line, SERIES[i % len(SERIES)])
        if names is not None:
            axes.set_xticks(range(len(names)), [str(name) for name in names])
        axes.set_xlabel(x_label)
        if len(series) > 1:
            axes.legend(fontsize=8.5)

    return _svg(draw, 3.1)


def bar_plot(points: Sequence[Point], overall: float | None = None) -> bytes:
    """Horizontal bars from 0, one a category, the first on top; a line marks the overall figure."""

    def draw(axes: Any) -> None:
        places = range(len(points))
        axes.barh(places, [point.value for point in points], height=0.62, color=SERIES[0], alpha=0.8)
        _whiskers(axes, list(places), points, TEXT, horizontal=True)
        axes.set_yticks(places, [_short(str(point.x)) for point in points])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        if overall is not None:
            axes.axvline(overall, color=SERIES[1], linewidth=1.4, linestyle="--", label="overall")
            axes.legend(fontsize=8.5, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)

    return _svg(draw, 0.7 + 0.27 * len(points))


def histogram(values: Mapping[str, Sequence[float]], x_label: str) -> bytes:
    """Shares of several sets of values in the same bins."""
    low, high = min(map(min, values.values())), max(map(max, values.values()))
    width = max(high - low, 1e-6) / 30
    bins = [low + i * width for i in range(31)]

    def draw(axes: Any) -> None:
        for i, (name, each) in enumerate(values.items()):
            colour, weights = SERIES[i % len(SERIES)], [100 / len(each)] * len(each)
            axes.hist(each, bins=bins, weights=weights, histtype="stepfilled", color=colour, alpha=0.25)
            axes.hist(each, bins=bins, weights=weights, histtype="step", color=colour, linewidth=1.6, label=name)
        axes.set_xlabel(x_label)
        axes.set_ylabel("pictures (%)")
        axes.legend(fontsize=8.5, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)

    return _svg(draw, 3.1)


def _unique(points: Sequence[Point]) -> list[float | str]:
    return list(dict.fromkeys(point.x for point in points))


def _whiskers(axes: Any, places: Sequence[Any], points: Sequence[Point], colour: str, horizontal: bool = False) -> None:
    ends = [(place, p.interval) for place, p in zip(places, points, strict=True) if p.interval is not None]
    if ends:
        at, low, high = [place for place, _ in ends], [i.low for _, i in ends], [i.high for _, i in ends]
        (axes.hlines if horizontal else axes.vlines)(at, low, high, color=colour, linewidth=1.3)


def _short(name: str, length: int = 26) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _svg(draw: Callable[[Any], None], height: float) -> bytes:
    require_matplotlib()
    matplotlib, drawing = import_module("matplotlib"), import_module("matplotlib.figure")
    buffer = io.StringIO()
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that the font lacks is only measured with it, not drawn
        figure = drawing.Figure(figsize=(WIDTH, height))
        draw(figure.subplots())
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = re.sub("|".join(VARIABLES), lambda found: VARIABLES[found[0]], buffer.getvalue())
    svg = svg.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans', sans-serif")
    return svg.replace("<defs>", f"<style>{PLOT_STYLE}</style>\n<defs>", 1).encode("utf-8")
