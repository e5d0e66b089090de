"""Changing a recipe's settings by their names, as the command line does"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, TypeVar, get_type_hints

from hartist.config import fits
from hartist.errors import UserError, quoted

Config = TypeVar("Config")


def with_setting(config: Config, assignment: str) -> Config:
    """The config (a dataclass of dataclasses) with one field changed: `losses.l1=2`, `run.optimizer.betas=[0.9,0.99]`.

    Values are JSON, or plain words. Raises UserError for a name that there isn't, or a value that doesn't fit.
    """
    name, equals, text = assignment.partition("=")
    if not equals:
        raise UserError(f"--set {quoted(assignment)} is no NAME=VALUE")
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError:
        value = text
    return _replaced(config, name.split("."), _tuples(value), assignment)


def _replaced(config: Config, path: list[str], value: Any, assignment: str) -> Config:
    assert dataclasses.is_dataclass(config)
    names = [field.name for field in dataclasses.fields(config)]
    if path[0] not in names:
        raise UserError(f"--set {quoted(assignment)}: no setting {quoted(path[0])}; there are {', '.join(names)}")
    current = getattr(config, path[0])
    if len(path) > 1:
        if not dataclasses.is_dataclass(current):
            raise UserError(f"--set {quoted(assignment)}: {path[0]} has no settings of its own")
        value = _replaced(current, path[1:], value, assignment)
    else:
        kind = get_type_hints(type(config))[path[0]]
        if not fits(value, kind):
            raise UserError(f"--set {quoted(assignment)}: {quoted(value)} doesn't fit; it is now {quoted(current)}")
        value = float(value) if kind is float else value
    try:
        return dataclasses.replace(config, **{path[0]: value})  # type: ignore[type-var]
    except (ArithmeticError, TypeError) as error:
        raise UserError(f"--set {quoted(assignment)}: {error}") from error


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
