"""A captioned folder in memory: pixels of one split as a single uint8 tensor."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from hartist.data.folder import CaptionedImage, load_captioned_folder, read_image


@dataclass(frozen=True)
class ImageSet:
    pixels: UInt8[Tensor, "n h w 3"]
    items: list[CaptionedImage]
    fingerprint: str
    """Changes with any pixel or caption."""


def load_images(path: Path, split: str, size: int, *, progress: bool = True) -> ImageSet:
    """Read one split at `size` px. Raises UserError for missing metadata or broken images."""
    items = load_captioned_folder(path, split)
    digest = hashlib.sha256()
    pixels = torch.empty(len(items), size, size, 3, dtype=torch.uint8)
    for i, item in enumerate(tqdm(items, desc=f"reading {split}", unit="img", disable=not progress)):
        image = read_image(item.path, size)
        pixels[i] = torch.from_numpy(image)
        digest.update(image.tobytes())
        digest.update("\0".join(item.captions).encode())
    return ImageSet(pixels, items, digest.hexdigest()[:16])
