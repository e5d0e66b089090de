"""GenEval: do the objects of a prompt appear, in number, colour and place? (Ghosh et al. 2023)

The prompts are `evaluation_metadata.jsonl` of the public repository (djghosh13/geneval, `prompts/`), 553 lines such as

    {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": […], "prompt": "a photo of two cats"}

with four pictures a prompt. `--data` is that file or its folder. A detector judges; `judges/geneval.py` has the rules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hartist.errors import UserError
from hartist.evaluation.benchmarks.base import Item, Reference, limited, read_lines, repeats

FILE = "evaluation_metadata.jsonl"
PER_PROMPT = 4


@dataclass(frozen=True)
class GenEval:
    """Raises UserError, naming the line, for what is no such file."""

    data: Path
    limit: int | None = None
    per_prompt: int = PER_PROMPT

    name = "geneval"
    title = "GenEval"

    def items(self) -> list[Item]:
        path = self.data / FILE if self.data.is_dir() else self.data
        lines = read_lines(path, f"the {FILE} of github.com/djghosh13/geneval")
        rows = [_parse(line, f"{path} line {number}") for number, line in lines]
        items = [
            Item(
                f"{position:05d}_{j}", prompt, before * self.per_prompt + j, rows[position]["tag"], None, rows[position]
            )
            for position, prompt, before in repeats(row["prompt"] for row in rows)
            for j in range(self.per_prompt)
        ]
        return limited(items, self.limit, key=lambda item: item.id[:5])

    def references(self) -> list[Reference]:
        return []

    def metrics(self) -> tuple[str, ...]:
        return ("geneval",)

    def settings(self) -> Mapping[str, Any]:
        return {"prompts_per_tag": self.limit, "pictures_per_prompt": self.per_prompt}


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); fetch {FILE} again") from error
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("tag", "prompt")):
        raise UserError(f'{where} is not of GenEval; it must be {{"tag": …, "include": […], "prompt": …}}')
    objects = [entry for key in ("include", "exclude") for entry in _list(row.get(key, []))]
    if not row.get("include") or not all(isinstance(entry, dict) and "class" in entry for entry in objects):
        raise UserError(f"{where}: include and exclude must be lists of objects with a class; fetch {FILE} again")
    return row


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
