"""Folders of images with captions, in the form that Hugging Face `datasets` calls an ImageFolder.

ROOT/train/metadata.jsonl     one JSON object a line: file_name, text, optionally captions, anything else
ROOT/train/….png              the images that file_name names, relative to the metadata file
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from hartist.data.transform import BrokenImage, decode, prepare
from hartist.errors import UserError


@dataclass(frozen=True)
class CaptionedImage:
    """An image on disk and what it shows.

    `text` is the one caption to evaluate with, `captions` are all those to train with (`text` among them
    unless the file says otherwise, never empty). `extra` holds every other column of the metadata.
    """

    path: Path
    text: str
    captions: tuple[str, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)


def _parse_row(line: str, where: str, folder: Path) -> CaptionedImage:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}); correct the line or remove it") from error
    if not isinstance(row, dict):
        raise UserError(f'{where} is not a JSON object; write {{"file_name": …, "text": …}}')
    for key in ("file_name", "text"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(f"{where} has no {key}; give it one, as a non-empty string")
    captions = row.get("captions") or [row["text"]]
    if not isinstance(captions, list) or not all(isinstance(c, str) and c.strip() for c in captions):
        raise UserError(f"{where}: captions must be a list of non-empty strings")
    path = folder / row["file_name"]
    if not path.is_file():
        raise UserError(f"{where} names {row['file_name']}, which is not in {folder}; add it or remove the line")
    extra = {key: value for key, value in row.items() if key not in ("file_name", "text", "captions")}
    return CaptionedImage(path=path, text=row["text"], captions=tuple(captions), extra=extra)


def load_captioned_folder(path: Path, split: str) -> list[CaptionedImage]:
    """The images of one split, in the order of its metadata. Reads no pixels.

    Raises UserError, naming the file and the line, if the metadata or an image is missing, if a line is
    not a JSON object with file_name and text, or if there is no line at all.
    """
    folder = Path(path) / split
    metadata = folder / "metadata.jsonl"
    try:
        lines = metadata.read_text(encoding="utf-8").split("\n")  # splitlines would also split at U+2028
    except FileNotFoundError as error:
        raise UserError(
            f"{metadata} does not exist; build a dataset with `hartist data emoji`, or write one JSON line "
            "per image with file_name and text"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{metadata} cannot be read as UTF-8 text ({error}); write it again") from error
    rows = [
        _parse_row(line, f"{metadata} line {number}", folder)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not rows:
        raise UserError(f"{metadata} is empty; write one JSON line per image with file_name and text")
    return rows


def read_image(path: Path, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """An image as RGB on white, its centre square resized to `size` × `size`.

    Raises UserError if the file is missing, broken or no image.
    """
    try:
        return prepare(decode(path), size)
    except BrokenImage as error:
        if not path.exists():
            raise UserError(f"{path} does not exist") from error
        raise UserError(f"{path} cannot be read as an image ({error}); replace or remove it") from error
