"""Offline batches: what is there of a plan, what is missing, and making it

A picture is there when the manifest has it, made from the same request by the same model, and its file still has the
bytes the manifest tells. Batches are formed from the whole plan, whatever is missing and whoever makes them, so a
file of prompts gives the same pictures in one go or in ten.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hartist.errors import UserError
from hartist.files import write_bytes
from hartist.generation.offline_plan import Picture
from hartist.generation.pipeline import Pipeline, Request, override
from hartist.generation.png import encode_png, metadata

MANIFEST = "manifest.jsonl"


# ---------------------------------------------------------------------- what is there


class Manifest:
    """The pictures of a folder and the file that lists them, appended to line by line: use it as a context.

    A line that a killed process left unfinished is dropped. Raises UserError for what is no manifest.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / MANIFEST
        self.entries: dict[str, dict[str, Any]] = {}
        """Of each file; the last line counts."""

    def __enter__(self) -> Manifest:
        whole = self.path.read_bytes() if self.path.exists() else b""
        good = whole[: whole.rfind(b"\n") + 1]
        for number, line in enumerate(good.splitlines(), start=1):
            try:
                entry = json.loads(line)
                self.entries[entry["file"]] = entry
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{self.path} line {number} is no entry of a manifest; move the file away") from error
        if len(good) < len(whole) or not self.path.exists():
            write_bytes(self.path, good)
        self._file = self.path.open("ab")
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            os.fsync(self._file.fileno())

    def has(self, picture: Picture, model: str) -> bool:
        """Whether this very picture is there, whole."""
        entry = self.entries.get(picture.file, {})
        if entry.get("key") != picture.key(model):
            return False
        try:
            return hashlib.sha256((self.folder / picture.file).read_bytes()).hexdigest() == entry.get("sha256")
        except OSError:
            return False

    def add(self, made: Made, model: str) -> None:
        """Write a picture, then its line: what has a line is whole."""
        picture = made.picture
        write_bytes(self.folder / picture.file, made.png)
        entry = {
            "file": picture.file,
            "line": picture.line,
            "id": picture.id,
            **made.facts,
            "sha256": hashlib.sha256(made.png).hexdigest(),
            "seconds": round(made.seconds, 3),
            "key": picture.key(model),
        }
        self._file.write(json.dumps(entry, ensure_ascii=False).encode("utf-8") + b"\n")
        self._file.flush()
        self.entries[picture.file] = entry


# ---------------------------------------------------------------------- what is made


@dataclass(frozen=True)
class Batch:
    """Pictures made at once, and the files that are wanted of them."""

    pictures: tuple[Picture, ...]
    wanted: frozenset[str]


@dataclass(frozen=True)
class Made:
    """A finished picture."""

    picture: Picture
    png: bytes
    facts: dict[str, Any]
    """What its PNG says of itself, and `truncated_tokens`."""
    seconds: float
    """Its share of the batch's time."""


def batches(plan: Iterable[Picture], missing: Iterable[Picture], size: int) -> list[Batch]:
    """Those batches of the plan that something is missing of: `size` pictures with the same settings in each.

    One of which only a part is missing is made whole: beside other pictures, rounding could differ in the last bit.
    """
    wanted = {picture.file for picture in missing}
    alike: dict[tuple[Any, ...], list[Picture]] = {}
    for picture in plan:
        alike.setdefault((picture.changes, picture.negative_prompt), []).append(picture)
    found = []
    for pictures in alike.values():
        for start in range(0, len(pictures), size):
            part = tuple(pictures[start : start + size])
            lacking = frozenset(picture.file for picture in part) & wanted
            if lacking:
                found.append(Batch(part, lacking))
    return found


def check_plan(pipe: Pipeline, plan: Sequence[Picture]) -> None:
    """Raise a UserError that names the first line which this model can't serve."""
    for picture in plan:
        try:
            settings = override(pipe.model.settings, **dict(picture.changes))
            pipe.check([Request(picture.prompt, picture.seed)], picture.negative_prompt, 1, settings)
        except UserError as error:
            raise UserError(f"line {picture.line}: {error}") from error


def make(pipe: Pipeline, batch: Batch) -> list[Made]:
    """The wanted pictures of a batch, in the plan's order. Raises UserError if there is too little memory."""
    started = time.monotonic()
    first = batch.pictures[0]
    try:
        results = list(
            pipe.generate(
                [Request(picture.prompt, picture.seed) for picture in batch.pictures],
                settings=override(pipe.model.settings, **dict(first.changes)),
                negative_prompt=first.negative_prompt,
                batch_size=len(batch.pictures),
            )
        )
    except torch.OutOfMemoryError as error:
        raise UserError(f"{pipe.device} has too little memory for this batch; lower --batch-size") from error
    seconds = (time.monotonic() - started) / len(results)
    made = []
    for picture, result in zip(batch.pictures, results, strict=True):
        if picture.file in batch.wanted:
            values = metadata(result)
            facts = values | {"truncated_tokens": result.truncated_tokens}
            made.append(Made(picture, encode_png(result.image, values), facts, seconds))
    return made
