"""Which pictures of a dataset are measured, and how they are read

Rows may say what they are (`family`, `split_kind`, `background`, as `hartist data emoji` writes them); where
they don't, each caption is its own family, the kind is the split's name, and every background counts as white.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from hartist.data.folder import CaptionedImage, load_captioned_folder, read_image
from hartist.errors import UserError


def load_rows(data: Path, split: str, *, all_backgrounds: bool = False) -> list[CaptionedImage]:
    """The rows of one split, those on white unless `all_backgrounds`, in an order that has to do with nothing.

    The first n are thus a fair sample of them all, the same on every machine.
    Raises UserError as `load_captioned_folder` does, or if no row is left.
    """
    rows = load_captioned_folder(data, split)
    kept = [row for row in rows if all_backgrounds or row.extra.get("background", "white") == "white"]
    if not kept:
        raise UserError(f"{data / split} has no picture on white; measure with --all-backgrounds")
    return sorted(kept, key=lambda row: hashlib.sha256(f"{row.path.name}|{row.text}".encode()).digest())


def family(row: CaptionedImage) -> str:
    """What a picture shares with its twins: the same thing in other styles, genders, skin tones."""
    return str(row.extra.get("family", row.text))


def by_kind(rows: Sequence[CaptionedImage], split: str) -> dict[str, list[CaptionedImage]]:
    """Rows by `split_kind`: train, unseen_pair (thing and style known, not together), unseen_concept."""
    kinds: dict[str, list[CaptionedImage]] = {}
    for row in rows:
        kinds.setdefault(str(row.extra.get("split_kind", split)), []).append(row)
    return kinds


def read_pictures(rows: Sequence[CaptionedImage], size: tuple[int, int]) -> Iterator[UInt8[Tensor, "h w 3"]]:
    """The pictures one after the other, the centre of each resized to `size` (height, width).

    Raises UserError if a file is missing, broken or no image.
    """
    height, width = size
    side = max(size)
    top, left = (side - height) // 2, (side - width) // 2
    for row in rows:
        square = torch.from_numpy(read_image(row.path, side))
        yield square[top : top + height, left : left + width]
