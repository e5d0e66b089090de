"""Measuring a run's pictures: scorers, each with its network, opened before anything is made"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from hartist.checkpoint import read_safetensors
from hartist.errors import UserError
from hartist.evaluation.benchmarks.base import Item, Reference
from hartist.evaluation.clip import TextImageNetwork
from hartist.evaluation.features import FeatureNetwork
from hartist.evaluation.harness.features import cached_features
from hartist.evaluation.harness.metrics import SETS
from hartist.evaluation.harness.pictures import read_generated, read_real
from hartist.evaluation.harness.rows import Findings, indices
from hartist.evaluation.harness.sets import Reals, score_classes, score_sets
from hartist.evaluation.harness.texts import score_texts


@dataclass(frozen=True)
class Material:
    """The generated pictures, and where their features are kept."""

    items: Sequence[Item]
    paths: Sequence[Path]
    size: tuple[int, int]
    """(height, width) of the generated pictures."""
    cache: Path
    progress: bool = True

    def features(self, network: FeatureNetwork) -> Float[Tensor, "n d"]:
        """Of the generated pictures, in the order of the items."""
        pictures = read_generated(self.paths, self.size)
        return cached_features(
            network, pictures, len(self.paths), self.cache, "generated pictures", progress=self.progress
        )


Scorer = Callable[[Material, Findings], None]
"""Adds figures."""


@dataclass(frozen=True)
class RealPictures:
    """What distances are taken to: pictures, or features that were computed from them before."""

    references: Sequence[Reference]
    names: Sequence[str]
    """The categories."""
    file: Path | None = None
    """A safetensors file with `reference` or `features`, float32 [M, D]: the rows of another run will do."""
    cache: Path | None = None

    def features(self, network: FeatureNetwork, size: tuple[int, int], progress: bool) -> Reals:
        """Features of all. Raises UserError for broken pictures and foreign files."""
        if self.file is not None:
            return read_reference_features(self.file, network)
        paths = [reference.path for reference in self.references]
        features_MD = cached_features(
            network, read_real(paths, size), len(paths), self.cache, "real pictures", progress=progress
        )
        return Reals(features_MD, indices([reference.category for reference in self.references], self.names))


def read_reference_features(path: Path, network: FeatureNetwork) -> Reals:
    """Features of a file, which says what network they are of. Raises UserError if it is another, or no such file."""
    tensors = read_safetensors(path)
    features_MD = tensors.get("reference", tensors.get("features"))
    if features_MD is None or features_MD.ndim != 2 or len(features_MD) < 2:
        raise UserError(f"{path} holds no features of real pictures; it needs `reference`, float32 [M, D]")
    with safe_open(path, framework="pt") as file:
        key = (file.metadata() or {}).get("network", network.key)
    if key != network.key:
        raise UserError(f"{path} holds features of {key}, not of {network.name}; choose another --network or file")
    return Reals(features_MD.float(), torch.full((len(features_MD),), -1, dtype=torch.int64))


@dataclass(frozen=True)
class SetScorer:
    """Distances to real pictures, and the Inception Score, from the features of one network."""

    names: Sequence[str]
    network: FeatureNetwork
    real: RealPictures

    def __call__(self, material: Material, findings: Findings) -> None:
        generated_ND = material.features(self.network)
        distances = [name for name in self.names if name in SETS]
        if distances:
            real = self.real.features(self.network, material.size, material.progress)
            if real.features_MD.shape[1] != generated_ND.shape[1]:
                raise UserError(
                    f"{self.real.file} holds {real.features_MD.shape[1]} features a picture, {self.network.name} gives "
                    f"{generated_ND.shape[1]}; give those of the same network"
                )
            score_sets(findings, distances, self.network, generated_ND, real)
        if "is" in self.names:
            score_classes(findings, self.network, generated_ND)


@dataclass(frozen=True)
class TextScorer:
    """Agreement with prompts: CLIP score, or that of the alignment heads, which don't measure what they have seen."""

    network: TextImageNetwork
    seen_families: Sequence[str] = ()
    retrieval: bool = False

    def __call__(self, material: Material, findings: Findings) -> None:
        images_NE = material.features(self.network.images)
        score_texts(findings, self.network, images_NE, seen_families=self.seen_families, retrieval=self.retrieval)
