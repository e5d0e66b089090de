"""What commands share: places to write to, file names, threads, contact sheets."""

from __future__ import annotations

import math
import re
import tempfile
import unicodedata
from pathlib import Path

import torch
from PIL import Image

from hartist.errors import UserError

SHEET_LIMIT = 4096
"""Pixels that a contact sheet may have along a side; its pictures shrink to fit."""
GAP = 4
SLUG_LENGTH = 40
ROWS_LIMIT = 32


def require_writable(target: Path, *, replaced: bool = False) -> None:
    """Raise a UserError unless files can be written to the folder `target`, which need not exist.

    `replaced` asks instead for what will be renamed onto `target`, a file or folder. Leaves no trace.
    """
    try:
        paths = (target.absolute(), *target.absolute().parents)[replaced:]
        tempfile.TemporaryFile(dir=next(path for path in paths if path.exists())).close()
    except OSError as error:
        raise UserError(f"cannot write {target} ({error.strerror or error}); choose a writable place") from error


def use_threads(threads: int | None) -> None:
    """Set the number of CPU threads. Raises UserError below 1."""
    if threads is None:
        return
    if not 1 <= threads <= 4096:
        raise UserError(f"{threads} threads; give a number from 1 to 4096, or leave --threads out")
    torch.set_num_threads(threads)


def slug(text: str, fallback: str = "image") -> str:
    """`text` as a part of a file name on any system: ASCII letters and digits joined by hyphens, at most 40.

    >>> slug("A red apple, 3D"), slug("../Crème brûlée"), slug("猫")
    ('a-red-apple-3d', 'creme-brulee', 'image')
    """
    ascii_text = unicodedata.normalize("NFKD", text[:1000]).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text)[: SLUG_LENGTH + 1].strip("-")[:SLUG_LENGTH].strip("-") or fallback


class ContactSheet:
    """All images of a call on one page, kept as thumbnails only: its memory does not grow with theirs."""

    def __init__(self, prompts: int, per_prompt: int, size: tuple[int, int]) -> None:
        """`size` is (width, height) of every image. A row a prompt, or one near-square of all images."""
        count = prompts * per_prompt
        by_prompt = prompts > 1 and per_prompt > 1 and max(prompts, per_prompt) <= ROWS_LIMIT
        self.columns = per_prompt if by_prompt else math.ceil(math.sqrt(count))
        rows = math.ceil(count / self.columns)
        scale = min(1.0, (SHEET_LIMIT / self.columns - GAP) / size[0], (SHEET_LIMIT / rows - GAP) / size[1])
        self.cell = (max(1, int(size[0] * scale)), max(1, int(size[1] * scale)))
        width, height = self.columns * (self.cell[0] + GAP) - GAP, rows * (self.cell[1] + GAP) - GAP
        self.image = Image.new("RGB", (width, height), "white")
        self._next = 0

    def add(self, image: Image.Image) -> None:
        """Put the next image on the page."""
        row, column = divmod(self._next, self.columns)
        if image.size != self.cell:
            image = image.resize(self.cell, Image.Resampling.LANCZOS)
        self.image.paste(image, (column * (self.cell[0] + GAP), row * (self.cell[1] + GAP)))
        self._next += 1
