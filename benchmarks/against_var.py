"""Our class-conditional training step against the public VAR trainer's: python benchmarks/against_var.py --var DIR

DIR is a checkout of github.com/FoundationVision/VAR. Both sides train VAR's transformer of the same depth and width on
the same CPU in the same type, on random images and labels, a few steps each in turn.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from random_training import random_trainer
from tables import describe, markdown
from turns import Timing, add_turn_flags, answer, speedup, time_in_turns, to_json
from var_checkout import CLIP, DECAY, VarSizes, make_var_step, require_checkout

from hartist.config import TokenizerConfig
from hartist.errors import UserError
from hartist.evaluation.bench import machine
from hartist.files import write_json
from hartist.presets import hart_class, var_class
from hartist.training.config import GeneratorLossConfig, OptimizerConfig, RunConfig
from hartist.training.subsampling import MEAN_DROP, kept_count

VARIANTS = {
    "VAR, tokens given": "its train_step: teacher-forcing input from given ids, forward over all tokens with a dense "
    "mask and drop path, cross-entropy, argmax, backward, clipping, fused AdamW; no average of the weights",
    "ours, tokens given": "teacher-forcing input from given ids, forward over all tokens, cross-entropy with its "
    "figures per scale, backward, clipping, fused AdamW, moving average of the weights",
    "VAR, whole step": "the same, and its autoencoder (109 M, float32) encodes the images, as in every step of its "
    "trainer",
    "ours, whole step": "the same, with tokens from the token cache and token subsampling of the last scale, as HART "
    "trains (at its mean share)",
    "ours, whole step of HART": "the same, and residual diffusion on the last scale: the paper's MLP of 36 M beside "
    "the transformer, four diffusion times a token: VAR has nothing like it",
}
"""What each variant does in a step. Nobody reads image files."""

SIZES = {
    "d8": VarSizes(8, 8, TokenizerConfig()),
    "tiny": VarSizes(1, 2, TokenizerConfig(vocab_size=64, latent_channels=8, channels=32, sides=(1, 2, 3))),
}


def make_step(variant: str, sizes: VarSizes, *, bf16: bool, checkout: Path) -> Callable[[], object]:
    """A function that takes the next step of a variant."""
    given = variant.endswith("given")
    if variant.startswith("VAR"):
        return make_var_step(checkout, sizes, bf16=bf16, tokens_given=given)
    preset = hart_class if variant.endswith("HART") else var_class
    tokenizer = sizes.tokenizer
    config = replace(
        preset(sizes.depth)[1],
        sides=tokenizer.sides,
        vocab_size=tokenizer.vocab_size,
        latent_channels=tokenizer.latent_channels,
    )
    run = RunConfig(
        batch_size=sizes.batch_size,
        optimizer=OptimizerConfig(weight_decay=DECAY, clip_norm=CLIP),
        bf16=bf16,
    )
    losses = GeneratorLossConfig(subsample_last_scale=not given, drop_share=MEAN_DROP)
    trainer, _ = random_trainer(tokenizer, config, losses, run)
    steps = itertools.count()
    return lambda: trainer.step(next(steps), 1e-6)


def report(timings: Mapping[str, Timing], sizes: VarSizes) -> dict[str, Any]:
    """Figures of every variant, and how many times as fast as VAR's ours are."""
    schedule = sizes.tokenizer.schedule
    dropped = schedule.lengths[-1] - kept_count(schedule.lengths[-1], MEAN_DROP)
    variants = to_json(timings)
    for name, values in variants.items():
        images = sizes.batch_size / values["median_seconds"]
        whole = name.startswith("ours, whole")
        values["images_per_second"] = images
        values["tokens_per_second"] = images * schedule.num_tokens
        values["tokens_seen_per_second"] = images * (schedule.num_tokens - dropped * whole)
    speedups = {
        name: speedup(timings[f"VAR, {'tokens given' if name.endswith('given') else 'whole step'}"], timings[name])
        for name in timings
        if name.startswith("ours")
    }
    return {"variants": variants, "speedups": speedups}


def format_report(values: Mapping[str, Any]) -> str:
    rows = []
    for name, figures in values["variants"].items():
        ratio = values["speedups"].get(name)
        rows.append(
            {
                "step": name,
                "seconds": f"{figures['median_seconds']:.3f}",
                "tokens/s": f"{figures['tokens_per_second']:,.0f}",
                "tokens seen/s": f"{figures['tokens_seen_per_second']:,.0f}",
                "times VAR's tokens/s": f"{ratio:.2f}" if ratio else "",
                "peak memory, GiB": f"{figures['peak_bytes'] / 2**30:.2f}",
            }
        )
    notes = "\n".join(f"* {name}: {text}" for name, text in VARIANTS.items())
    return f"{markdown(rows)}\n\ntokens/s counts all tokens of an image; dropped ones are not seen\n\n{notes}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--var", type=Path, required=True, metavar="DIR", help="the checkout")
    parser.add_argument("--sizes", choices=tuple(SIZES), default="d8", help="d8: depth 8, width 512, 256 px, batch 8")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="autocast, both sides")
    add_turn_flags(parser)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--worker", choices=tuple(VARIANTS), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    sizes = SIZES[args.sizes]
    try:
        require_checkout(args.var)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.worker:
        answer(lambda: make_step(args.worker, sizes, bf16=args.dtype == "bfloat16", checkout=args.var.resolve()))
        return 0
    # -B: no byte code is written into the checkout
    own = [sys.executable, "-B", str(Path(__file__).resolve()), "--var", str(args.var), "--sizes", args.sizes]
    own += ["--dtype", args.dtype, "--threads", str(args.threads)]
    timings = time_in_turns(
        {name: [*own, "--worker", name] for name in VARIANTS},
        rounds=args.rounds,
        steps=args.steps,
        warmup=args.warmup,
    )
    settings = {"sizes": args.sizes, "dtype": args.dtype, "batch_size": sizes.batch_size}
    values = {"machine": machine(torch.device("cpu")), "settings": settings, **report(timings, sizes)}
    print(f"depth {sizes.depth}, batches of {sizes.batch_size}, {args.dtype}; {describe(values['machine'])}\n")
    print(format_report(values))
    if args.json is not None:
        write_json(args.json, values)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
