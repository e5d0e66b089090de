"""A page as one HTML file: pictures and plots are inside, nothing is loaded, light and dark by the reader's choice

It is well-formed XML as well, so that a test can read it strictly.
"""

from __future__ import annotations

import base64
import re
from html import escape

from hartist.evaluation.report.content import Card, Gallery, Page, Part, Plots, Section, Shown, Table, Text, Tiles
from hartist.evaluation.report.style import STYLE

UNPRINTABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What no XML file may hold, escaped or not."""
PROLOG = re.compile(r"^.*?(?=<svg\b)", re.DOTALL)


def render_html(page: Page) -> str:
    """The whole file."""
    sections = "\n".join(_section(section, page) for section in page.sections)
    links = "".join(f'<a href="#{_anchor(section.title)}">{text(section.title)}</a>' for section in page.sections)
    return f"""<!DOCTYPE html>
<html lang="en" xmlns="http://www.w3.org/1999/xhtml">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<meta name="color-scheme" content="light dark" />
<title>{text(page.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{text(page.title)}</h1><p>{text(page.subtitle)}</p><nav>{links}</nav></header>
<main>
{sections}
</main>
</body>
</html>
"""


def text(value: str) -> str:
    """Escaped, for elements and attributes."""
    return escape(UNPRINTABLE.sub("\ufffd", value))


def _section(section: Section, page: Page) -> str:
    parts = "\n".join(_part(part, page) for part in section.parts)
    return f'<section id="{_anchor(section.title)}">\n<h2>{text(section.title)}</h2>\n{parts}\n</section>'


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _part(part: Part, page: Page) -> str:
    match part:
        case Text():
            return f"<p>{text(part.text)}</p>"
        case Tiles():
            tiles = "".join(
                f'<div class="tile"><span>{text(tile.title)}</span><b>{text(tile.value)}</b>'
                f"<small>{text(tile.detail)}</small></div>"
                for tile in part.tiles
            )
            return f'<div class="tiles">{tiles}</div>'
        case Table():
            return _table(part)
        case Gallery():
            widest = max((len(card.pictures) for card in part.cards), default=1)
            cards = "\n".join(_card(card, page) for card in part.cards)
            return f'<div class="gallery{" wide" if widest > 1 else ""}">\n{cards}\n</div>'
        case Plots():
            return f'<div class="plots">{"".join(_plot(plot, i, page) for i, plot in enumerate(part.plots))}</div>'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in table.head)
    rows = "".join(
        f'<tr><th scope="row">{text(row[0])}</th>{"".join(f"<td>{text(cell)}</td>" for cell in row[1:])}</tr>\n'
        for row in table.rows
    )
    kind = "numbers" if table.numeric else "facts"
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>'
    )


def _card(card: Card, page: Page) -> str:
    pictures = "".join(
        f'<div><img src="data:image/webp;base64,{base64.b64encode(page.assets[shown.asset]).decode()}" '
        f'alt="{text(shown.alt)}" loading="lazy" />{f"<small>{text(shown.label)}</small>" if shown.label else ""}</div>'
        for shown in card.pictures
    )
    detail = f"<small>{text(card.detail)}</small>" if card.detail else ""
    return (
        f'<figure><div class="pictures">{pictures}</div><figcaption>{text(card.caption)}{detail}</figcaption></figure>'
    )


def _plot(plot: Shown, number: int, page: Page) -> str:
    """The drawing itself, so that it takes the page's colours; its ids are made unlike those of other plots."""
    svg = PROLOG.sub("", page.assets[plot.asset].decode("utf-8"))
    prefix = re.sub(r"[^a-z0-9]+", "-", plot.asset.lower()) + f"-{number}-"
    svg = re.sub(r'(\bid="|"#|url\(#)', lambda found: found[0] + prefix, svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{text(plot.alt)}" ', 1)
    return f"<figure><figcaption>{text(plot.label)}</figcaption>{svg}</figure>"
