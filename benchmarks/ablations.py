"""Ablations that the paper leaves out, on the emoji dataset: python benchmarks/ablations.py NAME --data DIR --out DIR

decoders     one decoder for the discrete and the hybrid path, trained with the coin flip, against two decoders
coin         the coin's probability: ¼, ½, ¾
subsampling  the share of the last scale's cells that generator training drops: 0, 50, 80, 90 %
residual     residual tokens off and on, with 1 to 16 diffusion steps, for a finished model

All runs of an ablation have the same seed, batches and number of steps. To resume, run the same command again: what is
finished is not run again. Figures are added to OUT/results.json; the table is printed as Markdown. No absolute quality
should be read from runs this small; they compare.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ablation_runs import (
    Sizes,
    Workshop,
    add_budget_flags,
    budget_of,
    last_figure,
    seconds_per_step,
    small_sizes,
    watched,
)
from tables import describe, markdown

from hartist.data.folder import CaptionedImage
from hartist.errors import UserError
from hartist.evaluation.alignment import load_alignment
from hartist.evaluation.bench import machine
from hartist.evaluation.distances import fit_gaussian, frechet_distance, kernel_distance
from hartist.evaluation.features import (
    LITE0,
    LITE2,
    FeatureNetwork,
    feature_cache,
    image_features,
    load_feature_network,
)
from hartist.evaluation.reconstruction import evaluate_tokenizer
from hartist.evaluation.retrieval import distinct, retrieve
from hartist.evaluation.selection import load_rows, read_pictures
from hartist.generation.loading import find_model, load_tokenizer_of
from hartist.generation.loop import ScaleResult
from hartist.generation.pipeline import Pipeline, Request
from hartist.generation.sampling import SamplingSettings
from hartist.scales import ScaleSchedule
from hartist.text.loading import load_text_encoder
from hartist.training.subsampling import kept_count

COINS = (0.25, 0.5, 0.75)
DROPPED = (0.0, 0.5, 0.8, 0.9)
DIFFUSION_STEPS = (None, 1, 2, 4, 8, 16)
"""None: without residual tokens."""
BATCH = 8


@dataclass(frozen=True)
class Measured:
    """How much is measured, and with what."""

    pictures: int
    network: FeatureNetwork
    align: Path | None = None


# ----------------------------------------------------------------- tokenizers


def tokenizer_figures(shop: Workshop, measured: Measured, coin: float | None) -> dict[str, Any]:
    """Both paths of a tokenizer on held-out pictures; see `Workshop.tokenizer`."""
    rows = load_rows(shop.data, "validation")[: measured.pictures]

    def measure() -> dict[str, Any]:
        tokenizer = load_tokenizer_of(shop.tokenizer(coin))
        cache = shop.out / "features"
        return asdict(evaluate_tokenizer(tokenizer, rows, measured.network, cache=cache, progress=watched()))

    return shop.figures(f"{shop.tokenizer_name(coin)}, {len(rows)} pictures", measure)


def decoder_row(label: str, discrete: dict[str, Any], hybrid: dict[str, Any]) -> dict[str, str]:
    """A line of the table: a decoder's figures for the discrete path, and its own or another's for the hybrid one."""
    row = {"decoder": label}
    for path, figures in (("discrete", discrete["discrete"]), ("hybrid", hybrid["hybrid"])):
        row |= {
            f"{path}: PSNR, dB": f"{figures['psnr']:.2f}",
            f"{path}: Fréchet": f"{figures['frechet_distance']:.1f}",
            f"{path}: kernel × 1000": f"{1000 * figures['kernel_distance']:.2f}",
        }
    return row


def decoders(shop: Workshop, measured: Measured) -> list[dict[str, str]]:
    base, discrete, one, hybrid = (tokenizer_figures(shop, measured, coin) for coin in (None, 0.0, 0.5, 1.0))
    return [
        decoder_row("before decoder training", base, base),
        decoder_row("one, coin flip ½", one, one),
        decoder_row("two, each on its path", discrete, hybrid),
        decoder_row("one, discrete path alone", discrete, discrete),
        decoder_row("one, hybrid path alone", hybrid, hybrid),
    ]


def coin(shop: Workshop, measured: Measured) -> list[dict[str, str]]:
    found = {p: tokenizer_figures(shop, measured, p) for p in COINS}
    return [decoder_row(f"hybrid in {p:.0%} of the steps", figures, figures) for p, figures in found.items()]


# ----------------------------------------------------------------- generators


@dataclass(frozen=True)
class Drawn:
    """Pictures of prompts, and what their residual tokens took."""

    pixels_NHW3: torch.Tensor
    residual_seconds: float
    """An image, in batches."""


def draw(pipe: Pipeline, prompts: Sequence[CaptionedImage], settings: SamplingSettings, seed: int) -> Drawn:
    """A picture of every prompt; the seed of prompt i is seed + i whatever the settings, so ids stay the same."""
    seconds = 0.0

    def add(result: ScaleResult) -> None:
        nonlocal seconds
        seconds += result.residual_seconds

    requests = [Request(row.text, seed + i) for i, row in enumerate(prompts)]
    generated = pipe.generate(requests, settings=settings, batch_size=BATCH, callback=add)
    pixels = torch.stack([torch.from_numpy(np.array(item.image)) for item in generated])
    return Drawn(pixels, seconds / len(prompts))


def different_prompts(data: Path, count: int, split: str = "validation") -> list[CaptionedImage]:
    """Pictures of different texts, in an order that has to do with nothing."""
    rows: dict[str, CaptionedImage] = {}
    for row in load_rows(data, split):
        rows.setdefault(row.text, row)
    return list(rows.values())[:count]


def distances(shop: Workshop, measured: Measured, drawn: Drawn, prompts: Sequence[CaptionedImage]) -> dict[str, float]:
    """To the real pictures of the same prompts."""
    network, size = measured.network, (drawn.pixels_NHW3.shape[1], drawn.pixels_NHW3.shape[2])
    cache = feature_cache(network, shop.out / "features")
    real = read_pictures(prompts, size)
    real_ND = image_features(network, real, total=len(prompts), cache=cache, progress=watched())
    own_ND = image_features(network, drawn.pixels_NHW3, total=len(prompts), progress=watched())
    return {
        "frechet_distance": frechet_distance(fit_gaussian(own_ND), fit_gaussian(real_ND)),
        "kernel_distance": kernel_distance(own_ND, real_ND),
    }


def subsampling(shop: Workshop, measured: Measured) -> list[dict[str, str]]:
    prompts = different_prompts(shop.data, measured.pictures)
    cells = ScaleSchedule.from_sides(shop.sizes.transformer.sides).lengths[-1]

    def measure(dropped: float) -> dict[str, Any]:
        run = shop.generator(dropped)
        pipe = Pipeline.from_pretrained(run / "model")
        drawn = draw(pipe, prompts, pipe.model.settings, shop.seed)
        return {
            "validation_cross_entropy": last_figure(run, "validation_cross_entropy"),
            "seconds_per_step": seconds_per_step(run, shop.sizes.generator_batch),
            **distances(shop, measured, drawn, prompts),
        }

    rows = []
    for dropped in DROPPED:
        name = f"{shop.generator_name(dropped)}, {len(prompts)} prompts"
        figures = shop.figures(name, partial(measure, dropped))
        rows.append(
            {
                "cells dropped": f"{1 - kept_count(cells, dropped) / cells:.0%}",
                "validation cross-entropy, all cells": f"{figures['validation_cross_entropy']:.3f}",
                "Fréchet": f"{figures['frechet_distance']:.1f}",
                "kernel × 1000": f"{1000 * figures['kernel_distance']:.2f}",
                "seconds a step": f"{figures['seconds_per_step']:.3f}",
            }
        )
    return rows


def residual(shop: Workshop, measured: Measured, model: str | None) -> list[dict[str, str]]:
    prompts = different_prompts(shop.data, measured.pictures)
    pipe = Pipeline.from_pretrained(model)
    if pipe.is_class_conditional or pipe.transformer.config.residual is None:
        raise UserError("residual tokens of prompts are measured: name a text model that has them")
    weights = hashlib.sha256()
    for tensor in pipe.transformer.state_dict().values():
        weights.update(tensor.cpu().contiguous().numpy().tobytes())

    def measure(steps: int | None) -> dict[str, Any]:
        settings = replace(pipe.model.settings, residual=steps is not None, diffusion_steps=steps)
        drawn = draw(pipe, prompts, settings, shop.seed)
        figures: dict[str, Any] = {"residual_seconds": drawn.residual_seconds}
        if measured.align is not None:
            encoder = load_text_encoder(find_model(None) / "text_encoder")
            network = load_feature_network(LITE2)
            heads = load_alignment(measured.align, network, encoder, shop.out / "features")
            texts, own_N = distinct([row.text for row in prompts])
            own_ND = image_features(network, drawn.pixels_NHW3, total=len(prompts), progress=watched())
            found = retrieve(heads.embed_images(own_ND), heads.embed_texts(texts, progress=watched()), own_N)
            figures |= asdict(found)
        return figures | distances(shop, measured, drawn, prompts)

    rows = []
    aligned = f", aligned by {measured.align.name}" if measured.align is not None else ""
    for steps in DIFFUSION_STEPS:
        kind = "off" if steps is None else f"steps{steps}"
        name = f"residual-{kind}-{pipe.model.name}-{weights.hexdigest()[:8]}-seed{shop.seed}"
        figures = shop.figures(f"{name}, {len(prompts)} prompts{aligned}", partial(measure, steps))
        row = {
            "diffusion steps": "no residual tokens" if steps is None else str(steps),
            "Fréchet": f"{figures['frechet_distance']:.1f}",
            "kernel × 1000": f"{1000 * figures['kernel_distance']:.2f}",
        }
        if measured.align is not None:
            row |= {
                "R@1": f"{figures['recall_at_1']:.3f}",
                "R@10": f"{figures['recall_at_10']:.3f}",
                "AUC": f"{figures['auc']:.3f}",
            }
        rows.append(row | {"residual part, ms an image": f"{1000 * figures['residual_seconds']:.0f}"})
    return rows


# ----------------------------------------------------------------- command line


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("decoders", "coin", "subsampling", "residual"))
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="from `hartist data emoji`")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="runs and results; one dataset's")
    add_budget_flags(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=500, help="held-out ones to measure with (default: 500)")
    parser.add_argument("--model", help="whose residual tokens (default: the bundled model's)")
    parser.add_argument("--align", type=Path, metavar="DIR", help="from `hartist evaluate align`, for residual")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, sizes: Sizes | None = None) -> int:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    try:
        shop = Workshop(args.data, args.out, sizes or small_sizes(), budget_of(args), args.seed)
        shop.claim()
        measured = Measured(args.pictures, load_feature_network(LITE0), args.align)
        tables: dict[str, Callable[[], list[dict[str, str]]]] = {
            "decoders": lambda: decoders(shop, measured),
            "coin": lambda: coin(shop, measured),
            "subsampling": lambda: subsampling(shop, measured),
            "residual": lambda: residual(shop, measured, args.model),
        }
        rows = tables[args.name]()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.name}: distances by {measured.network.name}; {describe(machine(torch.device('cpu')))}")
    if args.name != "residual":
        print(f"steps: {shop.budget.tokenizer} of a tokenizer or decoder, {shop.budget.generator} of a generator")
    print(f"\n{markdown(rows)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
