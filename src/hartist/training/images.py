"""A captioned dataset in memory: pixels of one split as a single uint8 tensor"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from hartist.data.folder import CaptionedImage
from hartist.data.reader import open_dataset
from hartist.data.records import Broken, Record, Skipped
from hartist.data.stream import read_bytes
from hartist.data.transform import BrokenImage, decode, prepare

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class ImageSet:
    pixels: UInt8[Tensor, "n h w 3"]
    items: list[CaptionedImage]
    fingerprint: str
    """Changes with any pixel or caption."""


def load_images(source: Path | str, split: str, size: int, *, progress: bool = True) -> ImageSet:
    """Read one split at `size` px: a folder, tar or parquet files, or a dataset on the Hub (see `data/reader.py`).

    Broken images and empty captions are skipped and named on stderr. Raises UserError if nothing is left.
    """
    opened = open_dataset(source, split, streaming=True)
    digest, skipped = hashlib.sha256(), Skipped()
    pixels = bytearray()  # grows in place, where a list of tensors would have to be copied at the end
    items: list[CaptionedImage] = []
    total = None if opened.rows is None else len(opened.rows)
    read = _in_threads(lambda record: _read(record, size), opened.records())
    for record, image in tqdm(read, desc=f"reading {split}", unit="img", total=total, disable=not progress):
        if isinstance(record, Broken):
            skipped.add(record)
            continue
        assert image is not None
        pixels += image.tobytes()
        path = Path(record.image if isinstance(record.image, str) else record.name)
        items.append(CaptionedImage(path, record.text, record.captions, record.extra))
        digest.update(image.tobytes())
        digest.update("\0".join(record.captions).encode())
    if not items:
        raise skipped.nothing_left(str(source), split)
    if len(skipped):
        tqdm.write(f"{source} ({split}): {skipped.summary()}", file=sys.stderr)
    shape = (len(items), size, size, 3)
    return ImageSet(torch.frombuffer(pixels, dtype=torch.uint8).view(shape), items, digest.hexdigest()[:16])


def _read(record: Record | Broken, size: int) -> tuple[Record | Broken, np.ndarray | None]:
    """A record with its pixels, or what is wrong with it."""
    if isinstance(record, Broken):
        return record, None
    try:
        return record, prepare(decode(read_bytes(record.image)), size)
    except BrokenImage as error:
        return Broken(record.name, str(error), "image"), None


def _in_threads(work: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
    """`work` on every item, in order, some of them ahead of time: decoding leaves Python's lock alone."""
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[Out]] = deque()
        for item in items:
            ahead.append(pool.submit(work, item))
            if len(ahead) > 4 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
