"""A run's folder, opened for a report: its result, and the prompt and file of every picture"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hartist.errors import UserError
from hartist.evaluation.harness.result import RESULT, Result, read_result
from hartist.evaluation.report.comparison import check_same_benchmark
from hartist.evaluation.report.intervals import ResultRows
from hartist.generation.offline import MANIFEST


@dataclass(frozen=True)
class Picture:
    """One picture of a run."""

    path: Path
    prompt: str


@dataclass(frozen=True)
class Run:
    """A finished run; pictures in the order of the benchmark's items, which is that of all rows."""

    folder: Path
    rows: ResultRows
    pictures: Sequence[Picture]

    @property
    def result(self) -> Result:
        return self.rows.result


def read_run(folder: Path) -> Run:
    """Open a run. Raises UserError, in one line, if a piece of it is missing or damaged."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of a run; give what `hartist evaluate … --out` wrote")
    if not (folder / RESULT).is_file():
        raise UserError(f"{folder} has no {RESULT}; run `hartist evaluate` until the end, the same command goes on")
    result = read_result(folder)
    if not any(figure.category is None for figure in result.figures):
        raise UserError(f"{folder / RESULT} has no overall figure; evaluate with at least one metric")
    rows = ResultRows(folder, result)
    rows.require(result.figures)
    pictures = _read_manifest(folder)
    if len(pictures) != result.pictures:
        raise UserError(
            f"{folder / MANIFEST} lists {len(pictures)} pictures, the result has {result.pictures}; "
            "run the same `hartist evaluate` again"
        )
    missing = [picture.path for picture in pictures if not picture.path.is_file()]
    if missing:
        raise UserError(
            f"{missing[0]} is missing ({len(missing)} pictures in all); copy the whole folder of the run, or run the "
            "same `hartist evaluate` again"
        )
    return Run(folder, rows, pictures)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Open several runs of one benchmark. Raises UserError as `read_run`, for one named twice, and for strangers."""
    places = [folder.resolve() for folder in folders]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise UserError(f"{folders[i]} is named twice; give each run once")
    runs = [read_run(folder) for folder in folders]
    for run in runs[1:]:
        check_same_benchmark(runs[0].rows, run.rows)
    return runs


def _read_manifest(folder: Path) -> list[Picture]:
    path = folder / MANIFEST
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; copy the whole folder of the run") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); run the same `hartist evaluate` again") from error
    found: dict[int, Picture] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            file = folder / entry["file"]
            found[int(entry["line"])] = Picture(file, str(entry["prompt"]))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} line {number} is no entry of a manifest; run the same `hartist evaluate` again"
            ) from error
        if not file.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path} line {number} points outside its folder; run the same `hartist evaluate` again")
    return [found[line] for line in sorted(found)]
