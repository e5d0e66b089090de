"""Small training runs for ablations: recipes, runs that are resumed and never repeated, and their figures on disk"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hartist.config import ResidualConfig, TokenizerConfig, TransformerConfig
from hartist.errors import UserError
from hartist.files import read_json, write_json
from hartist.generation.loading import find_model, load_tokenizer_of
from hartist.training.config import OptimizerConfig, Phase, RunConfig
from hartist.training.recipe import GeneratorRecipe, TokenizerRecipe
from hartist.training.recipes_emoji import emoji_generator, emoji_tokenizer
from hartist.training.run import train_generator, train_tokenizer


@dataclass(frozen=True)
class Sizes:
    """What is trained."""

    image_size: int
    tokenizer: TokenizerConfig
    transformer: TransformerConfig
    tokenizer_batch: int
    generator_batch: int
    perceptual: float
    """Weight of the perceptual loss; 0 needs no weights for it."""
    base: Path | None = None
    """A finished tokenizer to begin with; None: one is trained from scratch."""


def small_sizes() -> Sizes:
    """The bundled tokenizer, and a transformer of half the bundled one's size: 256 px, 680 tokens."""
    base = find_model(None) / "tokenizer"
    tokenizer = load_tokenizer_of(base).config
    transformer = replace(
        emoji_generator().transformer,
        sides=tokenizer.sides,
        vocab_size=tokenizer.vocab_size,
        latent_channels=tokenizer.latent_channels,
        context_tokens=24,
        width=256,
        depth=5,
        heads=4,
        residual=ResidualConfig(width=192, depth=3, steps=8),
    )
    image_size = tokenizer.downsampling * tokenizer.schedule.finest[0]
    return Sizes(image_size, tokenizer, transformer, 16, 16, perceptual=0.1, base=base)


@dataclass(frozen=True)
class Budget:
    """Optimiser steps of every run, the same for all variants of an ablation."""

    tokenizer: int = 150
    generator: int = 250


def add_budget_flags(parser: argparse.ArgumentParser) -> None:
    """How long runs are."""
    default = Budget()
    parser.add_argument(
        "--tokenizer-steps", type=int, default=default.tokenizer, help=f"(default: {default.tokenizer})"
    )
    parser.add_argument(
        "--generator-steps", type=int, default=default.generator, help=f"(default: {default.generator})"
    )


def budget_of(args: argparse.Namespace) -> Budget:
    """Raises UserError for a budget of nothing."""
    if min(args.tokenizer_steps, args.generator_steps) < 1:
        raise UserError("a run needs at least one step; raise --tokenizer-steps or --generator-steps")
    return Budget(args.tokenizer_steps, args.generator_steps)


