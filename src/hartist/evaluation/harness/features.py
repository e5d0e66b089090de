"""Features of a run's pictures, computed once: what was finished before an interruption is not computed again

A network's features may differ in the last bit with the size of the batch, so every batch is filled up to the same
size: neither an interruption nor what a cache already holds changes a figure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from hartist.evaluation.features import BATCH, FeatureNetwork, feature_cache, image_features

CHUNK = 1024
"""Pictures after which the cache is saved; a multiple of BATCH."""


def steady(network: FeatureNetwork) -> FeatureNetwork:
    """The network with batches filled up to BATCH by their last picture."""

    def compute(pixels_BHW3: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b d"]:
        count = len(pixels_BHW3)
        filling = pixels_BHW3[-1:].expand(max(0, BATCH - count), -1, -1, -1)
        return network.compute(torch.cat([pixels_BHW3, filling]))[:count]

    return dataclasses.replace(network, compute=compute)


def cached_features(
    network: FeatureNetwork,
    pictures: Iterator[UInt8[Tensor, "h w 3"]],
    total: int,
    folder: Path | None,
    description: str,
    *,
    progress: bool = True,
) -> Float[Tensor, "n d"]:
    """Features of `total` pictures of one size; `folder` keeps them. Raises UserError as the pictures do."""
    network, cache = steady(network), feature_cache(network, folder)
    parts = []
    with tqdm(total=total, desc=f"{network.name}: {description}", unit="img", disable=not progress) as bar:
        for start in range(0, total, CHUNK):
            count = min(CHUNK, total - start)
            counted = _counting(islice(pictures, count), bar)
            parts.append(image_features(network, counted, total=count, cache=cache, progress=False))
    return torch.cat(parts)


def _counting(pictures: Iterator[Tensor], bar: tqdm) -> Iterator[Tensor]:
    for picture in pictures:
        yield picture
        bar.update()
