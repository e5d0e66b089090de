"""From a benchmark's items to the pictures that offline generation makes"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hartist.errors import UserError, quoted
from hartist.evaluation.benchmarks.base import Item
from hartist.evaluation.harness.result import Seeds
from hartist.evaluation.harness.seeds import seed_of
from hartist.generation.offline_plan import NAME, Picture
from hartist.generation.prompts import check_prompt

PICTURES = "pictures"


def plan_pictures(benchmark: str, items: Sequence[Item], seeds: Seeds, changes: Mapping[str, Any]) -> list[Picture]:
    """A picture an item, in their order; `changes` are to the model's own settings.

    Raises UserError for prompts that no model can be given, and for ids that are no file names or not unique.
    """
    plan, taken = [], set()
    for number, item in enumerate(items, start=1):
        if not NAME.fullmatch(item.id) or item.id.casefold() in taken:
            raise UserError(f"picture {quoted(item.id)} of the benchmark has a name that is no file's, or another's")
        taken.add(item.id.casefold())
        try:
            check_prompt(item.prompt)
        except UserError as error:
            raise UserError(f"picture {quoted(item.id)} of the benchmark: {error}") from error
        seed = seed_of(benchmark, item, seeds)
        settings = tuple(sorted(changes.items()))
        plan.append(Picture(f"{PICTURES}/{item.id}.png", number, item.id, item.prompt, seed, None, settings))
    return plan
