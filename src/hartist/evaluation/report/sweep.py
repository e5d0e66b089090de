"""Several runs of one benchmark: which setting they differ in, and so what their figures are plotted against"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hartist.evaluation.harness.result import Result
from hartist.evaluation.report.wording import setting_text

FIRST = ("guidance", "diffusion_steps")
"""Settings that make the axis before all others."""


@dataclass(frozen=True)
class Place:
    """Where a run stands in a plot."""

    x: float | str
    series: str
    """The other settings that differ; empty if there are none."""

    @property
    def label(self) -> str:
        return ", ".join(filter(None, (setting_text(self.x), self.series)))


@dataclass(frozen=True)
class Sweep:
    """The axis, and the place of each run, in the order of the runs."""

    axis: str
    places: Sequence[Place]

    @property
    def order(self) -> list[int]:
        """The runs by their places: series by series, along the axis, names after numbers as they came."""
        series = list(dict.fromkeys(place.series for place in self.places))

        def key(i: int) -> tuple[int, bool, float]:
            x = self.places[i].x
            return series.index(self.places[i].series), isinstance(x, str), 0.0 if isinstance(x, str) else x

        return sorted(range(len(self.places)), key=key)


def find_sweep(results: Sequence[Result], names: Sequence[str]) -> Sweep:
    """The axis is the setting of the most values, numbers before others; the runs' `names` if none differs."""
    settings = [_settings(result, results) for result in results]
    keys = list(dict.fromkeys(key for each in settings for key in each))
    values = {key: list(dict.fromkeys(json.dumps(each.get(key)) for each in settings)) for key in keys}
    differing = [key for key in keys if len(values[key]) > 1]
    distinct = {json.dumps([each.get(key) for key in differing]) for each in settings}
    if len(distinct) < len(results):  # some are alike in everything: only their names tell them apart
        return Sweep("run", [Place(name, "") for name in names])

    def weight(key: str) -> tuple[bool, bool, int]:
        numbers = sum(_is_number(each.get(key)) for each in settings)
        return numbers > 1, key in FIRST, len(values[key])

    axis = max(differing, key=weight) if differing else "run"
    others = [key for key in differing if key != axis]
    return Sweep(
        axis.replace("_", " "),
        [Place(_x(each.get(axis)), _series(each, others)) for each in settings] if differing else [Place(names[0], "")],
    )


def _settings(result: Result, all_results: Sequence[Result]) -> dict[str, Any]:
    """What may differ; models of the same name are told apart by their fingerprints."""
    same_name = {each.model.fingerprint for each in all_results if each.model.name == result.model.name}
    model = result.model.name if len(same_name) == 1 else f"{result.model.name} {result.model.fingerprint[:8]}"
    return {"model": model, "seeds": result.seeds, **result.sampling}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _x(value: Any) -> float | str:
    return float(value) if _is_number(value) else setting_text(value)


def _series(settings: Mapping[str, Any], keys: Sequence[str]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {setting_text(settings.get(key))}" for key in keys)
