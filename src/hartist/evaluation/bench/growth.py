"""Cost as work grows: the same benchmark over resolutions and batches, and the power of each that fits"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hartist.errors import UserError
from hartist.evaluation.bench.run import BenchResult, BenchSettings, run_bench, to_json

QUANTITIES: dict[str, Callable[[BenchResult], float]] = {
    "transformer, s": lambda r: r.timing.transformer.median,
    "residual, s": lambda r: r.timing.residual.median,
    "decoder, s": lambda r: r.timing.decode.median,
    "total, s": lambda r: r.timing.total.median,
    "MACs": lambda r: r.work.total.total,
    "of which attention": lambda r: r.work.total.attention,
    "peak memory": lambda r: float(memory_bytes(r)),
}


def memory_bytes(result: BenchResult) -> int:
    """The device's peak where it tells one, else the process's."""
    return result.memory.resident if result.memory.device is None else result.memory.device


@dataclass(frozen=True)
class Growth:
    """Results in the order of what grows, and exponents: a quantity goes with this power of it."""

    over: str
    """"pixels" (of a picture, in all) or "batch"."""
    results: tuple[BenchResult, ...]
    exponents: dict[str, float]

    def amounts(self) -> list[int]:
        return [amount(self.over, result) for result in self.results]


def amount(over: str, result: BenchResult) -> int:
    """How much of what grows there was."""
    return math.prod(result.image_size) if over == "pixels" else result.settings.batch


def grow(
    settings: BenchSettings,
    sizes: Sequence[int] = (),
    batches: Sequence[int] = (),
    progress: Callable[[BenchResult], None] | None = None,
) -> list[Growth]:
    """Measure at every size (with the batch of `settings`), then at every batch (with its size).

    Small before large, so that peak memory is right even where a process can't reset its own. Raises UserError for
    one value or values given twice.
    """
    for name, values in (("sizes", sizes), ("batches", batches)):
        if values and (len(set(values)) != len(values) or len(values) < 2 or min(values) < 1):
            raise UserError(f"{name} {','.join(map(str, values))}: give two or more different ones, each at least 1")
    found = []
    for over, points in (
        ("pixels", [replace(settings, size=size) for size in sorted(sizes)]),
        ("batch", [replace(settings, batch=batch) for batch in sorted(batches)]),
    ):
        results = []
        for point in points:
            results.append(run_bench(replace(point, operators=False, text=False)))
            if progress is not None:
                progress(results[-1])
        if results:
            found.append(Growth(over, tuple(results), exponents(over, results)))
    return found


def exponents(over: str, results: Sequence[BenchResult]) -> dict[str, float]:
    """The fitted power of every quantity that is never zero."""
    amounts = [amount(over, result) for result in results]
    values = {name: [quantity(result) for result in results] for name, quantity in QUANTITIES.items()}
    return {name: fit_power(amounts, ys) for name, ys in values.items() if min(ys) > 0}


def fit_power(xs: Sequence[float | int], ys: Sequence[float | int]) -> float:
    """a of y = c·xᵃ by least squares on logarithms."""
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    covariance = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True))
    return covariance / sum((a - mean_u) ** 2 for a in u)


def growth_json(growths: Sequence[Growth]) -> dict[str, Any]:
    """All points and exponents as plain data."""
    return {
        growth.over: {"points": [to_json(result) for result in growth.results], "exponents": growth.exponents}
        for growth in growths
    }
