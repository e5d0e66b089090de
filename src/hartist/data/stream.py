"""An endless or single pass over a dataset, shared out to ranks and workers, that can be resumed at any image

A rank's images come from its workers in turn. Each worker walks its own lane: of a dataset read by row number
every so-manyth row of the epoch's permutation, of a sharded one its share of the shards, shuffled block by
block. Where a lane stands is a handful of integers, which travel with every image; so the position of
the whole is known exactly however far the workers have read ahead.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hartist.data.reader import Source
from hartist.data.records import Broken, Record, Skipped
from hartist.data.transform import BrokenImage, Crop, decode, prepare
from hartist.errors import UserError

Position = tuple[int, ...]
"""Where a lane stands: (epoch, rows done), or (epoch, shard, row where the block begins, rows of the block done)."""


@dataclass(frozen=True)
class Sample:
    """An image ready to train with."""

    pixels: UInt8[np.ndarray, "h w 3"]
    captions: tuple[str, ...]
    name: str
    label: int | None = None


@dataclass(frozen=True)
class Failure:
    """Why the data can't be read any further; a worker can't raise a UserError that stays one line."""

    message: str


Item = Sample | Broken | Failure | None
"""What a lane gives; None, for ever, after its last epoch."""


@dataclass(frozen=True)
class Settings:
    """What the order and the pixels of a stream depend on."""

    size: int
    crop: Crop = "centre"
    flip: bool = False
    """Mirror every other image."""
    shuffle: bool = True
    seed: int = 0
    block: int = 1024
    """Rows of a sharded dataset that are shuffled among themselves, undecoded in memory."""
    epochs: int | None = None
    """After how many to stop; None goes on for ever."""
    world_size: int = 1
    workers: int = 0
    """Processes that decode; 0 decodes in this one."""

    @property
    def lanes(self) -> int:
        """Lanes of one rank."""
        return max(1, self.workers)


class ImageStream:
    """The images of a source, one rank's share.

    Within an epoch every image comes exactly once over all ranks and workers. Broken images, empty captions
    and damaged shards are collected in `skipped`. Iterating goes on from the position; what was taken so
    far is behind it. Raises UserError if there is no image that can be read.
    """

    def __init__(self, source: Source, settings: Settings, rank: int = 0) -> None:
        self.source, self.settings, self.rank = source, settings, rank
        self.skipped = Skipped()
        self.taken = 0
        """Images given so far."""
        for broken in source.left_out:
            self.skipped.add(broken)
        self._positions: list[Position] = [_start(source, 0)] * settings.lanes
        self._next = 0

    def __iter__(self) -> Iterator[Sample]:
        finished: set[int] = set()
        found = any(position != _start(self.source, 0) for position in self._positions)
        items = self._items()
        while len(finished) < self.settings.lanes:
            item, position = next(items)
            lane, self._next = self._next, (self._next + 1) % self.settings.lanes
            self._positions[lane] = position
            if item is None:
                finished.add(lane)
            elif isinstance(item, Broken):
                self.skipped.add(item)
            elif isinstance(item, Failure):
                raise UserError(item.message)
            else:
                found = True
                self.taken += 1
                yield item
        if not found:
            raise self.skipped.nothing_left(self.source.name)

    def _items(self) -> Iterator[tuple[Item, Position]]:
        lanes = _Lanes(self.source, self.settings, self.rank, tuple(self._positions), self._next)
        if not self.settings.workers:
            return iter(lanes)
        loader = DataLoader(
            lanes,
            batch_size=None,
            num_workers=self.settings.workers,
            prefetch_factor=16,
            collate_fn=_unchanged,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # its seed would otherwise be drawn from the training's random numbers
        )
        return iter(loader)

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain numbers and lists."""
        return {
            "settings": self._identity(),
            "next": self._next,
            "positions": [list(position) for position in self._positions],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the stream stood that `state` is of. Raises UserError if its settings were others."""
        wanted, saved = self._identity(), state["settings"]
        for name, value in wanted.items():
            if saved.get(name) != value:
                raise UserError(
                    f"the position in the data was saved with {name.replace('_', ' ')} {saved.get(name)}, this run "
                    f"has {value}; resume with the same or start a new run"
                )
        self._next = int(state["next"])
        self._positions = [tuple(map(int, position)) for position in state["positions"]]

    def _identity(self) -> dict[str, Any]:
        settings = asdict(self.settings)
        order = ("shuffle", "seed", "block", "world_size")
        rows = "rows" if self.source.rows is not None else "shards"
        return {name: settings[name] for name in order} | {
            "workers": self.settings.lanes,
            "rank": self.rank,
            rows: len(self.source.shards if self.source.rows is None else self.source.rows),
        }


class _Lanes(IterableDataset):
    """The lanes of a rank: all in turn in this process, or one in each of PyTorch's workers."""

    def __init__(
        self, source: Source, settings: Settings, rank: int, positions: tuple[Position, ...], first: int
    ) -> None:
        self.source, self.settings, self.rank = source, settings, rank
        self.positions, self.first = positions, first

    def __iter__(self) -> Iterator[tuple[Item, Position]]:
        worker = get_worker_info()
        # The first worker is asked first, so it has the lane whose turn it is.
        lane = (self.first + (worker.id if worker else 0)) % self.settings.lanes
        number = self.rank * self.settings.lanes + lane
        return _lane(self.source, self.settings, number, self.positions[lane])


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    asyn = sys.modules.get("fsspec.asyn")
    if asyn is not None:
        asyn.reset_lock()  # a forked process that reads from the network would wait for its parent's for ever


def _start(source: Source, epoch: int) -> Position:
    return (epoch, 0) if source.rows is not None else (epoch, 0, 0, 0)


def _lane(source: Source, settings: Settings, lane: int, position: Position) -> Iterator[tuple[Item, Position]]:
    """Epoch after epoch from `position` on. A lane that finds nothing in a whole epoch ends."""
    one_epoch = _rows_of_epoch if source.rows is not None else _shards_of_epoch
    try:
        while settings.epochs is None or position[0] < settings.epochs:
            found = position != _start(source, position[0])
            for item, position in one_epoch(source, settings, lane, position):  # noqa: B020 - it is where we are
                found |= isinstance(item, Sample)
                yield item, position
            position = _start(source, position[0] + 1)
            if not found:
                break
    except UserError as error:
        yield Failure(str(error)), position
    yield from itertools.repeat((None, position))


def _rows_of_epoch(
    source: Source, settings: Settings, lane: int, position: Position
) -> Iterator[tuple[Item, Position]]:
    assert source.rows is not None
    epoch, done = position
    order = _order(len(source.rows), settings, epoch)[lane :: settings.lanes * settings.world_size]
    for i in range(done, len(order)):
        row = int(order[i])
        yield _load(source.record(row), settings, (epoch, row)), (epoch, i + 1)


def _shards_of_epoch(
    source: Source, settings: Settings, lane: int, position: Position
) -> Iterator[tuple[Item, Position]]:
    """Lanes share the shards as evenly as they divide; what is left over they share row by row."""
    epoch, shard, start, done = position
    lanes = settings.lanes * settings.world_size
    groups = math.gcd(len(source.shards), lanes)
    mine = [int(number) for number in _order(len(source.shards), settings, epoch)[lane % groups :: groups]]
    rows = _lane_rows(source, mine, lane // groups, lanes // groups, shard, start)
    while block := list(itertools.islice(rows, settings.block if settings.shuffle else 1)):
        after = (epoch, block[-1].shard, block[-1].row + 1, 0)
        order = _order(len(block), settings, epoch, shard, start)
        for i in range(done, len(block)):
            entry = block[int(order[i])]
            item = _load(entry.record, settings, (epoch, mine[entry.shard], entry.row))
            yield item, (epoch, shard, start, i + 1) if i + 1 < len(block) else after
        shard, start, done = after[1], after[2], 0


@dataclass(frozen=True)
class _Entry:
    record: Record | Broken
    shard: int
    """Which of the lane's shards, in the epoch's order."""
    row: int


def _lane_rows(source: Source, shards: list[int], part: int, parts: int, first: int, start: int) -> Iterator[_Entry]:
    """Every `parts`th row of the shards, from row `start` of the `first` one on."""
    for i in range(first, len(shards)):
        for row, record in enumerate(source.shard(shards[i])):
            # A damaged shard is everybody's to report.
            mine = (row + i) % parts == part or (isinstance(record, Broken) and record.kind == "shard")
            if mine and row >= (start if i == first else 0):
                yield _Entry(record, i, row)


def _order(count: int, settings: Settings, *number: int) -> np.ndarray:
    """0..count−1, as the seed and some numbers shuffle them, if at all."""
    return _generator(settings, number).permutation(count) if settings.shuffle else np.arange(count)


def _generator(settings: Settings, number: tuple[int, ...]) -> np.random.Generator:
    return np.random.default_rng((settings.seed & (2**64 - 1), *number))


def _load(record: Record | Broken, settings: Settings, number: tuple[int, ...]) -> Sample | Broken:
    """Decode and crop; the draws depend on the seed and the row's number alone."""
    if isinstance(record, Broken):
        return record
    try:
        image = decode(read_bytes(record.image))
    except BrokenImage as error:
        return Broken(record.name, str(error), "image")
    pixels = prepare(image, settings.size, settings.crop, settings.flip, _generator(settings, number))
    return Sample(pixels, record.captions, record.name, record.label)


def read_bytes(image: bytes | str) -> bytes | Path:
    """What `decode` takes, for a record's image. Raises BrokenImage if an address can't be read."""
    if isinstance(image, bytes):
        return image
    if "://" not in image:
        return Path(image)
    try:
        # fsspec comes with `datasets`; it knows the Hub's addresses and archives
        with import_module("fsspec").open(image, "rb") as file:
            return file.read()
    except Exception as error:  # each kind of address has exceptions of its own
        raise BrokenImage(f"cannot be read ({type(error).__name__})") from error
