"""Tokens, residual targets and text states of a dataset, computed once: generator training sees no pixels

What a cache was made from is its key: tokenizer, text encoder, image size, scales, dataset, crop and flip.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hartist.data.records import Skipped
from hartist.data.stream import Sample
from hartist.errors import UserError
from hartist.scales import ScaleSchedule
from hartist.text.encoder import TextEncoder
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.training.images import ImageSet
from hartist.training.token_filling import fill_token_cache
from hartist.training.token_shards import TokenCache, open_token_cache


def cache_parts(
    tokenizer: HybridTokenizer, encoder: TextEncoder | None, image_size: int, schedule: ScaleSchedule | None = None
) -> dict[str, Any]:
    """What a cache has to agree with its user about. `schedule` is the tokenizer's own if it isn't given;
    a cache of labels alone has no encoder. Raises UserError if the images don't fit the schedule's last scale.
    """
    schedule = schedule or tokenizer.schedule
    cells = image_size / tokenizer.config.downsampling
    if schedule.finest != (cells, cells):
        raise UserError(
            f"images of {image_size} px are {cells:g} × {cells:g} cells to this tokenizer, but the last scale is "
            f"{schedule.finest[0]} × {schedule.finest[1]}; give another size or other sides"
        )
    return {
        "tokenizer": _fingerprint(tokenizer),
        "text_encoder": encoder.fingerprint() if encoder is not None else None,
        "image_size": image_size,
        "sides": [list(grid) for grid in schedule.grids],
    }


def build_token_cache(
    path: Path,
    images: ImageSet,
    tokenizer: HybridTokenizer,
    encoder: TextEncoder,
    *,
    schedule: ScaleSchedule | None = None,
    progress: bool = True,
) -> TokenCache:
    """The cache in the folder `path` if it fits all the rest, else one made anew: for a run's own folder."""
    parts = cache_parts(tokenizer, encoder, images.pixels.shape[1], schedule)
    parts |= {"data": images.fingerprint, "crop": "centre", "flip": False, "limit": None}
    stream, total = _SetStream(images), len(images.items)
    fill_token_cache(
        path, stream, tokenizer, encoder, parts, schedule=schedule, total=total, replace=True, progress=progress
    )
    cache = open_token_cache(path, parts, in_memory=sys.maxsize)  # the pixels were in memory too
    assert isinstance(cache, TokenCache)
    return cache


def _fingerprint(tokenizer: HybridTokenizer) -> str:
    digest = hashlib.sha256(str(tokenizer.config).encode())
    for tensor in tokenizer.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class _SetStream:
    """Images in memory, as a stream that can be resumed."""

    def __init__(self, images: ImageSet) -> None:
        self.images, self.done, self.skipped = images, 0, Skipped()

    def __iter__(self) -> Iterator[Sample]:
        while self.done < len(self.images.items):
            item, pixels = self.images.items[self.done], self.images.pixels[self.done]
            self.done += 1
            yield Sample(pixels.numpy(), item.captions, item.path.name)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]
