"""Two of the paper's claims at a small scale: python benchmarks/claims.py NAME --data DIR --out DIR

residual   pictures with residual tokens and without, and those of a model that never had any: VAR, of the same
           transformer, trained for as many steps on the same batches, with a decoder of its own for discrete tokens
diffusion  HART against a diffusion transformer of equal size, trained for equally many seconds on the same latents:
           quality against seconds and against operations of a picture

Both use the tokenizers, token caches and generators of `benchmarks/ablations.py`; with the same --out none is trained
twice. To resume, run the same command again. Distances are to the real pictures of the same prompts; intervals are of
95 %. Models this small, trained this briefly, compare; they say nothing of the quality that either kind can reach.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from ablation_runs import Sizes, Workshop, add_budget_flags, budget_of, seconds_per_step, small_sizes
from ablations import different_prompts
from claims_diffusion import diffusion
from claims_judge import DROPPED, Judge, hart_maker
from tables import describe, markdown

from hartist.errors import UserError
from hartist.evaluation.bench import machine
from hartist.evaluation.bootstrap import percentile_interval
from hartist.evaluation.features import LITE0
from hartist.generation.checkpoint import load_model
from hartist.generation.loading import load_tokenizer_of
from hartist.generation.pipeline import Pipeline


def residual(shop: Workshop, judge: Judge) -> list[dict[str, str]]:
    hart_run = shop.generator(DROPPED)
    hart = Pipeline.from_pretrained(hart_run / "model")
    var_run = shop.generator(DROPPED, hybrid=False)
    model = load_model(var_run / "model", torch.float32)
    var = Pipeline(replace(model, tokenizer=load_tokenizer_of(shop.tokenizer(0.0))))
    settings = hart.model.settings
    makers = {
        "HART, with residual tokens": hart_maker(hart, settings),
        "HART, without": hart_maker(hart, replace(settings, residual=False)),
        "VAR, discrete tokens alone": hart_maker(var, settings),
    }
    rows, base = [], torch.empty(0)
    for label, make in makers.items():
        name = f"{shop.generator_name(DROPPED)}, {label}, {len(judge.prompts)} prompts"
        row = judge.row(label, judge.measure(name, make))
        halves = judge.resampled(name)
        base = base if len(base) else halves
        interval = percentile_interval(halves / base - 1)
        row["Fréchet against the first, 95 %"] = (
            "" if halves is base else f"{100 * interval.low:+.1f} … {100 * interval.high:+.1f} %"
        )
        run = var_run if label.startswith("VAR") else hart_run
        row["training, s a step"] = f"{seconds_per_step(run, shop.sizes.generator_batch):.2f}"
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None, sizes: Sizes | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("residual", "diffusion"))
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="from `hartist data emoji`")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="runs and results; one dataset's")
    add_budget_flags(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="train", help="whose prompts (default: train)")
    parser.add_argument("--pictures", type=int, default=300, help="prompts to measure with (default: 300)")
    parser.add_argument("--align", type=Path, metavar="DIR", help="from `hartist evaluate align`")
    parser.add_argument("--rounds", type=int, default=3, help="timed turns (default: 3)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="curves, as .png or .svg (diffusion)")
    args = parser.parse_args(arguments)
    try:
        shop = Workshop(args.data, args.out, sizes or small_sizes(), budget_of(args), args.seed)
        shop.claim()
        prompts = different_prompts(shop.data, args.pictures, args.split)
        judge = Judge(shop, prompts, shop.sizes.image_size, args.align)
        rows = residual(shop, judge) if args.name == "residual" else diffusion(shop, judge, args.rounds, args.plot)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.name}: distances by {LITE0}; {describe(machine(torch.device('cpu')))}\n\n{markdown(rows)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