@dataclass(frozen=True)
class Workshop:
    """A folder of runs on one dataset, with results.json: the figures of those that are finished, by name."""

    data: Path
    out: Path
    sizes: Sizes
    budget: Budget
    seed: int = 0

    def claim(self) -> None:
        """Make the folder this dataset's. Raises UserError if it is another's."""
        digest = hashlib.sha256()
        for split in ("train", "validation"):
            metadata = self.data / split / "metadata.jsonl"
            if not metadata.is_file():
                raise UserError(f"{metadata} does not exist; build a dataset with `hartist data emoji`")
            digest.update(metadata.read_bytes())
        owner = {"dataset": digest.hexdigest()[:16]}
        path = self.out / "dataset.json"
        if path.exists() and read_json(path) != owner:
            raise UserError(f"{self.out} holds the runs of another dataset; choose another --out")
        write_json(path, owner)

    def figures(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The figures under this name; what isn't there yet is measured and added."""
        path = self.out / "results.json"
        known = read_json(path) if path.exists() else {}
        if name in known:
            say(f"{name}: known")
        else:
            start = time.monotonic()
            found = measure()
            known = (read_json(path) if path.exists() else {}) | {name: found}
            write_json(path, known)
            say(f"{name}: finished after {time.monotonic() - start:.0f} s")
        return known[name]

    # ----------------------------------------------------------------- tokenizers

    def tokenizer(self, coin: float | None) -> Path:
        """The base tokenizer (None), or it with its decoder trained further, all else frozen (paper section 4).

        A base that isn't given is trained from scratch on the discrete path alone. `coin` is the share of hybrid
        steps of a decoder's training: 0 is the discrete path alone, 1 the hybrid path alone, on which the
        tokenizer is a continuous autoencoder.
        """
        if coin is None and self.sizes.base is not None:
            return self.sizes.base
        steps, run = self.budget.tokenizer, self.out / self.tokenizer_name(coin)
        losses = replace(
            emoji_tokenizer().losses,
            perceptual=self.sizes.perceptual,
            perceptual_crop=self.sizes.image_size // 2,
            hybrid_probability=coin or 0.0,
            frozen_encoder=coin is not None,
            continuous_steps=steps // 5 if coin is None else 0,
        )
        run_config = RunConfig(
            steps=steps,
            batch_size=self.sizes.tokenizer_batch,
            seed=self.seed,
            optimizer=OptimizerConfig(
                kind="muon",  # in few steps it gets further than AdamW
                learning_rate=2e-3 if coin is None else 5e-4,
                warmup_steps=min(50, steps // 10),
                final_fraction=0.02,
                ema_decay=0.98,
            ),
            log_every=max(1, steps // 20),
            picture_every=steps,
        )
        recipe = TokenizerRecipe(self.sizes.image_size, self.sizes.tokenizer, losses, run_config)
        start = None if coin is None else self.tokenizer(None)
        self.train(run, steps, lambda: train_tokenizer(self.data, run, recipe, start_from=start, progress=watched()))
        return run / "tokenizer"

    def tokenizer_name(self, coin: float | None) -> str:
        kind = "base" if coin is None else f"decoder-coin{coin:.2f}"
        return f"{kind}-{self.budget.tokenizer}-seed{self.seed}"

    # ----------------------------------------------------------------- generators

    def generator(self, dropped: float, *, hybrid: bool = True) -> Path:
        """A generator whose training drops this share of the last scale's cells; returns the run's folder.

        Without `hybrid` it has no residual tokens: VAR's model, of the same transformer.
        """
        tokenizer = self.tokenizer(0.5)
        steps, template = self.budget.generator, emoji_generator()
        run_config = RunConfig(
            steps=steps,
            batch_size=self.sizes.generator_batch,
            seed=self.seed,
            optimizer=replace(template.run.optimizer, warmup_steps=min(50, steps // 10), ema_decay=0.99),
            log_every=max(1, steps // 20),
            picture_every=steps,
        )
        recipe = GeneratorRecipe(
            name=self.generator_name(dropped, hybrid=hybrid),
            phases=(Phase(self.sizes.image_size, self.sizes.transformer.sides),),
            transformer=self.sizes.transformer if hybrid else replace(self.sizes.transformer, residual=None),
            losses=replace(template.losses, subsample_last_scale=dropped > 0, drop_share=dropped or None),
            run=run_config,
            sampling=template.sampling,
        )
        run = self.out / recipe.name
        self.train(
            run,
            steps,
            lambda: train_generator(self.data, tokenizer, run, recipe, cache_dir=self.tokens, progress=watched()),
        )
        return run

    @property
    def tokens(self) -> Path:
        """The token caches of all generators."""
        return self.out / f"tokens-{self.budget.tokenizer}-seed{self.seed}"

    def generator_name(self, dropped: float, *, hybrid: bool = True) -> str:
        kind = "generator" if hybrid else "discrete-generator"
        return f"{kind}-drop{dropped:.2f}-{self.budget.generator}-of-{self.budget.tokenizer}-seed{self.seed}"

    def train(self, run: Path, steps: int, train: Callable[[], int]) -> None:
        """Finish a run unless it is finished. Raises UserError if it is interrupted."""
        state = run / "checkpoint" / "state.json"
        if state.exists() and read_json(state).get("step") == steps:
            return
        say(f"{run.name}: {steps} steps")
        done = train()
        if done < steps:
            raise UserError(f"{run.name} stopped after {done} of {steps} steps; run the same command again to resume")


def last_figure(run: Path, name: str) -> float:
    """The last value that a run has logged under this name."""
    return [row[name] for row in _rows(run) if name in row][-1]


def seconds_per_step(run: Path, batch_size: int) -> float:
    """The median over the windows of a run's log, the first left out where there are more."""
    rates = [row["images_per_second"] for row in _rows(run) if "images_per_second" in row]
    return batch_size / statistics.median(rates[1:] or rates)


def _rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def watched() -> bool:
    """Whether somebody looks at progress bars."""
    return sys.stderr.isatty()
