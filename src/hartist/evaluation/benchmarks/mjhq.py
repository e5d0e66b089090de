"""MJHQ-30K: 3,000 prompts of each of ten categories with a picture each (Li et al. 2024, Playground v2.5)

The layout is that of the dataset on the Hugging Face Hub, `playgroundai/MJHQ-30K`, its archive unpacked:

    DIR/meta_data.json                    {"<name>": {"category": "people", "prompt": "…"}, …}
    DIR/people/<name>.jpg                 or below a folder of its own, such as DIR/mjhq30k_imgs/people/

FID is taken to all 30,000 pictures, and for each category to its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hartist.errors import UserError, quoted
from hartist.evaluation.benchmarks.base import IMAGE_SUFFIXES, Item, Reference, limited, repeats
from hartist.files import read_json

META = "meta_data.json"


@dataclass(frozen=True)
class Mjhq:
    """Raises UserError for a folder of another layout, or one that lacks pictures."""

    data: Path
    limit: int | None = None
    per_prompt: int = 1

    name = "mjhq"
    title = "MJHQ-30K"

    @cached_property
    def _items(self) -> list[Item]:
        path = self.data / META
        if not path.is_file():
            raise UserError(f"{self.data} is no MJHQ-30K folder: it has no {META}; fetch playgroundai/MJHQ-30K")
        entries = read_json(path)
        if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
            raise UserError(f'{path} is not of MJHQ-30K: each entry must be {{"category": …, "prompt": …}}')
        prompts = repeats(entry["prompt"] for entry in entries.values())
        items = [
            Item(
                f"{name}_{j}" if self.per_prompt > 1 else name, prompt, before * self.per_prompt + j, entry["category"]
            )
            for (name, entry), (_, prompt, before) in zip(entries.items(), prompts, strict=True)
            for j in range(self.per_prompt)
        ]
        items = limited(items, self.limit, key=self._file)
        pictures = self._pictures({item.category for item in items})
        return [self._with_reference(item, pictures) for item in items]

    def _file(self, item: Item) -> str:
        return item.id.rpartition("_")[0] if self.per_prompt > 1 else item.id

    def _pictures(self, names: set[str]) -> dict[tuple[str, str], Path]:
        """The pictures by category and name."""
        for folder in (self.data, *sorted(path for path in self.data.iterdir() if path.is_dir())):
            if any((folder / name).is_dir() for name in names):
                files = ((name, path) for name in names for path in (folder / name).glob("*"))
                return {(name, path.stem): path for name, path in files if path.suffix.lower() in IMAGE_SUFFIXES}
        raise UserError(
            f"{self.data} has no folder of a category ({', '.join(sorted(names)[:3])}, …); unzip mjhq30k_imgs.zip there"
        )

    def _with_reference(self, item: Item, pictures: Mapping[tuple[str, str], Path]) -> Item:
        path = pictures.get((item.category, self._file(item)))
        if path is None:
            raise UserError(
                f"{self.data} lacks the picture {quoted(self._file(item))} of {item.category}, which {META} names; "
                "unzip mjhq30k_imgs.zip again"
            )
        return Item(item.id, item.prompt, item.index, item.category, path)

    def items(self) -> list[Item]:
        return list(self._items)

    def references(self) -> list[Reference]:
        paths = {item.reference: item.category for item in self._items}
        return [Reference(path, category) for path, category in paths.items() if path is not None]

    def metrics(self) -> tuple[str, ...]:
        return "frechet", "kernel", "precision", "recall", "clip"

    def settings(self) -> Mapping[str, Any]:
        return {"prompts_per_category": self.limit, "pictures_per_prompt": self.per_prompt}


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(entry.get(key), str) and entry[key].strip() for key in ("category", "prompt")
    )
