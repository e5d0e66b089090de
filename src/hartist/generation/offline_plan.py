"""Offline batches: what a file of prompts asks for, one JSON object a line"""

from __future__ import annotations

import hashlib
import json
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hartist.errors import UserError, quoted
from hartist.generation.pipeline import override
from hartist.generation.prompts import check_prompt, check_text
from hartist.generation.sampling import SamplingSettings

MAX_PICTURES = 1_000_000
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
SETTINGS = {
    name: tuple(typing.get_origin(kind) or kind for kind in typing.get_args(hint) or (hint,))
    for name, hint in typing.get_type_hints(SamplingSettings).items()
}
"""What a line may set, and the types of each; a tuple is a list of numbers."""
WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", tuple: "a list of numbers"}
FIELDS = ("prompt", "id", "seed", "n", "negative_prompt", *SETTINGS)


@dataclass(frozen=True)
class Picture:
    """One picture to make."""

    file: str
    line: int
    """Of the file of prompts, from 1."""
    id: str | None
    prompt: str | int
    seed: int
    negative_prompt: str | None
    changes: tuple[tuple[str, Any], ...]
    """To the model's own settings, by name."""

    def key(self, model: str) -> str:
        """Of everything that decides what the picture shows; `model` tells the model's files."""
        decisive = [self.prompt, self.seed, self.negative_prompt, self.changes, model]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Defaults:
    """For what a line leaves open."""

    seed: int = 0
    n: int = 1
    negative_prompt: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)


def read_plan(path: Path, defaults: Defaults) -> list[Picture]:
    """The pictures of a file with one JSON object a line; blank lines are skipped.

    Raises UserError for a file that can't be read, and one that names all its broken lines.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path} cannot be read as UTF-8 text ({error})") from error
    pictures: dict[str, Picture] = {}
    problems: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            for picture in _parse(line, number, defaults):
                other = pictures.setdefault(picture.file.casefold(), picture)
                if other is not picture:
                    raise UserError(f"line {other.line} asks for {picture.file} already; give another id or seed")
                if len(pictures) > MAX_PICTURES:
                    raise UserError(f"there are more than {MAX_PICTURES} pictures; split the file")
        except UserError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        more = f"; and {len(problems) - 3} more broken lines" if len(problems) > 3 else ""
        raise UserError(f"{path} {'; '.join(problems[:3])}{more}")
    if not pictures:
        raise UserError(f'{path} holds no prompts; write one JSON object a line, such as {{"prompt": "a red apple"}}')
    return list(pictures.values())


def _parse(line: str, number: int, defaults: Defaults) -> Iterator[Picture]:
    """The pictures that a line asks for; null is as if left out. Raises UserError."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"no JSON ({error.msg} at character {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise UserError("no JSON that could be a request") from error
    if not isinstance(values, dict):
        raise UserError('no JSON object; write {"prompt": …}')
    for name in values:
        if name not in FIELDS:
            raise UserError(f"unknown field {quoted(name)}; there are {', '.join(FIELDS)}")
    values = {name: value for name, value in values.items() if value is not None}
    prompt = _typed(values, "prompt", (str, int))
    if prompt is None:
        raise UserError("there is no prompt")
    check_prompt(prompt)
    negative_prompt = _typed(values, "negative_prompt", (str,), defaults.negative_prompt)
    if negative_prompt:
        check_text(negative_prompt, "the negative prompt")
    own = {name: _typed(values, name, kinds) for name, kinds in SETTINGS.items() if name in values}
    changes = tuple(sorted((dict(defaults.changes) | own).items()))
    override(SamplingSettings(), **dict(changes))
    name = _typed(values, "id", (str,))
    if name is not None and not NAME.fullmatch(name):
        raise UserError(f"the id {quoted(name)} makes no file name; use up to 100 letters, digits, dots, _ and -")
    n = _typed(values, "n", (int,), defaults.n)
    if not 1 <= n <= MAX_PICTURES:
        raise UserError(f"n is {quoted(n)}; give 1 to {MAX_PICTURES}")
    first = _typed(values, "seed", (int,), defaults.seed)
    if not -(2**63) <= first <= 2**64 - n:
        raise UserError(f"the seed {quoted(first)} does not fit into 64 bits; choose a smaller one")
    for seed in range(first, first + n):
        file = f"{name or f'{number:06d}'}_seed{seed}.png"
        yield Picture(file, number, name, prompt, seed, negative_prompt or None, changes)


def _typed(values: Mapping[str, Any], name: str, kinds: tuple[type, ...], default: Any = None) -> Any:
    """A field's value if it is of one of these types: an int becomes a float, a bool is neither. Raises UserError."""
    value = values.get(name, default)
    if value is None:
        return None
    if tuple in kinds and isinstance(value, list):
        value = tuple(_typed({name: number}, name, (float,)) for number in value)
    allowed = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in kinds):
        raise UserError(
            f"{name} is {quoted(value)}; give {' or '.join(WORDS[kind] for kind in kinds if kind in WORDS)}"
        )
    try:
        return float(typing.cast(Any, value)) if float in kinds else value
    except OverflowError as error:
        raise UserError(f"{name} is {quoted(value)}; that is too large") from error
