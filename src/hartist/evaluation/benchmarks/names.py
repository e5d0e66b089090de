"""Opening a benchmark by its name."""

from __future__ import annotations

from pathlib import Path

from hartist.errors import UserError, quoted
from hartist.evaluation.benchmarks.base import Benchmark
from hartist.evaluation.benchmarks.dpg import Dpg
from hartist.evaluation.benchmarks.emoji import Emoji
from hartist.evaluation.benchmarks.geneval import GenEval
from hartist.evaluation.benchmarks.imagenet import ImageNet
from hartist.evaluation.benchmarks.mjhq import Mjhq
from hartist.evaluation.benchmarks.prompts import Prompts

BENCHMARKS = {kind.name: kind for kind in (Emoji, Mjhq, ImageNet, GenEval, Dpg, Prompts)}


def open_benchmark(
    name: str, data: Path, *, limit: int | None = None, per_prompt: int | None = None, classes: int | None = None
) -> Benchmark:
    """A benchmark on the data at `data`; what is None is the benchmark's own.

    Raises UserError for an unknown name or numbers out of range; the data are read when they are asked for.
    """
    if name not in BENCHMARKS:
        raise UserError(f"no benchmark {quoted(name)}; there are {', '.join(BENCHMARKS)}")
    for flag, value in (("--limit", limit), ("--per-prompt", per_prompt), ("--classes", classes)):
        if value is not None and not 1 <= value <= 10**6:
            raise UserError(f"{flag} {value} is out of range; give 1 to 1000000")
    if not data.exists():
        raise UserError(f"{data} does not exist; give the data of the benchmark {name} with --data")
    options = {"limit": limit, "per_prompt": per_prompt, "classes": classes if name == "imagenet" else None}
    benchmark: Benchmark = BENCHMARKS[name](data, **{key: value for key, value in options.items() if value is not None})
    return benchmark
