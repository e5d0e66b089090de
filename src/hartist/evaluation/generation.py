"""How good a generator's pictures are: agreement with their prompts and distance to real pictures, by kind of prompt

Every figure stands beside the same figure of real pictures: retrieval beside that of the real pictures of the same
prompts, distances beside those of these real pictures, as many, to the same other real pictures of the kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from hartist.data.folder import CaptionedImage
from hartist.errors import UserError
from hartist.evaluation.alignment import Alignment
from hartist.evaluation.distances import fit_gaussian, frechet_distance, kernel_distance
from hartist.evaluation.features import FeatureNetwork, feature_cache, image_features
from hartist.evaluation.retrieval import Retrieval, distinct, retrieve
from hartist.evaluation.selection import read_pictures
from hartist.generation.pipeline import Pipeline, Request


@dataclass(frozen=True)
class Sample:
    """What is measured of one kind."""

    kind: str
    prompts: list[CaptionedImage]
    """Real pictures whose texts, all different, are the prompts."""
    reference: list[CaptionedImage]
    """The other real pictures of the kind: what distances are taken to."""


@dataclass(frozen=True)
class Quality:
    """One set of pictures, one for each prompt."""

    retrieval: Retrieval
    frechet_distance: float
    kernel_distance: float


@dataclass(frozen=True)
class KindReport:
    """Generated pictures of one kind of prompts, beside real ones."""

    kind: str
    prompts: int
    reference_pictures: int
    distance_network: str
    alignment_network: str
    generated: Quality
    real: Quality


def draw_sample(kind: str, rows: Sequence[CaptionedImage], limit: int) -> Sample:
    """The first `limit` different prompts of `rows`, yet at most half the pictures: the others are the reference.

    Raises UserError if that leaves fewer than two of either.
    """
    limit = min(limit, len(rows) // 2)
    prompts: dict[str, CaptionedImage] = {}
    reference = []
    for row in rows:
        if len(prompts) < limit and row.text not in prompts:
            prompts[row.text] = row
        else:
            reference.append(row)
    if len(prompts) < 2:
        raise UserError(
            f"{len(rows)} pictures of kind {kind} give {len(prompts)} prompts to measure with; at least 2 are needed, "
            "and as many other pictures: raise --limit or measure another kind"
        )
    return Sample(kind, list(prompts.values()), reference)


def generate_pictures(
    pipe: Pipeline, prompts: Sequence[str], *, seed: int = 0, batch_size: int = 4, progress: bool = True
) -> UInt8[Tensor, "n h w 3"]:
    """A picture of each prompt with the model's own settings; the seed of prompt i is `seed` + i.

    Raises UserError for a class-conditional model.
    """
    if pipe.is_class_conditional:
        raise UserError("a class-conditional model has no prompts to agree with; measure a text model")
    requests = [Request(prompt, seed + i) for i, prompt in enumerate(prompts)]
    generated = pipe.generate(requests, batch_size=batch_size)
    bar = tqdm(generated, desc="generating", unit="img", total=len(requests), disable=not progress)
    return torch.stack([torch.from_numpy(np.array(item.image)) for item in bar])


def score_pictures(
    pixels: UInt8[Tensor, "n h w 3"],
    sample: Sample,
    alignment: Alignment,
    network: FeatureNetwork,
    *,
    progress: bool = True,
) -> KindReport:
    """Measure pictures of the sample's prompts, in their order. Distances are of the features of `network`.

    Raises UserError for broken files.
    """
    size = (pixels.shape[1], pixels.shape[2])

    def features(of: FeatureNetwork, rows: Sequence[CaptionedImage]) -> Float[Tensor, "n d"]:
        cache = feature_cache(of, alignment.cache)
        return image_features(of, read_pictures(rows, size), total=len(rows), cache=cache, progress=progress)

    texts, own_N = distinct([row.text for row in sample.prompts])
    texts_ME = alignment.embed_texts(texts, progress=progress)
    reference = features(network, sample.reference)
    target = fit_gaussian(reference)

    def quality(distance_features: Tensor, alignment_features: Tensor) -> Quality:
        return Quality(
            retrieve(alignment.embed_images(alignment_features), texts_ME, own_N),
            frechet_distance(fit_gaussian(distance_features), target),
            kernel_distance(distance_features, reference),
        )

    return KindReport(
        sample.kind,
        len(sample.prompts),
        len(sample.reference),
        network.name,
        alignment.network.name,
        generated=quality(
            *(image_features(of, pixels, total=len(pixels), progress=progress) for of in (network, alignment.network))
        ),
        real=quality(*(features(of, sample.prompts) for of in (network, alignment.network))),
    )
