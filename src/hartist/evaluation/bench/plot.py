"""A benchmark as a figure: seconds part by part against the roofline, or cost against size and batch"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hartist.errors import UserError
from hartist.evaluation.bench.growth import QUANTITIES, Growth
from hartist.evaluation.bench.run import BenchResult
from hartist.files import atomic_path

FORMATS = (".png", ".svg", ".pdf")
DRAWN = ("transformer, s", "residual, s", "decoder, s", "total, s")


def require_plot(target: Path) -> None:
    """Raise a UserError unless a figure can be drawn into a file of this name."""
    if target.suffix.lower() not in FORMATS:
        raise UserError(f"a plot is written as {', '.join(FORMATS)}, not {target.name!r}; rename it")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'hartist[report]'") from error


def plot_bench(result: BenchResult, target: Path) -> None:
    """Bars: seconds of every part, and beside them the share of the machine's peak if that was measured."""
    timing = result.timing
    names = [*result.scale_names, "residual", "decoder"]
    parts = [*timing.scales, timing.residual, timing.decode]
    figure, axes = _figure(2 if result.shares else 1)
    errors = [[p.median - p.low for p in parts], [p.high - p.median for p in parts]]
    axes[0].barh(names, [p.median for p in parts], xerr=errors, color="#4477aa", capsize=2)
    axes[0].set_xlabel("seconds (median, lowest to highest)")
    if result.peak is not None:
        shares = [share for share in result.shares if share.part != "between"]
        axes[1].barh([share.part for share in shares], [100 * share.share for share in shares], color="#cc6677")
        axes[1].set_xlabel(f"% of the peak, {result.peak.flops_per_second / 1e9:.0f} GFLOP/s")
        layers = 100 * result.peak.layers_flops_per_second / result.peak.flops_per_second
        axes[1].axvline(layers, color="black", lw=1, label="the linear layers of a block alone")
        axes[1].legend(fontsize="small")
    for axis in axes:
        axis.invert_yaxis()
    h, w = result.image_size
    figure.suptitle(f"{result.settings.model or result.settings.preset}, {h}×{w} px, {result.dtype}")
    _save(figure, target)


def plot_growth(growths: Sequence[Growth], target: Path) -> None:
    """Lines on logarithmic axes: seconds against pixels and against batch, with the fitted powers."""
    figure, axes = _figure(len(growths))
    for axis, growth in zip(axes, growths, strict=True):
        for name in DRAWN:
            if name in growth.exponents:
                values = [QUANTITIES[name](result) for result in growth.results]
                label = f"{name.removesuffix(', s')} ~ {growth.over}^{growth.exponents[name]:.2f}"
                axis.loglog(growth.amounts(), values, "o-", label=label)
        axis.set_xlabel("pixels of a picture" if growth.over == "pixels" else "pictures in a batch")
        axis.set_ylabel("seconds")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(fontsize="small")
    settings = growths[0].results[0].settings
    figure.suptitle(f"{settings.model or settings.preset}, {growths[0].results[0].dtype}")
    _save(figure, target)


def _figure(columns: int) -> tuple[Any, Sequence[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * columns, 5), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's settings say
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _save(figure: Any, target: Path) -> None:
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format=target.suffix[1:].lower(), dpi=120)
