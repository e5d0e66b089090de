"""`hartist train`: a recipe with the flags' changes, run to its end or until it is interrupted."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TypeVar

from hartist.commands.output import require_writable, use_threads
from hartist.errors import UserError, quoted
from hartist.generation.loading import find_model
from hartist.training import recipes
from hartist.training.recipes import GeneratorRecipe, TokenizerRecipe
from hartist.training.run import train_generator, train_tokenizer

Recipe = TypeVar("Recipe", TokenizerRecipe, GeneratorRecipe)

TOKENIZER_RECIPES = {"emoji": recipes.emoji_tokenizer}
GENERATOR_RECIPES = {"emoji": recipes.emoji_generator}
INTERRUPTED = 130


def run(args: argparse.Namespace) -> int:
    use_threads(args.threads)
    known = TOKENIZER_RECIPES if args.stage == "tokenizer" else GENERATOR_RECIPES
    if args.recipe not in known:
        raise UserError(f"no recipe {quoted(args.recipe)}; there are {', '.join(known)}")
    require_writable(args.out)
    if args.stage == "tokenizer":
        recipe = with_flags(TOKENIZER_RECIPES[args.recipe](), args)
        steps, done = recipe.run.steps, train_tokenizer(args.data, args.out, recipe, progress=not args.quiet)
        result = args.out / "tokenizer"
    else:
        generator = with_flags(GENERATOR_RECIPES[args.recipe](), args)
        steps, done = (
            generator.run.steps,
            train_generator(
                args.data,
                args.tokenizer,
                args.out,
                generator,
                text_encoder_dir=args.text_encoder,
                start_from=find_model(args.start_from) if args.start_from is not None else None,
                progress=not args.quiet,
            ),
        )
        result = args.out / "model"
    if done < steps:
        print(f"stopped after step {done} of {steps}; to resume, run the same command again")
        return INTERRUPTED
    print(result)
    return 0


def with_flags(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """The recipe with what the command line changes. Raises UserError for numbers out of range."""
    for name, least in (("steps", 1), ("batch_size", 1), ("learning_rate", 0.0)):
        value = getattr(args, name)
        if value is not None and not least <= value <= 10**9:
            raise UserError(f"--{name.replace('_', '-')} {value} is out of range; leave it out for the recipe's own")
    changes = {name: getattr(args, name) for name in ("steps", "batch_size", "seed") if getattr(args, name) is not None}
    run_config = dataclasses.replace(recipe.run, **changes)
    if args.no_bf16:
        run_config = dataclasses.replace(run_config, bf16=False)
    if args.learning_rate is not None:
        optimizer = dataclasses.replace(run_config.optimizer, learning_rate=args.learning_rate)
        run_config = dataclasses.replace(run_config, optimizer=optimizer)
    return dataclasses.replace(recipe, run=run_config)
