"""Reading foreign configurations: each value is checked, or its default taken from the tensors' shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hartist.errors import UserError

Values = Mapping[str, Any]
Tensors = Mapping[str, Tensor]


def refuse(values: Values, where: str, **only: Any) -> None:
    """Raise a UserError that names an argument whose value is another than the only one supported."""
    for name, supported in only.items():
        if values.get(name) is not None and values[name] != supported:
            raise UserError(f"{where}: {name} = {values[name]!r} is not supported; only {supported!r} is")


def _value(values: Values, name: str, default: Any) -> Any:
    """`null` counts as not given."""
    value = values.get(name)
    return default if value is None else value


def number(values: Values, name: str, where: str, default: int, minimum: int = 1) -> int:
    value = _value(values, name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise UserError(f"{where}: {name} is {value!r}; it must be a whole number of at least {minimum}")
    return value


def numbers(values: Values, name: str, where: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value = _value(values, name, default)
    if not isinstance(value, list | tuple) or not value or any(not isinstance(n, int) or n < 1 for n in value):
        raise UserError(f"{where}: {name} is {value!r}; it must be a list of whole numbers of at least 1")
    return tuple(value)


def real(values: Values, name: str, where: str, default: float) -> float:
    value = _value(values, name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: {name} is {value!r}; it must be a number")
    return float(value)


def flag(values: Values, name: str, where: str, default: bool) -> bool:
    value = _value(values, name, default)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {name} is {value!r}; it must be true or false")
    return value


def choice(values: Values, name: str, where: str, options: tuple[str, ...], default: str) -> str:
    value = _value(values, name, default)
    if value not in options:
        known = " or ".join(repr(option) for option in options)
        raise UserError(f"{where}: {name} {value!r} is not supported; use {known}")
    return value


def size(tensors: Tensors, key: str, axis: int, default: int) -> int:
    """Length of one axis of a tensor; `default` without the tensor."""
    tensor = tensors.get(key)
    return default if tensor is None or tensor.ndim <= axis else tensor.shape[axis]


def count(tensors: Tensors, pattern: str) -> int:
    """1 + the largest number that `pattern` captures in a whole key; 0 if none fits."""
    matches = (re.fullmatch(pattern, key) for key in tensors)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def contains(tensors: Tensors, pattern: str) -> bool:
    """Whether `pattern` occurs in any key."""
    return any(re.search(pattern, key) for key in tensors)
