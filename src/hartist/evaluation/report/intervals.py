"""From a result's figures to resampled ones: reading their rows and drawing from them"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float64
from torch import Tensor

from hartist.errors import UserError
from hartist.evaluation.bootstrap import (
    DISTANCE_RESAMPLES,
    RESAMPLES,
    SMALLEST,
    Interval,
    figure_of,
    percentile_interval,
    resampled_frechet,
    resampled_kernel,
    resampled_means,
)
from hartist.evaluation.harness.result import Figure, Result, read_rows
from hartist.evaluation.report.wording import title

TOLERANCE = 1e-3
"""Relative difference between a figure and what its rows give, above which the two don't belong together."""
FLOOR = 1e-6
"""The same for figures near 0."""


@dataclass(frozen=True)
class Resampling:
    """How intervals are made."""

    resamples: int | None = None
    """None is RESAMPLES of means and DISTANCE_RESAMPLES of distances."""
    seed: int = 0
    resample_reference: bool = False
    progress: bool = False

    def count(self, figure: Figure) -> int:
        return self.resamples or (RESAMPLES if figure.kind == "mean" else DISTANCE_RESAMPLES)


@dataclass(frozen=True)
class Rows:
    """What one figure was computed from: values, or features of both sides."""

    values_N: Tensor | None = None
    generated_ND: Tensor | None = None
    reference_MD: Tensor | None = None


@dataclass
class ResultRows:
    """A result and its files of rows, each read once."""

    path: Path
    """Of the result, or of its folder."""
    result: Result
    _files: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def require(self, figures: Sequence[Figure]) -> None:
        """Raise a UserError that names the missing files of rows, and the figures that can't be resampled."""
        missing: dict[str, list[str]] = {}
        for figure in figures:
            if figure.kind != "other" and figure.rows is not None and not (self.folder / figure.rows).is_file():
                missing.setdefault(figure.rows, []).append(title(figure))
        if missing:
            titles = ", ".join(dict.fromkeys(name for names in missing.values() for name in names))
            raise UserError(
                f"{self.path}: {', '.join(missing)} is missing beside it, so that {titles} cannot be resampled; "
                "copy the whole folder of the run"
            )

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def file(self, figure: Figure) -> dict[str, Tensor]:
        """The tensors that a figure's rows are in. Raises UserError if they don't fit the result."""
        name = str(figure.rows)
        if name not in self._files:
            tensors = read_rows(self.path, figure)
            for key in ("values", "generated"):
                if key in tensors and len(tensors[key]) != self.result.pictures:
                    raise UserError(
                        f"{self.path}: {name} has {len(tensors[key])} rows for {self.result.pictures} pictures; "
                        "it belongs to another run: copy the right one or evaluate again"
                    )
            self._files[name] = tensors
        return self._files[name]

    def of(self, figure: Figure) -> Rows:
        """A figure's own rows, those of its category. Raises UserError if they are not what the figure needs."""
        tensors = self.file(figure)
        try:
            if figure.kind == "mean":
                return Rows(values_N=self._own(figure, tensors["values"], tensors["categories"]))
            reference = tensors["reference"]
            if "reference_categories" in tensors:
                reference = self._own(figure, reference, tensors["reference_categories"])
            return Rows(
                generated_ND=self._own(figure, tensors["generated"], tensors["categories"]), reference_MD=reference
            )
        except (KeyError, ValueError, IndexError) as error:
            raise UserError(
                f"{self.path}: {figure.rows} is not what {title(figure)} was computed from ({error}); evaluate again"
            ) from error

    def _own(self, figure: Figure, rows: Tensor, categories: Tensor) -> Tensor:
        if figure.category is None:
            return rows
        return rows[categories == list(self.result.categories).index(figure.category)]

    def resample(self, figure: Figure, how: Resampling) -> Float64[Tensor, " r"] | None:
        """Resampled values of a figure; None if it has no rows or too few pictures.

        Raises UserError if its rows are missing, damaged, or give another figure.
        """
        if figure.kind == "other" or figure.rows is None or figure.count < SMALLEST:
            return None
        rows = self.of(figure)
        count = how.count(figure)
        if figure.kind == "mean":
            assert rows.values_N is not None
            self._check(figure, rows.values_N.double().nanmean().item())
            return resampled_means(rows.values_N, resamples=count, seed=how.seed)
        assert rows.generated_ND is not None
        assert rows.reference_MD is not None
        if len(rows.reference_MD) < SMALLEST:
            return None
        self._check(figure, figure_of(figure.kind, rows.generated_ND, rows.reference_MD))
        resampled = resampled_frechet if figure.kind == "frechet" else resampled_kernel
        return resampled(
            rows.generated_ND,
            rows.reference_MD,
            resamples=count,
            seed=how.seed,
            resample_reference=how.resample_reference,
            progress=how.progress,
        )

    def interval(self, figure: Figure, how: Resampling) -> Interval | None:
        """The interval of a figure, as `resample` gives it."""
        resampled = self.resample(figure, how)
        return None if resampled is None else percentile_interval(resampled)

    def _check(self, figure: Figure, value: float) -> None:
        if not abs(value - figure.value) <= TOLERANCE * max(abs(value), abs(figure.value)) + FLOOR:
            raise UserError(
                f"{self.path}: {figure.rows} gives {value:.6g} for {title(figure)}, the result says "
                f"{figure.value:.6g}; they are of different runs: evaluate again"
            )


def same_reference(a: ResultRows, b: ResultRows, figure: Figure) -> bool:
    """Whether a distance of two runs was taken to the same real pictures, up to rounding on other machines."""
    x, y = (rows.file(figure_in(rows.result, figure)).get("reference") for rows in (a, b))
    if x is None or y is None or x.shape != y.shape:
        return False
    return bool(torch.allclose(x, y, rtol=1e-2, atol=1e-2 * float(x.std())))


def figure_in(result: Result, figure: Figure) -> Figure:
    """The figure of the same key. Raises KeyError if the result has none."""
    return {other.key: other for other in result.figures}[figure.key]
