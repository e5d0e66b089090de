"""A captioned dataset in memory: pixels of one split as a single uint8 tensor"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from hartist.data.folder import CaptionedImage
from hartist.data.reader import open_dataset
from hartist.data.records import Broken, Skipped
from hartist.data.stream import read_bytes
from hartist.data.transform import BrokenImage, decode, prepare


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
    for record in tqdm(opened.records(), desc=f"reading {split}", unit="img", total=total, disable=not progress):
        if isinstance(record, Broken):
            skipped.add(record)
            continue
        try:
            image = prepare(decode(read_bytes(record.image)), size)
        except BrokenImage as error:
            skipped.add(Broken(record.name, str(error), "image"))
            continue
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
