"""What fast mode saves and costs, shortcut by shortcut: python benchmarks/fast_mode.py --data DIR --out DIR

Each variant draws the same prompts of the training split with the same seeds: time an image, PSNR to the exact
pictures, distances to the real pictures of these prompts, and with --align (from `hartist evaluate align`, of the
model's size) how often a picture finds its own prompt. Times are of batches taken in turns, variant after variant,
before anything is drawn for measuring; ratios are of a round. To resume, run the same command again: finished figures
are in OUT/results.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ablation_runs import Budget, Workshop, small_sizes, watched
from ablations import Measured, different_prompts, distances, draw
from tables import describe, markdown

from hartist.errors import UserError
from hartist.evaluation.alignment import Alignment, load_alignment
from hartist.evaluation.bench import machine
from hartist.evaluation.features import LITE0, LITE2, image_features, load_feature_network
from hartist.evaluation.image_metrics import psnr
from hartist.evaluation.retrieval import distinct, retrieve
from hartist.generation.loading import find_model
from hartist.generation.pipeline import Pipeline, Request, override
from hartist.generation.shortcuts import FAST
from hartist.pixels import from_uint8
from hartist.text.loading import load_text_encoder


@dataclass(frozen=True)
class Variant:
    name: str
    changes: dict[str, Any]
    """To the model's settings."""
    int8: bool = False


SPLIT = "train"
"""What the model knows: on prompts that it can't draw there would be little to lose."""
VARIANTS = (
    Variant("exact", {}),
    Variant("no guidance on the last scale", {"unguided_scales": 1}),
    Variant("no guidance on the last 2 scales", {"unguided_scales": 2}),
    Variant("attention to the scale before and coarse ones", {"attended_scales": 1}),
    Variant("75 % of the last scale's cells", {"last_scale_share": 0.75}),
    Variant("50 % of the last scale's cells", {"last_scale_share": 0.5}),
    Variant("25 % of the last scale's cells", {"last_scale_share": 0.25}),
    Variant("4 diffusion steps", {"diffusion_steps": 4}),
    Variant("2 diffusion steps", {"diffusion_steps": 2}),
    Variant("eight-bit products", {}, int8=True),
    Variant("fast", FAST),
    Variant("fast, eight-bit products", FAST, int8=True),
)


def time_variants(pipes: dict[bool, Pipeline], prompts: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds an image and the factor over exact, by name: medians over rounds, in each of which all take a turn."""
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    seconds: dict[str, list[float]] = {variant.name: [] for variant in VARIANTS}
    for turn in range(rounds + 1):
        for variant in VARIANTS:
            pipe = pipes[variant.int8]
            settings = override(pipe.model.settings, **variant.changes)
            start = time.perf_counter()
            list(pipe.generate(requests, settings=settings, batch_size=len(requests)))
            if turn:  # the first one warms up
                seconds[variant.name].append((time.perf_counter() - start) / len(requests))
    exact = seconds[VARIANTS[0].name]
    return {
        name: {
            "seconds": statistics.median(own),
            "speedup": statistics.median(a / b for a, b in zip(exact, own, strict=True)),
        }
        for name, own in seconds.items()
    }


def quality(
    shop: Workshop, measured: Measured, pipe: Pipeline, variant: Variant, heads: Alignment | None, exact: Path
) -> dict[str, Any]:
    """Figures of a variant's pictures; those of the exact ones are kept in `exact` to compare with."""
    prompts = different_prompts(shop.data, measured.pictures, SPLIT)
    drawn = draw(pipe, prompts, override(pipe.model.settings, **variant.changes), shop.seed)
    pixels_NHW3 = drawn.pixels_NHW3
    figures: dict[str, Any] = dict(distances(shop, measured, drawn, prompts))
    if variant is VARIANTS[0]:
        np.save(exact, pixels_NHW3.numpy())
    else:
        reference_NHW3 = torch.from_numpy(np.load(exact))
        figures["psnr_to_exact"] = float(psnr(from_uint8(pixels_NHW3), from_uint8(reference_NHW3)).clamp(max=60).mean())
    if heads is not None:
        texts, own_N = distinct([row.text for row in prompts])
        own_ND = image_features(heads.network, pixels_NHW3, total=len(prompts), progress=watched())
        figures |= asdict(retrieve(heads.embed_images(own_ND), heads.embed_texts(texts, progress=watched()), own_N))
    return figures


def rows(args: argparse.Namespace) -> list[dict[str, str]]:
    shop = Workshop(args.data, args.out, small_sizes(), Budget(1, 1), args.seed)
    shop.claim()
    measured = Measured(args.pictures, load_feature_network(LITE0), args.align)
    pipes = {int8: Pipeline.from_pretrained(args.model, int8=int8) for int8 in (False, True)}
    heads = None
    if args.align is not None:
        encoder = load_text_encoder(find_model(None) / "text_encoder")
        heads = load_alignment(args.align, load_feature_network(LITE2), encoder, shop.out / "features")
    prompts = [row.text for row in different_prompts(args.data, args.batch, SPLIT)]
    label = f"{pipes[False].model.name}, seed {args.seed}"
    times = shop.figures(
        f"times of {label}, batches of {args.batch}", lambda: time_variants(pipes, prompts, args.rounds)
    )
    found = []
    for variant in VARIANTS:
        figures = shop.figures(
            f"{variant.name}: {variant.changes}, {label}, {args.pictures} {SPLIT} prompts",
            lambda variant=variant: quality(  # type: ignore[misc]
                shop, measured, pipes[variant.int8], variant, heads, args.out / "exact.npy"
            ),
        )
        row = {
            "": variant.name,
            "ms an image": f"{1000 * times[variant.name]['seconds']:.0f}",
            "times as fast": f"{times[variant.name]['speedup']:.2f}",
            "PSNR to exact, dB": f"{figures['psnr_to_exact']:.1f}" if "psnr_to_exact" in figures else "",
            "Fréchet": f"{figures['frechet_distance']:.1f}",
            "kernel × 1000": f"{1000 * figures['kernel_distance']:.2f}",
        }
        if heads is not None:
            row |= {"R@1": f"{figures['recall_at_1']:.3f}", "R@10": f"{figures['recall_at_10']:.3f}"}
        found.append(row)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="from `hartist data emoji`")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results; one dataset's and model's")
    parser.add_argument("--model", help="a text model (default: the bundled one)")
    parser.add_argument("--align", type=Path, metavar="DIR", help="from `hartist evaluate align`")
    parser.add_argument("--pictures", type=int, default=300, help="prompts to measure with (default: 300)")
    parser.add_argument("--batch", type=int, default=4, help="images timed at once (default: 4)")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns (default: 5)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    try:
        table = rows(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"distances by {LITE0}; {describe(machine(torch.device('cpu')))}\n\n{markdown(table)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
