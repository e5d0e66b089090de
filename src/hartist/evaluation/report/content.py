"""What a report consists of, apart from how it looks: sections of texts, tables, galleries and plots

Texts are plain; whoever writes HTML or Markdown escapes them. Pictures and plots are assets of the page, named files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Tile:
    """One figure that is meant to be seen first."""

    title: str
    value: str
    detail: str


@dataclass(frozen=True)
class Tiles:
    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Table:
    """The first column holds names, the others are numbers unless `numeric` is False."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: bool = True


@dataclass(frozen=True)
class Shown:
    """A picture by its asset's name; the label stands below it."""

    asset: str
    alt: str
    label: str = ""


@dataclass(frozen=True)
class Card:
    """Pictures that belong together, and what they have in common."""

    pictures: Sequence[Shown]
    caption: str
    detail: str = ""


@dataclass(frozen=True)
class Gallery:
    cards: Sequence[Card]


@dataclass(frozen=True)
class Plots:
    """Plots side by side where there is room."""

    plots: Sequence[Shown]


Part = Text | Tiles | Table | Gallery | Plots


@dataclass(frozen=True)
class Section:
    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    title: str
    subtitle: str
    sections: Sequence[Section]
    assets: Mapping[str, bytes] = field(default_factory=dict)
    """Pictures (.webp) and plots (.svg) by name."""
