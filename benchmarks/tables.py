"""Tables for people: rows of text as Markdown, and what the figures were taken on"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table whose header is the keys of the rows; the first column is left-aligned, figures right-aligned."""
    names = list(rows[0])
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in names]

    def line(cells: Sequence[str]) -> str:
        first, *others = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        padded = [cell.strip().rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        return f"| {' | '.join([first, *padded])} |"

    rule = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return "\n".join([line(names), line(rule), *(line([row[name] for name in names]) for row in rows)])


def describe(machine: Mapping[str, Any]) -> str:
    """One line about `hartist.evaluation.bench.machine`."""
    return "{cpu}, {threads} threads, torch {torch}".format(**machine)
