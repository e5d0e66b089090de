"""What a run found, in one file: figures, and everything that it takes to get them again

`result.json` names the benchmark, the model, the sampling settings, the kind of seeds, the software and the machine.
Each figure points to its rows, `rows/<name>.safetensors`: the features or per-picture values that it was computed
from, so that anyone can resample them without making a picture. Their tensors are

    kind mean               values float32 [N], in the order of the items; NaN where a picture was not measured
    kind frechet, kernel    generated float32 [N, D]; reference float32 [M, D]; reference_categories int64 [M], where
                            categories have references of their own
    any kind                categories int64 [N], the index into the result's categories, −1 for none
    kind other              none: these figures cannot be resampled
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from hartist.checkpoint import read_safetensors
from hartist.errors import UserError, quoted
from hartist.files import read_json, write_json

FORMAT = "hartist-result"
VERSION = 1
RESULT = "result.json"
ROWS = "rows"

Better = Literal["lower", "higher"]
Kind = Literal["mean", "frechet", "kernel", "other"]
Seeds = Literal["per-image", "fixed"]


@dataclass(frozen=True)
class Figure:
    """One number."""

    metric: str
    network: str | None
    """Whose features or judgement it rests on; None for a metric of pixels."""
    category: str | None
    """None is overall."""
    value: float
    count: int
    """Generated pictures that it was computed from."""
    better: Better
    kind: Kind
    rows: str | None = None
    """The file that it was computed from, relative to the result's folder."""

    @property
    def key(self) -> tuple[str, str | None, str | None]:
        """What makes figures of two results comparable."""
        return self.metric, self.network, self.category


@dataclass(frozen=True)
class BenchmarkFacts:
    name: str
    fingerprint: str
    """sha256 over all items: id, prompt, index, category."""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelFacts:
    name: str
    fingerprint: str
    parameters: int
    """Of the transformer with its residual network, as papers count; tokenizer and text encoder are not in it."""


@dataclass(frozen=True)
class Result:
    """A finished run."""

    benchmark: BenchmarkFacts
    model: ModelFacts
    sampling: Mapping[str, Any]
    """SamplingSettings."""
    seeds: Seeds
    software: Mapping[str, str]
    machine: Mapping[str, Any]
    seconds: Mapping[str, float]
    """`generation`: the sum over the pictures of each one's share of its batch's time, whoever made it. `scoring`."""
    pictures: int
    categories: Sequence[str]
    figures: Sequence[Figure]

    def to_json(self) -> dict[str, Any]:
        """As the file holds it."""
        return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, values: Any, where: str) -> Result:
        """The reverse of `to_json`. Raises UserError, naming `where`, for what no `hartist evaluate` wrote."""
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise UserError(f"{where} is not a result of `hartist evaluate`; give the result.json of a finished run")
        if values.get("version") != VERSION:
            raise UserError(
                f"{where} has version {quoted(values.get('version'))}; this Hartist reads version {VERSION}"
            )
        try:
            return cls(
                BenchmarkFacts(**values["benchmark"]),
                ModelFacts(**values["model"]),
                _mapping(values["sampling"]),
                _one_of(values["seeds"], Seeds),
                _mapping(values["software"]),
                _mapping(values["machine"]),
                {str(name): _number(seconds) for name, seconds in values["seconds"].items()},
                int(values["pictures"]),
                tuple(map(str, values["categories"])),
                tuple(_figure(figure) for figure in values["figures"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{where} is damaged ({type(error).__name__}: {error}); run the evaluation again"
            ) from error


def write_result(path: Path, result: Result) -> None:
    """Write `result.json`, atomically."""
    write_json(path, result.to_json())


def read_result(path: Path) -> Result:
    """Read a `result.json`, or that of a run's folder. Raises UserError for what is none."""
    path = path / RESULT if path.is_dir() else path
    return Result.from_json(read_json(path), str(path))


def read_rows(result_path: Path, figure: Figure) -> dict[str, Tensor]:
    """The tensors that a figure was computed from. Raises UserError if it has none, or they are not beside the result.

    `result_path` is the result's file or folder.
    """
    if figure.rows is None:
        raise UserError(f"{result_path}: {figure.metric} has no rows to be resampled from; leave it out")
    folder = result_path if result_path.is_dir() else result_path.parent
    path = folder / figure.rows
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{result_path} points outside its folder: {quoted(figure.rows)}")
    return read_safetensors(path)


def _figure(values: Any) -> Figure:
    figure = Figure(**values)
    _one_of(figure.better, Better)
    _one_of(figure.kind, Kind)
    return dataclasses.replace(figure, value=_number(figure.value), count=int(figure.count))


def _one_of(value: Any, literal: Any) -> Any:
    if value not in get_args(literal):
        raise ValueError(f"{quoted(value)} is none of {', '.join(get_args(literal))}")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{quoted(value)} is no number")
    return float(value)


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{quoted(value)} is no object")
    return value
