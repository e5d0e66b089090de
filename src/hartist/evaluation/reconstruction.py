"""What a tokenizer keeps of pictures it has not seen: PSNR, SSIM, LPIPS, distances and codes in use, by both paths"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from hartist.data.folder import CaptionedImage
from hartist.evaluation.codebook import codebook_entropy, codebook_usage, count_codes
from hartist.evaluation.distances import fit_gaussian, frechet_distance, kernel_distance
from hartist.evaluation.features import FeatureNetwork, feature_cache, image_features
from hartist.evaluation.image_metrics import WINDOW, lpips, psnr, ssim
from hartist.evaluation.selection import read_pictures
from hartist.pixels import from_uint8, to_uint8
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.training.lpips import LpipsLoss

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
    ssim: float | None = None
    """Mean over the pictures; None where they are smaller than its window."""
    lpips: float | None = None
    """Mean over the pictures; None unless a network for it was given."""


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
    entropy_per_scale: tuple[float, ...]
    """Of the codes on each scale, in bits: at most log₂ of the codebook's size, and of the scale's tokens."""


@dataclass(frozen=True)
class Measurements:
    """What figures of reconstructions are computed from, in the order of the pictures."""

    network: FeatureNetwork
    originals_ND: Float[Tensor, "n d"]
    features: dict[str, Float[Tensor, "n d"]]
    """Of the reconstructions, by path: discrete, hybrid."""
    values: dict[tuple[str, str], Float[Tensor, " n"]]
    """By path and metric: psnr, and where they could be had ssim and lpips."""
    counts_KV: Int[Tensor, "k v"]
    """How often each code occurs on each scale."""


def measure_reconstructions(
    tokenizer: HybridTokenizer,
    rows: Sequence[CaptionedImage],
    network: FeatureNetwork,
    *,
    cache: Path | None = None,
    perceptual: LpipsLoss | None = None,
    progress: bool = True,
) -> Measurements:
    """Reconstruct all pictures by both paths; `cache` is a folder for the originals' features.

    `perceptual` is LPIPS's network: without it there is no LPIPS. Raises UserError for broken pictures.
    """
    h, w = tokenizer.schedule.finest
    size = h * tokenizer.config.downsampling, w * tokenizer.config.downsampling
    codes = tokenizer.config.vocab_size
    counts_KV = torch.zeros(len(tokenizer.schedule), codes, dtype=torch.int64)
    features: dict[str, list[Tensor]] = {"discrete": [], "hybrid": []}
    pairwise: dict[tuple[str, str], list[Tensor]] = {}
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
            counts_KV += count_codes(tokens.ids, codes)
            for name, decoded in (
                ("discrete", tokenizer.decode_discrete(tokens.ids)),
                ("hybrid", tokenizer.decode(tokens)),
            ):
                pixels, original = to_uint8(decoded).cpu(), torch.stack(chunk)
                found = {"psnr": psnr(decoded, image_B3HW).clamp(max=MAX_PSNR).cpu()}
                if min(size) >= WINDOW:
                    found["ssim"] = ssim(pixels, original)
                if perceptual is not None:
                    found["lpips"] = lpips(perceptual, pixels, original)
                for metric, value_B in found.items():
                    pairwise.setdefault((name, metric), []).append(value_B)
                features[name].append(image_features(network, pixels, total=len(pixels), progress=False))
            bar.update(len(chunk))
    return Measurements(
        network,
        originals,
        {name: torch.cat(parts) for name, parts in features.items()},
        {key: torch.cat(parts) for key, parts in pairwise.items()},
        counts_KV,
    )


def report_reconstructions(measured: Measurements) -> ReconstructionReport:
    """The figures. Raises UserError for fewer than two pictures."""
    target = fit_gaussian(measured.originals_ND)

    def mean(name: str, metric: str) -> float | None:
        values = measured.values.get((name, metric))
        return values.double().mean().item() if values is not None else None

    def quality(name: str) -> PathQuality:
        own_ND = measured.features[name]
        return PathQuality(
            measured.values[name, "psnr"].double().mean().item(),
            frechet_distance(fit_gaussian(own_ND), target),
            kernel_distance(own_ND, measured.originals_ND),
            mean(name, "ssim"),
            mean(name, "lpips"),
        )

    return ReconstructionReport(
        len(measured.originals_ND),
        measured.network.name,
        quality("discrete"),
        quality("hybrid"),
        codebook_usage(measured.counts_KV.sum(0, keepdim=True)).item(),
        tuple(codebook_usage(measured.counts_KV).tolist()),
        tuple(codebook_entropy(measured.counts_KV).tolist()),
    )


def evaluate_tokenizer(
    tokenizer: HybridTokenizer,
    rows: Sequence[CaptionedImage],
    network: FeatureNetwork,
    *,
    cache: Path | None = None,
    perceptual: LpipsLoss | None = None,
    progress: bool = True,
) -> ReconstructionReport:
    """Reconstruct all pictures by both paths and compare; see `measure_reconstructions`.

    Raises UserError for fewer than two pictures, or broken ones.
    """
    return report_reconstructions(
        measure_reconstructions(tokenizer, rows, network, cache=cache, perceptual=perceptual, progress=progress)
    )
