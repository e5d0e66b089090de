"""What every benchmark offers: the pictures to make, the real ones to compare with, and the metrics that apply."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from hartist.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Item:
    """One picture to make."""

    id: str
    """Unlike that of any other item, and fit for a file name."""
    prompt: str | int
    """A text, or a class label."""
    index: int
    """Which picture of this prompt, from 0."""
    category: str = ""
    """Empty for none."""
    reference: Path | None = None
    """The real picture of this very prompt, if there is one."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What a judge needs to know of the prompt."""


@dataclass(frozen=True)
class Reference:
    """A real picture that distances are taken to."""

    path: Path
    category: str = ""


@runtime_checkable
class Benchmark(Protocol):
    """A benchmark, opened on the data that the user fetched."""

    @property
    def name(self) -> str:
        """As the command line and the seeds know it."""

    @property
    def title(self) -> str:
        """As reports print it."""

    def items(self) -> list[Item]:
        """The pictures to make, in an order that is the same on every machine.

        Raises UserError, in one line, for data that are not laid out as they must be.
        """

    def references(self) -> list[Reference]:
        """The real pictures; none for a benchmark that compares with prompts only. Raises UserError as `items` does."""

    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that are measured unless others are asked for; see `harness/metrics.py`."""

    def settings(self) -> Mapping[str, Any]:
        """What else decides the figures, for the result: pictures a prompt, limits."""


def fingerprint(items: Sequence[Item]) -> str:
    """sha256 over all items: id, prompt, index, category. Results with the same one are of the same pictures."""
    rows = [[item.id, item.prompt, item.index, item.category] for item in items]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def categories(items: Sequence[Item]) -> list[str]:
    """The categories in the order of their first item."""
    return [name for name in dict.fromkeys(item.category for item in items) if name]


def repeats(prompts: Iterable[str | int]) -> Iterator[tuple[int, str | int, int]]:
    """(position, prompt, how often it came before): a prompt that a file has twice gets other seeds the second time."""
    seen: Counter[str | int] = Counter()
    for position, prompt in enumerate(prompts):
        yield position, prompt, seen[prompt]
        seen[prompt] += 1


def limited(items: Sequence[Item], limit: int | None, key: Callable[[Item], str]) -> list[Item]:
    """The items of at most `limit` prompts of each category, in their order. `key` tells prompts apart.

    Which ones, has to do with nothing: those whose key has the smallest sha256, the same on every machine.
    """
    if limit is None:
        return list(items)
    groups: dict[str, dict[str, bytes]] = {}
    for item in items:
        groups.setdefault(item.category, {})[key(item)] = hashlib.sha256(key(item).encode()).digest()
    kept = {(name, k) for name, keys in groups.items() for k in sorted(keys, key=keys.__getitem__)[:limit]}
    return [item for item in items if (item.category, key(item)) in kept]


def read_lines(path: Path, what: str) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file that hold something, with their numbers. Raises UserError, calling it `what`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; give {what}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}); give {what}") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty; give {what}")
    return lines


def images_in(folder: Path) -> list[Path]:
    """All pictures below a folder, by name. Raises UserError if there is no folder or no picture."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        there = "has no pictures" if folder.is_dir() else "is no folder"
        raise UserError(f"{folder} {there} ({', '.join(IMAGE_SUFFIXES)}); give the folder of the real pictures")
    return found
