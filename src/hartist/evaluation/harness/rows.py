"""Figures and the rows they come from, collected on the way to a result"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hartist.checkpoint import write_safetensors
from hartist.evaluation.benchmarks.base import Item, categories
from hartist.evaluation.harness.result import ROWS, Better, Figure, Kind


@dataclass
class Findings:
    """What is found about the pictures of `items`."""

    items: Sequence[Item]
    names: list[str]
    """The categories."""
    figures: list[Figure] = field(default_factory=list)
    rows: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """The files by their path relative to the result."""
    made_by: dict[str, dict[str, str]] = field(default_factory=dict)
    """Their metadata."""

    @classmethod
    def of(cls, items: Sequence[Item]) -> Findings:
        return cls(items, categories(items))

    @property
    def category_N(self) -> Int[Tensor, " n"]:
        """Each item's index into the categories, −1 for none."""
        return indices([item.category for item in self.items], self.names)

    def add_rows(self, name: str, tensors: dict[str, Tensor], key: str | None = None) -> str:
        """Keep what figures are computed from; returns the file's name in the result. `key`: the network's."""
        path = f"{ROWS}/{slug(name)}.safetensors"
        self.rows[path] = {**tensors, "categories": self.category_N}
        if key is not None:
            self.made_by[path] = {"network": key}
        return path

    def add(
        self,
        metric: str,
        network: str | None,
        category: str | None,
        value: float,
        count: int,
        better: Better,
        kind: Kind = "other",
        rows: str | None = None,
    ) -> None:
        self.figures.append(Figure(metric, network, category, float(value), count, better, kind, rows))

    def add_means(
        self, metric: str, network: str | None, value_N: Float[Tensor, " n"], better: Better = "higher"
    ) -> None:
        """The mean of a value a picture, NaN where it was not measured: overall and by category."""
        rows = self.add_rows(f"{metric} {network or ''}", {"values": value_N.float()})
        for category, chosen_N in self.groups():
            measured = value_N.float()[chosen_N & ~value_N.isnan()].double()
            if len(measured):
                self.add(metric, network, category, measured.mean().item(), len(measured), better, "mean", rows)

    def groups(self) -> list[tuple[str | None, Tensor]]:
        """All pictures, then those of each category, as masks; one category alone is no more than all."""
        category_N = self.category_N
        every = [(None, torch.ones(len(category_N), dtype=torch.bool))]
        return [*every, *((name, category_N == i) for i, name in enumerate(self.names) if len(self.names) > 1)]

    def save(self, out: Path) -> None:
        """Write the rows, each file atomically."""
        for name, tensors in self.rows.items():
            write_safetensors(out / name, tensors, self.made_by.get(name))


def indices(of: Sequence[str], names: Sequence[str]) -> Int[Tensor, " n"]:
    """Each one's place among the names, −1 for what is not there."""
    places = {name: i for i, name in enumerate(names)}
    return torch.tensor([places.get(name, -1) for name in of], dtype=torch.int64)


def slug(name: str) -> str:
    """A file's name of a metric's or network's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
