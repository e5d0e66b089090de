"""The emoji benchmark: prompts of a `hartist data emoji` folder, by how much of them the model has seen

    train            captions that the model trained on
    unseen_pair      thing and style known, but not together
    unseen_concept   things that no training picture shows

The real pictures of these very prompts are the reference, as many of each kind as are generated. Pictures on white
only: the captions of the others name the colour.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hartist.errors import UserError
from hartist.evaluation.benchmarks.base import Item, Reference, limited, repeats
from hartist.evaluation.selection import by_kind, load_rows

KINDS = ("train", "unseen_pair", "unseen_concept")
PER_KIND = 350
"""Prompts of a kind unless a limit is given: about 1,000 pictures in all."""


@dataclass(frozen=True)
class Emoji:
    """Raises UserError for a folder that is no captioned dataset with the two splits."""

    data: Path
    limit: int | None = None
    per_prompt: int = 1

    name = "emoji"
    title = "Emoji, held-out prompts"

    def items(self) -> list[Item]:
        rows = [
            (kind, row)
            for split in ("train", "validation")
            for kind, found in sorted(by_kind(load_rows(self.data, split), split).items(), key=_place)
            for row in found
        ]
        items = []
        for (kind, row), (_, prompt, before) in zip(rows, repeats(row.text for _, row in rows), strict=True):
            for j in range(self.per_prompt):
                name = row.path.stem if self.per_prompt == 1 else f"{row.path.stem}_{j}"
                index = before * self.per_prompt + j
                items.append(Item(name, prompt, index, kind, row.path, {"family": row.extra.get("family", row.text)}))
        kept = limited(items, self.limit or PER_KIND, key=_file)
        if len(kept) < 2:
            raise UserError(f"{self.data} has {len(kept)} prompts; a benchmark needs at least 2")
        return kept

    def references(self) -> list[Reference]:
        paths = {item.reference: item.category for item in self.items()}
        return [Reference(path, kind) for path, kind in paths.items() if path is not None]

    def metrics(self) -> tuple[str, ...]:
        return "frechet", "kernel", "precision", "recall", "diversity", "alignment"

    def settings(self) -> Mapping[str, Any]:
        return {"prompts_per_kind": self.limit or PER_KIND, "pictures_per_prompt": self.per_prompt}


def _place(found: tuple[str, Any]) -> tuple[int, str]:
    """The order of the kinds."""
    return KINDS.index(found[0]) if found[0] in KINDS else len(KINDS), found[0]


def _file(item: Item) -> str:
    assert item.reference is not None
    return item.reference.name
