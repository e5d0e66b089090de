"""Which local files a data source consists of: captioned folders, tar or parquet shards, told apart by split"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hartist.errors import UserError, quoted

Kind = Literal["imagefolder", "webdataset", "parquet"]

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TARS = (".tar", ".tar.gz", ".tgz")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""What files and folders of a split are called."""


@dataclass(frozen=True)
class LocalFiles:
    kind: Kind
    root: Path
    """What names of images and shards are relative to."""
    files: tuple[Path, ...]
    """Metadata files of image folders, or shards; sorted."""


def is_local(source: str) -> bool:
    """Whether `source` is a path or a glob, rather than `owner/name`, a dataset on the Hugging Face Hub.

    A name that is not there, in a folder that is, is a misspelt path.
    """
    path, is_id = Path(source), re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source)
    return path.exists() or path.parent.exists() or glob.has_magic(source) or not is_id


def find_files(source: str, split: str) -> LocalFiles:
    """The files of one split of a folder, a glob or a single file.

    A split is a folder or a word of a file name (`validation/`, `train-00000-of-00004.parquet`); where no
    file has one, all are `train`. Raises UserError if there is nothing to read or no such split.
    """
    root, files = _candidates(source)
    kind, files = _kind(source, files)
    by_split: dict[str, list[Path]] = {}
    for path in files:
        by_split.setdefault(_split_of(path.relative_to(root), split), []).append(path)
    if set(by_split) == {""}:
        by_split = {"train": by_split[""]}
    if split not in by_split:
        known = ", ".join(sorted(filter(None, by_split)))
        raise UserError(f"{source} has no split {quoted(split)}; it has {known}")
    return LocalFiles(kind, root, tuple(by_split[split]))


def _candidates(source: str) -> tuple[Path, list[Path]]:
    path = Path(source)
    if path.is_dir():
        found = [p for p in path.rglob("*") if _suffix_kind(p) and not _is_hidden(p.relative_to(path))]
        return path, sorted(found)
    if path.exists():
        return path.parent, [path]
    if not glob.has_magic(source):
        raise UserError(
            f"{source} does not exist; give a folder with metadata.jsonl, .tar or .parquet files, or a Hub id"
        )
    found = sorted(Path(p) for p in glob.glob(source, recursive=True) if Path(p).is_file())
    if not found:
        raise UserError(f"no file matches {source}; correct the pattern")
    fixed = source[: re.search(r"[*?[]", source).start()]  # type: ignore[union-attr]  # has_magic said so
    return Path(fixed).parent if not fixed.endswith("/") else Path(fixed), found


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _suffix_kind(path: Path) -> Kind | None:
    name = path.name.lower()
    if name in METADATA:
        return "imagefolder"
    if name.endswith(TARS):
        return "webdataset"
    return "parquet" if name.endswith(".parquet") else None


def _kind(source: str, files: Iterable[Path]) -> tuple[Kind, list[Path]]:
    """Metadata comes before shards: what lies beside it is part of an image folder."""
    by_kind: dict[Kind, list[Path]] = {}
    for path in files:
        kind = _suffix_kind(path)
        if kind:
            by_kind.setdefault(kind, []).append(path)
    if "imagefolder" in by_kind:
        metadata = by_kind["imagefolder"]
        name = next(name for name in METADATA if any(path.name.lower() == name for path in metadata))
        return "imagefolder", [path for path in metadata if path.name.lower() == name]
    if len(by_kind) > 1:
        raise UserError(f"{source} has both .tar and .parquet files; name one kind, as in {source}/*.tar")
    for kind, found in by_kind.items():
        return kind, found
    raise UserError(
        f"{source} has no metadata.jsonl, .tar or .parquet; write one JSON line per image with file_name and "
        "text, or build a dataset with `hartist data emoji`"
    )


def _split_of(relative: Path, asked: str) -> str:
    """The split that a folder or a word of the file's name says, or "" where none does."""
    words = [part.lower() for part in relative.parent.parts] + re.findall("[a-z]+", relative.name.lower())
    for word in words:
        for split, names in SPLITS.items():
            if word in names:
                return split
        if word == asked.lower():
            return asked
    return ""
