"""One row of a dataset as what training needs of it: an encoded image, its captions, and what was wrong"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hartist.errors import UserError, quoted

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("captions", "caption", "text", "txt", "json.captions", "json.caption", "json.text")
"""Where images and captions are looked for, the first that is there; `json.caption` is a field of `json`."""


@dataclass(frozen=True)
class Record:
    """An image not yet decoded, and what it shows."""

    name: str
    image: bytes | str
    """The bytes of its file, or a path or address to read them from."""
    captions: tuple[str, ...]
    """All to train with; empty only if there is a label instead."""
    text: str
    """The one to evaluate with."""
    label: int | None = None
    """The number of its class, if the dataset was opened for that."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """The other columns that hold plain values."""


@dataclass(frozen=True)
class Broken:
    """A row or a whole shard that was skipped, and why."""

    name: str
    reason: str
    kind: Literal["image", "caption", "shard"]


class Skipped:
    """Counts what was skipped and remembers the first `limit` by name; the same name counts once."""

    def __init__(self, limit: int = 1000) -> None:
        self.limit = limit
        self.found: dict[tuple[str, str], Broken] = {}
        self.unnamed = 0

    def add(self, broken: Broken) -> None:
        if len(self.found) < self.limit:
            self.found.setdefault((broken.kind, broken.name), broken)
        elif (broken.kind, broken.name) not in self.found:
            self.unnamed += 1

    def __len__(self) -> int:
        return len(self.found) + self.unnamed

    def of(self, kind: str) -> list[Broken]:
        """Those remembered of one kind."""
        return [broken for broken in self.found.values() if broken.kind == kind]

    def nothing_left(self, name: str, split: str = "") -> UserError:
        """The refusal of a dataset of which everything was skipped."""
        where, why = f" in {split}" if split else "", f": {self.summary()}" if len(self) else ""
        return UserError(f"{name} has no image{where} that can be read{why}")

    def summary(self, shown: int = 3) -> str:
        """One line, such as `2 skipped: a.png (does not exist), b.png (no caption)`."""
        first = [f"{broken.name} ({broken.reason})" for broken in list(self.found.values())[:shown]]
        more = f" and {len(self) - len(first):,} more" if len(self) > len(first) else ""
        return f"{len(self):,} skipped: {', '.join(first)}{more}"


@dataclass(frozen=True)
class Columns:
    """Which columns hold what. A name with a dot is a field within a column, unless it is a column itself."""

    image: str
    captions: tuple[str, ...]
    fallback: str | None = None
    """The column of the one caption beside a list of captions."""
    label: str | None = None
    """The column of class numbers; captions may then be missing."""
    extra: tuple[str, ...] = ()

    @property
    def needed(self) -> list[str]:
        """The names of all, without their fields after the dot."""
        return [self.image, *self.captions, *filter(None, (self.fallback, self.label)), *self.extra]

    def read(self, row: Mapping[str, Any], name: str, root: Path | None = None) -> Record | Broken:
        """A row's record; `name` is for rows without a file name, `root` is taken off the front of one."""
        image = lookup(row, self.image)
        path = image.get("path") if isinstance(image, Mapping) else None
        if path:
            name = _relative(str(path), root)
        captions = tuple(dict.fromkeys(text for column in self.captions for text in _texts(lookup(row, column))))
        text = next(iter(_texts(lookup(row, self.fallback)) if self.fallback else captions), "")
        captions = captions or ((text,) if text else ())
        label = lookup(row, self.label) if self.label else None
        if self.label and not (isinstance(label, int) and label >= 0):
            return Broken(name, "no class number", "caption")
        if not captions and not self.label:
            return Broken(name, "no caption", "caption")
        content = image.get("bytes") or path if isinstance(image, Mapping) else image
        if not isinstance(content, bytes | str) or not content:
            return Broken(name, "no image", "image")
        extra = {column: row[column] for column in self.extra}
        return Record(name, content, captions, text or next(iter(captions), ""), label, extra)


def guess_columns(
    source: str,
    features: Mapping[str, Any],
    images: Sequence[str],
    image_column: str | None = None,
    caption_columns: Sequence[str] | None = None,
    label_column: str | None = None,
) -> Columns:
    """The columns of a dataset: those asked for, else by their names and types.

    `features` maps column names to types, a column with fields to another such mapping; `images` are the
    columns typed as images. Raises UserError that names the columns there are.
    """
    there = f"its columns are {', '.join(_names(features))}"
    if image_column is None:
        image_column = next((name for name in IMAGE_COLUMNS if name in features), None)
        if image_column is None and len(images) == 1:
            image_column = images[0]
        if image_column is None:
            raise UserError(f"{source} has no column of images that can be told; {there}: name one by --image-column")
    if caption_columns is None:
        guessed = next((name for name in CAPTION_COLUMNS if _has(features, name)), None)
        if guessed is None and label_column is None:
            raise UserError(f"{source} has no column of captions; {there}: name one by --caption-column")
        caption_columns = [guessed] if guessed else []
    for column in (image_column, *caption_columns, *([label_column] if label_column else [])):
        if not _has(features, column):
            raise UserError(f"{source} has no column {quoted(column)}; {there}")
    fallback = "text" if list(caption_columns) == ["captions"] and "text" in features else None
    return Columns(image_column, tuple(caption_columns), fallback, label_column)


def lookup(row: Mapping[str, Any], column: str) -> Any:
    """A column's value, or that of a field in it; None where there is none."""
    if column in row:
        return row[column]
    outer, dot, inner = column.partition(".")
    value = row.get(outer)
    return lookup(value, inner) if dot and isinstance(value, Mapping) else None


def _has(features: Mapping[str, Any], column: str) -> bool:
    if column in features:
        return True
    outer, dot, inner = column.partition(".")
    fields = features.get(outer)
    return bool(dot) and isinstance(fields, Mapping) and _has(fields, inner)


def _names(features: Mapping[str, Any], prefix: str = "") -> list[str]:
    names = []
    for name, kind in features.items():
        is_image = isinstance(kind, Mapping) and set(kind) == {"bytes", "path"}
        names += _names(kind, f"{prefix}{name}.") if isinstance(kind, Mapping) and not is_image else [prefix + name]
    return [name for name in names if not name.startswith("__")]


def _texts(value: Any) -> list[str]:
    """The non-empty strings of a caption column: one, or a list of them."""
    values = [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []
    # A lone surrogate, which JSON can spell, is no text that could be stored or encoded.
    return [text.strip().encode(errors="replace").decode() for text in values if isinstance(text, str) and text.strip()]


def _relative(path: str, root: Path | None) -> str:
    if root is None:
        return path
    try:
        return Path(path).relative_to(root.resolve()).as_posix()
    except ValueError:
        return path
