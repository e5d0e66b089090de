"""Class-conditional generation on ImageNet: as many pictures of every class, FID and IS (VAR, table 1; ADM's protocol)

`--data` is what the pictures are compared with:

    DIR                   a folder of real pictures, in folders by class or not
    FILE.safetensors      their features: `features` float32 [M, D], and the network's name in the metadata

50,000 pictures are 50 of each of 1,000 classes. The published FIDs are taken to the 50,000 pictures that ADM's
authors give in one file; its pictures, written to a folder, serve here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hartist.errors import UserError
from hartist.evaluation.benchmarks.base import Item, Reference, images_in, limited

CLASSES = 1000
PER_CLASS = 50


@dataclass(frozen=True)
class ImageNet:
    """Raises UserError for a folder without pictures."""

    data: Path
    limit: int | None = None
    per_prompt: int = PER_CLASS
    classes: int = CLASSES

    name = "imagenet"
    title = "ImageNet, class-conditional"

    def items(self) -> list[Item]:
        self.references()
        items = [
            Item(f"{label:04d}_{j:03d}", label, j) for label in range(self.classes) for j in range(self.per_prompt)
        ]
        return limited(items, self.limit, key=lambda item: str(item.prompt))

    def references(self) -> list[Reference]:
        if self.features is not None:
            return []
        found = images_in(self.data)
        if len(found) < 2:
            raise UserError(f"{self.data} has {len(found)} picture; a reference needs at least 2, better 50,000")
        return [Reference(path) for path in found]

    @property
    def features(self) -> Path | None:
        """The file of features that stands for the pictures."""
        return self.data if self.data.suffix == ".safetensors" else None

    def metrics(self) -> tuple[str, ...]:
        return "frechet", "is", "precision", "recall"

    def settings(self) -> Mapping[str, Any]:
        return {"classes": self.classes, "classes_at_most": self.limit, "pictures_per_class": self.per_prompt}
