"""The pictures that a report shows: at random, the best and the worst; as small files"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from hartist.data.transform import BrokenImage, decode
from hartist.errors import UserError

SIDE = 320
"""Pixels that a picture keeps along its longer side."""
QUALITY = 88


@dataclass
class Assets:
    """Pictures and plots of a page by name; a picture shown twice is kept once."""

    files: dict[str, bytes] = field(default_factory=dict)
    _names: dict[Path, str] = field(default_factory=dict)

    def picture(self, path: Path) -> str:
        """Add a picture file, made smaller; returns its name. Raises UserError if it can't be read."""
        if path not in self._names:
            try:
                image = decode(path)
            except BrokenImage as error:
                raise UserError(f"{path} cannot be read as an image ({error}); replace or remove it") from error
            image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=QUALITY, method=4)
            self._names[path] = f"picture-{len(self._names):03d}.webp"
            self.files[self._names[path]] = buffer.getvalue()
        return self._names[path]

    def plot(self, name: str, svg: bytes) -> str:
        """Add a plot; returns its file's name."""
        self.files[f"{name}.svg"] = svg
        return f"{name}.svg"


def draw(count: int, wanted: int, seed: int) -> list[int]:
    """Places of `wanted` of `count` pictures, or all, in their order."""
    return sorted(random.Random(seed).sample(range(count), min(wanted, count)))


@dataclass(frozen=True)
class Extremes:
    """Places of pictures: `best` and `worst` first, never in both."""

    best: Sequence[int]
    worst: Sequence[int]


def extremes(values_N: Float[Tensor, " n"], wanted: int, *, lower_is_better: bool) -> Extremes:
    """The pictures at either end of a metric; those not measured (NaN) are left out."""
    measured = torch.nonzero(~values_N.isnan())[:, 0]
    order = measured[values_N[measured].argsort(stable=True, descending=not lower_is_better)].tolist()
    wanted = min(wanted, len(order) // 2)
    return Extremes(order[:wanted], order[::-1][:wanted])
