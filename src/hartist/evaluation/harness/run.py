"""A benchmark from its first picture to result.json. To resume, run the same command again

    items → seeds → pictures (generate.py) → features, judgements (score.py) → figures → result.json

What is finished lies in the run's folder and stays: pictures as a manifest lists them, features in a cache. So an
interruption costs the batch that was being made, and no figure depends on one. The folder belongs to one benchmark,
model and recipe, which `run.json` names from the first moment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from hartist.errors import UserError
from hartist.evaluation.benchmarks.base import Benchmark, Item, categories, fingerprint
from hartist.evaluation.harness import facts
from hartist.evaluation.harness.generate import Means, Shard, make_missing
from hartist.evaluation.harness.plan import plan_pictures
from hartist.evaluation.harness.result import RESULT, BenchmarkFacts, Result, Seeds, read_result, write_result
from hartist.evaluation.harness.rows import Findings
from hartist.evaluation.harness.score import Material, Scorer
from hartist.files import read_json, write_json
from hartist.generation.offline import check_plan
from hartist.generation.pipeline import Pipeline, override

RUN, CACHE = "run.json", "cache"


@dataclass(frozen=True)
class Recipe:
    """What decides a result beside the benchmark and the model."""

    seeds: Seeds = "per-image"
    changes: Mapping[str, Any] = field(default_factory=dict)
    """To the model's own sampling settings."""

    @property
    def all_changes(self) -> dict[str, Any]:
        """Smoothing is off unless it is asked for: the authors' demo has it on, and it changes every figure."""
        return {"smoothing": False, **self.changes}


def run_benchmark(
    benchmark: Benchmark,
    items: Sequence[Item],
    out: Path,
    means: Means,
    recipe: Recipe,
    scorers: Sequence[Scorer],
    shard: Shard,
    *,
    progress: bool = True,
) -> Result | None:
    """Make the pictures, measure them, write the result; only the first shard measures, the others return None.

    Raises UserError, before anything is made, for what the model can't serve and for a folder of another run.
    """
    plan = plan_pictures(benchmark.name, items, recipe.seeds, recipe.all_changes)
    pipe: Pipeline | None = means.options.load()
    assert pipe is not None
    settings = override(pipe.model.settings, **recipe.all_changes)
    check_plan(pipe, plan)
    model = facts.model_facts(pipe, means.fingerprint)
    about = BenchmarkFacts(benchmark.name, fingerprint(items), dict(benchmark.settings()))
    _claim(
        out, {"benchmark": asdict(about), "model": asdict(model), "seeds": recipe.seeds, "sampling": asdict(settings)}
    )
    machine = facts.machine(means.options, pipe) | {"batch_size": means.batch_size}
    size = pipe.image_size
    if means.processes > 1 or means.ray_address is not None:
        pipe = None  # the processes that make the pictures have models of their own: this one's memory is for them
    entries = make_missing(out, plan, means, pipe, shard, progress=progress)
    if not shard.main:
        return None
    started = time.monotonic()
    findings = Findings.of(items)
    material = Material(items, [out / picture.file for picture in plan], size, out / CACHE, progress)
    with all_threads():
        for scorer in scorers:
            scorer(material, findings)
    findings.save(out)
    result = Result(
        about,
        model,
        asdict(settings),
        recipe.seeds,
        facts.software(),
        machine,
        {"generation": sum(entry["seconds"] for entry in entries), "scoring": time.monotonic() - started},
        len(items),
        categories(items),
        findings.figures,
    )
    return _keep(out / RESULT, result)


def scoring_threads() -> int:
    """All cores."""
    return os.cpu_count() or 1


@contextlib.contextmanager
def all_threads() -> Iterator[None]:
    """Score with all cores, whatever torchrun or the pictures' making left: the number may show in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(scoring_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _claim(out: Path, values: dict[str, Any]) -> None:
    """Write down whose folder it is. Raises UserError if it is another run's."""
    path, values = out / RUN, plain(values)
    if path.exists():
        found = read_json(path)
        for name, value in values.items():
            if not isinstance(found, dict) or found.get(name) != value:
                raise UserError(f"{out} holds a run that differs in its {name}; choose another --out, or remove it")
        return
    write_json(path, values)


def _keep(path: Path, result: Result) -> Result:
    """Write a result, unless the one that is there says the same: a run that changes nothing leaves it as it was."""
    with contextlib.suppress(UserError):
        before = read_result(path)
        if _told(before) == _told(result):
            return before
    write_result(path, result)
    return result


def _told(result: Result) -> Any:
    """All but the time that scoring took, which is less where features were there."""
    seconds = {"generation": result.seconds["generation"]}
    return plain(dataclasses.replace(result, seconds=seconds).to_json())


def plain(values: Any) -> Any:
    """As JSON gives it back: a tuple is a list."""
    return json.loads(json.dumps(values))
