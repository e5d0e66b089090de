"""What a tokenizer keeps of pictures it has not seen: PSNR, distances and codes in use, by both paths"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hartist.data.folder import CaptionedImage
from hartist.evaluation.distances import fit_gaussian, frechet_distance, kernel_distance
from hartist.evaluation.features import FeatureNetwork, feature_cache, image_features
from hartist.evaluation.image_metrics import psnr
from hartist.evaluation.selection import read_pictures
from hartist.pixels import from_uint8, to_uint8
from hartist.tokenizer.hybrid import HybridTokenizer

CHUNK = 16
MAX_PSNR = 100.0
"""What a picture without any error counts as, in dB."""


@dataclass(frozen=True)
class PathQuality:
    """One way of decoding, against the originals."""

    psnr: float
    """Mean over the pictures, dB."""
    frechet_distance: float
    kernel_distance: float


@dataclass(frozen=True)
class ReconstructionReport:
    """The discrete tokens alone, and discrete with residual tokens."""

    pictures: int
    network: str
    """Whose features the distances are of."""
    discrete: PathQuality
    hybrid: PathQuality
    usage: float
    """Share of the codes that some picture uses on some scale."""
    usage_per_scale: tuple[float, ...]
    """Distinct codes used on each scale, as a share of the codebook."""


def evaluate_tokenizer(
    tokenizer: HybridTokenizer,
    rows: Sequence[CaptionedImage],
    network: FeatureNetwork,
    *,
    cache: Path | None = None,
    progress: bool = True,
) -> ReconstructionReport:
    """Reconstruct all pictures by both paths and compare; `cache` is a folder for the originals' features.

    Raises UserError for fewer than two pictures, or broken ones.
    """
    h, w = tokenizer.schedule.finest
    size = h * tokenizer.config.downsampling, w * tokenizer.config.downsampling
    codes = tokenizer.config.vocab_size
    used_KV = torch.zeros(len(tokenizer.schedule), codes, dtype=torch.bool)
    features: dict[str, list[Tensor]] = {"discrete": [], "hybrid": []}
    psnrs: dict[str, list[Tensor]] = {"discrete": [], "hybrid": []}
    originals = image_features(
        network,
        read_pictures(rows, size),
        total=len(rows),
        cache=feature_cache(network, cache),
        description="originals",
        progress=progress,
    )
    pictures = read_pictures(rows, size)
    device = tokenizer.quantizer.codebook.device
    with torch.inference_mode(), tqdm(total=len(rows), desc="reconstructions", disable=not progress) as bar:
        while chunk := list(islice(pictures, CHUNK)):
            image_B3HW = from_uint8(torch.stack(chunk)).to(device)
            tokens = tokenizer.encode(image_B3HW)
            for k, ids_Bl in enumerate(tokens.ids):
                used_KV[k, ids_Bl.flatten().cpu()] = True
            for name, decoded in (
                ("discrete", tokenizer.decode_discrete(tokens.ids)),
                ("hybrid", tokenizer.decode(tokens)),
            ):
                psnrs[name].append(psnr(decoded, image_B3HW).clamp(max=MAX_PSNR).cpu())
                pixels = to_uint8(decoded).cpu()
                features[name].append(image_features(network, pixels, total=len(pixels), progress=False))
            bar.update(len(chunk))
    target = fit_gaussian(originals)

    def quality(name: str) -> PathQuality:
        own = torch.cat(features[name])
        return PathQuality(
            torch.cat(psnrs[name]).double().mean().item(),
            frechet_distance(fit_gaussian(own), target),
            kernel_distance(own, originals),
        )

    return ReconstructionReport(
        len(rows),
        network.name,
        quality("discrete"),
        quality("hybrid"),
        used_KV.any(0).double().mean().item(),
        tuple(used_KV.double().mean(1).tolist()),
    )
