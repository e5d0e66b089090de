"""Files of prompts, with categories or without: PartiPrompts, HPS v2's benchmark, one's own

FILE.tsv     a table with the columns Prompt and Category (PartiPrompts.tsv of google-research/parti)
FILE.json    a list of prompts; in a folder, each file is a category (HPS v2: anime, concept-art, paintings, photo)
FILE.jsonl   {"prompt": …, "category": …} a line
FILE.txt     one prompt a line
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hartist.errors import UserError, quoted
from hartist.evaluation.benchmarks.base import Item, Reference, limited, read_lines, repeats

WHAT = "a file of prompts: .tsv (PartiPrompts), .json (HPS), .jsonl or .txt"
SUFFIXES = (".tsv", ".json", ".jsonl", ".txt")


@dataclass(frozen=True)
class Prompts:
    """Raises UserError, naming the line, for files of another form."""

    data: Path
    limit: int | None = None
    per_prompt: int = 1

    name = "prompts"

    @property
    def title(self) -> str:
        return f"Prompts of {self.data.name}"

    def items(self) -> list[Item]:
        files = sorted(path for path in self.data.glob("*") if path.suffix in SUFFIXES) if self.data.is_dir() else None
        if files == []:
            raise UserError(f"{self.data} holds no file of prompts; give {WHAT}")
        rows = [row for path in files or [self.data] for row in read_prompts(path, path.stem if files else "")]
        items = [
            Item(f"{position:05d}_{j}", prompt, before * self.per_prompt + j, rows[position][1])
            for position, prompt, before in repeats(prompt for prompt, _ in rows)
            for j in range(self.per_prompt)
        ]
        return limited(items, self.limit, key=lambda item: item.id[:5])

    def references(self) -> list[Reference]:
        return []

    def metrics(self) -> tuple[str, ...]:
        return "clip", "alignment"

    def settings(self) -> Mapping[str, Any]:
        return {"prompts_per_category": self.limit, "pictures_per_prompt": self.per_prompt}


def read_prompts(path: Path, category: str) -> list[tuple[str, str]]:
    """(prompt, category) of a file; `category` is for what names none. Raises UserError."""
    lines = read_lines(path, WHAT)
    if path.suffix == ".tsv":
        rows = list(csv.DictReader((line for _, line in lines), delimiter="\t", quoting=csv.QUOTE_NONE))
        found = [(row.get("Prompt"), row.get("Category") or category) for row in rows]
        if not rows or "Prompt" not in rows[0]:
            raise UserError(f"{path} has no column Prompt; give {WHAT}")
    elif path.suffix == ".json":
        found = [(prompt, category) for prompt in _json("\n".join(line for _, line in lines), path)]
    elif path.suffix == ".jsonl":
        objects = [_json(line, f"{path} line {number}", dict) for number, line in lines]
        found = [(row.get("prompt"), str(row.get("category") or category)) for row in objects]
    elif path.suffix == ".txt":
        found = [(line, category) for _, line in lines]
    else:
        raise UserError(f"{path} has no known form; give {WHAT}")
    for number, (prompt, _) in enumerate(found, start=1):
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{path}: prompt {number} is {quoted(prompt)}; it must be a text")
    return [(str(prompt).strip(), name) for prompt, name in found]


def _json(text: str, where: Any, kind: type = list) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); give {WHAT}") from error
    if not isinstance(value, kind):
        raise UserError(f"{where} is no {'list of prompts' if kind is list else 'JSON object'}; give {WHAT}")
    return value
