"""The page's own files beside this one: markup, scripts, style"""

from __future__ import annotations

from importlib.resources import files


def read_asset(name: str) -> str:
    """The text of a file."""
    return files("hartist.serving.page").joinpath(name).read_text(encoding="utf-8")
