"""The page's own files beside this one: markup, scripts, style"""

from __future__ import annotations

from importlib.resources import files


def read_asset(name: str) -> str:
    """The text of a file."""
    return files("hartist.serving.page").joinpath(name).read_text(encoding="utf-8")


def read_script(name: str) -> str:
    """A script, with the functions that all of them use before it."""
    return read_asset("make.js") + read_asset(name)
