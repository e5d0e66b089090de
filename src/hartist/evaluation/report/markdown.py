"""A page as Markdown, as GitHub and its like show it; pictures and plots lie in a folder beside it"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import quote

from hartist.evaluation.report.content import Card, Gallery, Page, Part, Plots, Section, Shown, Table, Text, Tiles

SPECIAL = re.compile(r"([\\`*_\[\]<>#|~$&!])")
"""What means something within a line of Markdown, and nothing after a backslash.

What means something at the beginning of a line only stays as it is: no line begins with a prompt."""
COLUMNS = 6
"""Pictures in a row."""


def render_markdown(page: Page, folder: str) -> str:
    """The file's text; `folder` is where the page's assets are, relative to it."""
    parts = [f"# {text(page.title)}", text(page.subtitle), *(_section(section, folder) for section in page.sections)]
    return "\n\n".join(parts) + "\n"


def text(value: str) -> str:
    """Escaped, on one line."""
    return SPECIAL.sub(r"\\\1", " ".join(value.split()))


def _section(section: Section, folder: str) -> str:
    return "\n\n".join([f"## {text(section.title)}", *(_part(part, folder) for part in section.parts)])


def _part(part: Part, folder: str) -> str:
    match part:
        case Text():
            return text(part.text)
        case Tiles():
            rows = [(tile.title, tile.value, tile.detail) for tile in part.tiles]
            return _table(Table(("", "", ""), rows))
        case Table():
            return _table(part)
        case Gallery():
            return _gallery(part, folder)
        case Plots():
            return "\n\n".join(f"{text(plot.label)}\n\n{_image(plot, folder)}" for plot in part.plots)


def _table(table: Table) -> str:
    rule = "|" + "|".join(["---", *(["---:" if table.numeric else "---"] * (len(table.head) - 1))]) + "|"
    return "\n".join([_row([text(cell) for cell in table.head]), rule, *(_row(map(text, row)) for row in table.rows)])


def _gallery(gallery: Gallery, folder: str) -> str:
    """A table of pictures: one card a cell, or a card a row where it has several pictures."""
    widest = max((len(card.pictures) for card in gallery.cards), default=1)
    if widest > 1:
        rows = [[_caption(card), *(_cell(shown, folder) for shown in card.pictures)] for card in gallery.cards]
    else:
        cells = [f"{_image(card.pictures[0], folder)}<br>{_caption(card)}" for card in gallery.cards]
        rows = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    width = max((len(row) for row in rows), default=1)
    filled = [row + [""] * (width - len(row)) for row in rows]
    return "\n".join([_row([""] * width), "|" + "---|" * width, *map(_row, filled)])


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _caption(card: Card) -> str:
    return text(card.caption) + (f"<br>{text(card.detail)}" if card.detail else "")


def _cell(shown: Shown, folder: str) -> str:
    return _image(shown, folder) + (f"<br>{text(shown.label)}" if shown.label else "")


def _image(shown: Shown, folder: str) -> str:
    return f"![{text(shown.alt)}]({quote(folder)}/{quote(shown.asset)})"
