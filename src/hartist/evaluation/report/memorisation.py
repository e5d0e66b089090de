"""Does a model draw its training pictures? How near the nearest one is, for generated and for real held-out pictures

Pictures are compared by the cosine of their features. How near is too near depends on the network and on the training
set, so generated pictures are held against real ones that the model was not trained on: a model that copies is nearer
to its training pictures than these are. Features see what a picture shows rather than its pixels; a near neighbour is a
picture to look at, no proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hartist.errors import UserError, quoted
from hartist.evaluation.features import FeatureNetwork
from hartist.evaluation.harness.features import cached_features
from hartist.evaluation.harness.pictures import read_real
from hartist.evaluation.harness.result import Figure, Result

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}
CHUNK = 1024
SAME = 0.9999
"""A cosine above which two files are taken for one picture."""
QUANTILE = 0.99


@dataclass(frozen=True)
class Nearest:
    """Of each picture of a set, the K nearest training pictures, the nearest first."""

    similarity_NK: Float[Tensor, "n k"]
    place_NK: Int[Tensor, "n k"]

    @property
    def nearest_N(self) -> Float[Tensor, " n"]:
        return self.similarity_NK[:, 0]


def nearest(features_ND: Float[Tensor, "n d"], training_MD: Float[Tensor, "m d"], k: int = 3) -> Nearest:
    """The `k` rows of `training_MD`, or all, with the largest cosine."""
    unit_MD = torch.nn.functional.normalize(training_MD.float(), dim=1)
    k = min(k, len(unit_MD))
    found = [
        (torch.nn.functional.normalize(rows.float(), dim=1) @ unit_MD.T).topk(k, dim=1)
        for rows in features_ND.split(CHUNK)
    ]
    return Nearest(torch.cat([each.values for each in found]), torch.cat([each.indices for each in found]))


@dataclass(frozen=True)
class Closeness:
    """How near two sets come to the training pictures."""

    threshold: float
    """Cosine that 99 % of the held-out pictures stay below."""
    share_above: float
    """Of the generated pictures that lie above it; 0.01 is what held-out pictures would give."""
    held_out_in_training: int
    """Held-out pictures that are training pictures themselves: with many, the comparison says nothing."""


def closeness(generated: Nearest, held_out: Nearest) -> Closeness:
    """Compare the nearest similarities of generated and of held-out pictures."""
    threshold = torch.quantile(held_out.nearest_N.double(), QUANTILE).item()
    return Closeness(
        threshold,
        (generated.nearest_N.double() > threshold).double().mean().item(),
        int((held_out.nearest_N > SAME).sum()),
    )


def training_pictures(folder: Path) -> list[Path]:
    """The picture files in a folder and the folders below it. Raises UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"--training {folder} is no folder; give the one with the training pictures")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise UserError(f"--training {folder} has no pictures ({', '.join(sorted(SUFFIXES))}); give another folder")
    return paths


def feature_figure(result: Result, network: str | None) -> Figure:
    """A figure whose rows are features of `network`, or of the first there is. Raises UserError if there is none."""
    found = {figure.network: figure for figure in reversed(result.figures) if figure.kind in ("frechet", "kernel")}
    named = [name for name in dict.fromkeys(figure.network for figure in result.figures) if name in found]
    if not named:
        raise UserError("the run has no features of its pictures, so --training cannot be used; measure a distance")
    chosen = named[0] if network is None else network
    if chosen not in found:
        raise UserError(
            f"--network {quoted(chosen)}: the run has no features of it, but of {', '.join(map(str, named))}"
        )
    return found[chosen]


def training_features(
    paths: Sequence[Path],
    size: tuple[int, int],
    network: str,
    cache: Path | None,
    *,
    progress: bool = True,
) -> Float[Tensor, "m d"]:
    """Features of the training pictures in the size (height, width) of the generated ones, as a benchmark's are.

    Raises UserError for a broken picture, and for a network that can't be loaded.
    """
    loaded = load_by_title(network)
    return cached_features(loaded, read_real(paths, size), len(paths), cache, "training pictures", progress=progress)


def load_by_title(title: str) -> FeatureNetwork:
    """A network by the name that results give it. Raises UserError for an unknown one, or one that isn't installed."""
    from hartist.evaluation.networks import NETWORKS, load_network

    names = {name: short for short, name in NETWORKS.items()}
    if title not in names:
        raise UserError(f"there is no network {quoted(title)} to see pictures with; there are {', '.join(names)}")
    return load_network(names[title])
