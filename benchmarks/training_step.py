"""What the token cache and token subsampling save in a step of generator training: python benchmarks/training_step.py

Six variants of one optimiser step (loss, gradients, AdamW, moving average), with random weights and images, at the
sizes of the recipe `emoji` at 256 px:

    cached        tokens come from the token cache
    pixels        the tokenizer encodes the batch's images in every step (float32, as a cache is filled)
    pixels-bf16   the same with the encoder in bfloat16, which would change some tokens: a bound in its favour;
                  left out on a CPU that only emulates bfloat16

each with the published mean share of the last scale's cells (`subsampled`, 18 %) and with all of them (`all`). Text
states are cached in every variant. All variants see the same images in the same step.

What the cache saves is the encoder's work, so it depends on the tokenizer: `--sizes published` puts the published one
(109 M, as VAR and HART have it) before the same transformer.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from random_training import random_trainer
from tables import describe, markdown
from turns import Timing, add_turn_flags, answer, speedup, time_in_turns, to_json

from hartist.config import ResidualConfig, TokenizerConfig, TransformerConfig
from hartist.evaluation.bench import machine
from hartist.files import write_json
from hartist.generation.checkpoint import LoadedModel
from hartist.pixels import from_uint8
from hartist.precision import computes_bf16
from hartist.training.batches import micro_batches
from hartist.training.config import GeneratorLossConfig, RunConfig
from hartist.training.generator_stage import GeneratorStage
from hartist.training.recipes_emoji import emoji_generator, emoji_tokenizer
from hartist.training.subsampling import MEAN_DROP

SOURCES = ("cached", "pixels", "pixels-bf16")
CELLS = ("subsampled", "all")
VARIANTS = tuple(f"{source}/{cells}" for cells in CELLS for source in SOURCES)


@dataclass(frozen=True)
class Sizes:
    tokenizer: TokenizerConfig
    transformer: TransformerConfig
    losses: GeneratorLossConfig
    run: RunConfig


def sizes(name: str) -> Sizes:
    """`emoji`: the recipe's; `published`: behind the published tokenizer; `tiny`: to see that the script works."""
    recipe = emoji_generator()
    if name == "emoji":
        return Sizes(emoji_tokenizer().tokenizer, recipe.transformer, recipe.losses, recipe.run)
    if name == "published":
        tokenizer = TokenizerConfig()
        transformer = replace(recipe.transformer, vocab_size=tokenizer.vocab_size)
        return Sizes(tokenizer, transformer, recipe.losses, recipe.run)
    sides = (1, 2, 4, 8)
    tokenizer = TokenizerConfig(
        vocab_size=64, latent_channels=8, channels=32, channel_multipliers=(1, 1), blocks_per_level=1, sides=sides
    )
    transformer = replace(
        recipe.transformer,
        sides=sides,
        vocab_size=64,
        latent_channels=8,
        context_tokens=8,
        context_dim=16,
        width=32,
        depth=2,
        heads=2,
        residual=ResidualConfig(width=32, depth=1),
    )
    return Sizes(tokenizer, transformer, recipe.losses, replace(recipe.run, batch_size=2))


def make_step(variant: str, chosen: Sizes) -> Callable[[], None]:
    """A function that takes the next step of a variant."""
    source, cells = variant.split("/")
    losses = replace(chosen.losses, subsample_last_scale=cells == "subsampled", drop_share=MEAN_DROP)
    trainer, cache = random_trainer(chosen.tokenizer, chosen.transformer, losses, chosen.run)
    stage = trainer.stage
    assert isinstance(stage, GeneratorStage)
    model: LoadedModel = stage.model
    side = chosen.transformer.schedule.finest[0] * chosen.tokenizer.downsampling
    pixels_NHW3 = torch.zeros(0)
    if source != "cached":
        pixels_NHW3 = torch.randint(256, (len(cache), side, side, 3), dtype=torch.uint8)
    batch_size = chosen.run.batch_size
    rate = chosen.run.optimizer.learning_rate / 100
    steps = itertools.count()

    @torch.no_grad()
    def encode(rows_B: list[int]) -> None:
        """Compute the tokens of these images anew, into the cache."""
        with torch.autocast("cpu", torch.bfloat16, enabled=source == "pixels-bf16"):
            f_BChw = model.tokenizer.encode_latent(from_uint8(pixels_NHW3[rows_B]))
        tokens = model.tokenizer.quantizer.encode(f_BChw)
        cache.ids_NL[rows_B] = torch.cat(tokens.ids, 1).to(cache.ids_NL.dtype)
        cache.last_scale_NmC[rows_B] = tokens.last_scale_BlC.to(cache.last_scale_NmC.dtype)

    def step() -> None:
        number = next(steps)
        if source != "cached":
            encode(micro_batches(number, batch_size, 0, chosen.run.seed)[0].rows(len(cache)))
        trainer.step(number, rate)

    return step


def report(timings: Mapping[str, Timing]) -> dict[str, Any]:
    """The table's rows as figures, and the ratios that the two ideas are judged by."""
    sources = [source for source in SOURCES if f"{source}/all" in timings]
    ratios = {
        f"cache against {source}, {cells}": speedup(timings[f"{source}/{cells}"], timings[f"cached/{cells}"])
        for cells in CELLS
        for source in sources[1:]
    }
    ratios |= {
        f"subsampling, {source}": speedup(timings[f"{source}/all"], timings[f"{source}/subsampled"])
        for source in sources
    }
    ratios["both together"] = speedup(timings["pixels/all"], timings["cached/subsampled"])
    return {"variants": to_json(timings), "speedups": ratios}


def format_report(values: Mapping[str, Any]) -> str:
    rows = [
        {
            "variant": name,
            "seconds a step": f"{row['median_seconds']:.3f}",
            "peak memory, GiB": f"{row['peak_bytes'] / 2**30:.2f}",
        }
        for name, row in values["variants"].items()
    ]
    ratios = [{"times as fast": name, "ratio": f"{ratio:.2f}"} for name, ratio in values["speedups"].items()]
    return f"{markdown(rows)}\n\n{markdown(ratios)}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=("emoji", "published", "tiny"), default="emoji")
    add_turn_flags(parser)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    chosen = sizes(args.sizes)
    if args.worker:
        answer(lambda: make_step(args.worker, chosen))
        return 0
    own = [sys.executable, str(Path(__file__).resolve())]
    settings = ["--sizes", args.sizes, "--threads", str(args.threads)]
    variants = [name for name in VARIANTS if "bf16" not in name or computes_bf16(torch.device("cpu"))]
    timings = time_in_turns(
        {name: [*own, *settings, "--worker", name] for name in variants},
        rounds=args.rounds,
        steps=args.steps,
        warmup=args.warmup,
    )
    values = {
        "machine": machine(torch.device("cpu")),
        "settings": {"sizes": args.sizes, "batch_size": chosen.run.batch_size},
        **report(timings),
    }
    print(f"{args.sizes}, batches of {chosen.run.batch_size}; {describe(values['machine'])}\n")
    print(format_report(values))
    if args.json is not None:
        write_json(args.json, values)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
