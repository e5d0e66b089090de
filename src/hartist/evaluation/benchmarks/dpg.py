"""DPG-Bench: dense prompts, and questions about what they say (Hu et al. 2024, ELLA)

The layout is that of the public repository (TencentQQGYLab/ELLA, `dpg_bench/`):

    DIR/prompts/<item>.txt     one prompt a file
    DIR/dpg_bench.csv          one question a row: item_id, proposition_id, dependency, tuple, question_natural_language

with four pictures a prompt. A visual question answerer judges; `judges/dpg.py` has the rules. The repository's script
skips the first row of the table; here all questions count.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hartist.errors import UserError, quoted
from hartist.evaluation.benchmarks.base import Item, Reference, limited, repeats

TABLE, PROMPTS = "dpg_bench.csv", "prompts"
COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
PER_PROMPT = 4


@dataclass(frozen=True)
class Dpg:
    """Raises UserError for a folder of another layout, or questions without a prompt."""

    data: Path
    limit: int | None = None
    per_prompt: int = PER_PROMPT

    name = "dpg"
    title = "DPG-Bench"

    def items(self) -> list[Item]:
        files = sorted((self.data / PROMPTS).glob("*.txt"))
        if not files or not (self.data / TABLE).is_file():
            raise UserError(
                f"{self.data} is no DPG-Bench folder: it needs {TABLE} and {PROMPTS}/*.txt; "
                "give the dpg_bench folder of github.com/TencentQQGYLab/ELLA"
            )
        questions = read_questions(self.data / TABLE)
        items = []
        for position, prompt, before in repeats(_read_prompt(path) for path in files):
            stem = files[position].stem
            if stem not in questions:
                raise UserError(f"{self.data / TABLE} has no questions for {PROMPTS}/{stem}.txt; fetch both again")
            items += [
                Item(f"{stem}_{j}", prompt, before * self.per_prompt + j, "", None, {"questions": questions[stem]})
                for j in range(self.per_prompt)
            ]
        return limited(items, self.limit, key=lambda item: item.id.rpartition("_")[0])

    def references(self) -> list[Reference]:
        return []

    def metrics(self) -> tuple[str, ...]:
        return ("dpg",)

    def settings(self) -> Mapping[str, Any]:
        return {"prompts_at_most": self.limit, "pictures_per_prompt": self.per_prompt}


def read_questions(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The questions of each item: id, depends_on, category, question. Raises UserError that names the row."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a table ({error}); fetch it again") from error
    if not rows or not set(COLUMNS) <= set(rows[0]):
        raise UserError(f"{path} is not of DPG-Bench: its columns must be {', '.join(COLUMNS)}, and there must be rows")
    questions: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(rows, start=1):
        try:
            question = {
                "id": int(row["proposition_id"]),
                "depends_on": [int(part) for part in row["dependency"].split(",") if int(part) != 0],
                "category": row["tuple"].partition("(")[0].strip(),
                "question": row["question_natural_language"].strip(),
            }
        except (ValueError, AttributeError) as error:  # a short row has None in it
            raise UserError(
                f"{path} row {number} ({quoted(row['item_id'])}) is damaged ({error}); fetch it again"
            ) from error
        questions.setdefault(str(row["item_id"]), []).append(question)
    return questions


def _read_prompt(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}); fetch it again") from error
    if not text:
        raise UserError(f"{path} is empty; fetch it again")
    return text
