"""Measuring ways to make pictures of the same prompts: distances to the real ones, retrieval, intervals"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ablation_runs import Workshop, watched
from ablations import BATCH
from jaxtyping import Float
from torch import Tensor

from hartist.data.folder import CaptionedImage
from hartist.evaluation.alignment import load_alignment
from hartist.evaluation.bootstrap import figure_of, resampled_frechet
from hartist.evaluation.features import LITE0, LITE2, feature_cache, image_features, load_feature_network
from hartist.evaluation.retrieval import distinct, retrieve
from hartist.evaluation.selection import read_pictures
from hartist.files import atomic_path
from hartist.generation.loading import find_model
from hartist.generation.pipeline import Pipeline, Request
from hartist.generation.sampling import SamplingSettings
from hartist.text.loading import load_text_encoder

DROPPED = 0.8
"""Of the last scale's cells, in the training of all generators here."""

Pixels = Tensor
Maker = Callable[[Sequence[Request]], Pixels]
"""Pictures of some requests, N×H×W×3."""


@dataclass(frozen=True)
class Judge:
    """Measures pictures of these prompts."""

    shop: Workshop
    prompts: Sequence[CaptionedImage]
    image_size: int
    align: Path | None

    def requests(self) -> list[Request]:
        return [Request(row.text, self.shop.seed + i) for i, row in enumerate(self.prompts)]

    def real(self, network_name: str) -> Float[Tensor, "n d"]:
        network = load_feature_network(network_name)
        pictures = read_pictures(self.prompts, (self.image_size, self.image_size))
        cache = feature_cache(network, self.shop.out / "features")
        return image_features(network, pictures, total=len(self.prompts), cache=cache, progress=watched())

    def features(self, name: str, pixels_NHW3: Pixels, network_name: str) -> Float[Tensor, "n d"]:
        path = self.shop.out / "claims" / f"{name}-{network_name.split()[0]}.pt"
        network = load_feature_network(network_name)
        found = image_features(network, pixels_NHW3, total=len(pixels_NHW3), progress=watched())
        with atomic_path(path) as temporary:
            torch.save(found, temporary)
        return found

    def measure(self, name: str, make: Maker) -> dict[str, Any]:
        """Figures of a way to make pictures; its features are kept for `resampled`."""

        def run() -> dict[str, Any]:
            (self.shop.out / "claims").mkdir(parents=True, exist_ok=True)
            requests = self.requests()
            pixels = torch.cat([make(batch) for batch in _batched(requests)])
            own_ND, real_ND = self.features(name, pixels, LITE0), self.real(LITE0)
            figures: dict[str, Any] = {kind: figure_of(kind, own_ND, real_ND) for kind in ("frechet", "kernel")}
            if self.align is not None:
                heads = load_alignment(
                    self.align,
                    load_feature_network(LITE2),
                    load_text_encoder(find_model(None) / "text_encoder"),
                    self.shop.out / "features",
                )
                texts, own_N = distinct([row.text for row in self.prompts])
                images_NE = heads.embed_images(self.features(name, pixels, LITE2))
                figures |= asdict(retrieve(images_NE, heads.embed_texts(texts, progress=watched()), own_N))
            return figures

        return self.shop.figures(f"claims: {name}", run)

    def resampled(self, name: str) -> Float[Tensor, " r"]:
        """Fréchet distances of random halves: the same halves under every name, so differences are paired."""
        path = self.shop.out / "claims" / f"{name}-{LITE0.split()[0]}.pt"
        return resampled_frechet(torch.load(path, weights_only=True), self.real(LITE0))

    def row(self, label: str, figures: dict[str, Any]) -> dict[str, str]:
        found = {"": label, "Fréchet": f"{figures['frechet']:.1f}", "kernel × 1000": f"{1000 * figures['kernel']:.1f}"}
        if self.align is not None:
            found |= {"R@1": f"{figures['recall_at_1']:.3f}", "R@10": f"{figures['recall_at_10']:.3f}"}
        return found


def _batched(requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
    for start in range(0, len(requests), BATCH):
        yield requests[start : start + BATCH]


def hart_maker(pipe: Pipeline, settings: SamplingSettings) -> Maker:
    def make(requests: Sequence[Request]) -> Pixels:
        images = [item.image for item in pipe.generate(list(requests), settings=settings, batch_size=BATCH)]
        return torch.stack(
            [torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).view(*i.size[::-1], 3) for i in images]
        )

    return make
