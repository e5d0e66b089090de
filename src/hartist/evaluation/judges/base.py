"""Judges: what benchmarks need to know about a picture, as interfaces, so that any model can stand behind them

A figure names its judge. Published figures are of published judges; those of another one compare only with each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, UInt8
from torch import Tensor

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels; right and bottom are the first outside."""


@dataclass(frozen=True)
class Detection:
    """An object that a detector found."""

    label: str
    score: float
    """From 0 to 1."""
    box: Box
    mask: Bool[Tensor, "h w"] | None = None
    """Which pixels of the picture belong to it, where the detector tells."""


@runtime_checkable
class Detector(Protocol):
    """Finds objects."""

    @property
    def name(self) -> str:
        """As reports name it."""

    @property
    def labels(self) -> frozenset[str]:
        """What it can find, by COCO's names in GenEval's spelling."""

    def detect(self, picture_HW3: UInt8[Tensor, "h w 3"], threshold: float) -> list[Detection]:
        """Objects with scores above `threshold`, in any order."""


@runtime_checkable
class ColourJudge(Protocol):
    """Tells the colours of objects."""

    @property
    def name(self) -> str:
        """As reports name it."""

    def colours(
        self, picture_HW3: UInt8[Tensor, "h w 3"], found: Sequence[Detection], colours: Sequence[str]
    ) -> list[str]:
        """For each detection, all of one label, which of `colours` it has."""


@runtime_checkable
class Answerer(Protocol):
    """Answers questions about a picture (visual question answering)."""

    @property
    def name(self) -> str:
        """As reports name it."""

    def answer(self, picture_HW3: UInt8[Tensor, "h w 3"], questions: Sequence[str]) -> list[str]:
        """A short answer, such as "yes", to each question."""
