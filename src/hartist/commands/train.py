"""`hartist train`: a recipe with the flags' changes, run to its end or until it is interrupted"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeVar

from hartist.commands.output import require_writable, use_threads
from hartist.errors import UserError, quoted
from hartist.generation.devices import choose_device
from hartist.generation.loading import find_model, load_any, load_tokenizer_of
from hartist.training.dry_run import describe_generator, describe_tokenizer
from hartist.training.finetune import finetune_recipe
from hartist.training.parallel import World, join_world
from hartist.training.recipe import GeneratorRecipe, TokenizerRecipe
from hartist.training.recipes import GENERATOR_RECIPES, TOKENIZER_RECIPES
from hartist.training.run import DataOptions, carried, going_on, train_generator, train_tokenizer
from hartist.training.settings import with_setting

Recipe = TypeVar("Recipe", TokenizerRecipe, GeneratorRecipe)

INTERRUPTED = 130


def run(args: argparse.Namespace) -> int:
    use_threads(args.threads)
    if not args.dry_run:
        require_writable(args.out)
    with join_world(choose_device(args.device).type) as world:
        return _run_tokenizer(args, world) if args.stage == "tokenizer" else _run_generator(args, world)


def _run_tokenizer(args: argparse.Namespace, world: World) -> int:
    recipe = with_flags(_recipe(TOKENIZER_RECIPES, args.recipe), args)
    start_from = find_model(args.start_from) if args.start_from is not None else None
    if args.dry_run:
        started = carried(start_from, double=args.double_stem, sides=args.scales)
        if started is not None:
            recipe = dataclasses.replace(recipe, tokenizer=started.config)
        return _tell(describe_tokenizer(recipe, world), world)
    done = train_tokenizer(
        args.data,
        args.out,
        recipe,
        options=DataOptions(args.stream, args.workers, args.crop, args.flip),
        start_from=start_from,
        double=args.double_stem,
        sides=args.scales,
        trunk=args.perceptual_weights,
        discriminator=args.discriminator,
        world=world,
        progress=not args.quiet,
    )
    return _report(done, recipe.run.steps, str(args.out / "tokenizer"), world)


def _run_generator(args: argparse.Namespace, world: World) -> int:
    start = load_any(find_model(args.start_from)) if args.start_from is not None else None
    finetuning = args.stage == "finetune"
    if finetuning:
        assert start is not None
        recipe = with_flags(finetune_recipe(start), args)
    else:
        recipe = with_flags(_recipe(GENERATOR_RECIPES, args.recipe), args)
    if args.dry_run:
        if start is not None and not finetuning:
            tokenizer = start.tokenizer if args.tokenizer is None else load_tokenizer_of(args.tokenizer)
            recipe = going_on(recipe, start, tokenizer)
        return _tell(describe_generator(recipe, world, args.strategy), world)
    done = train_generator(
        args.data,
        None if finetuning else args.tokenizer,
        args.out,
        recipe,
        text_encoder_dir=None if finetuning else args.text_encoder,
        start=start,
        lora_rank=args.lora if finetuning else 0,
        cache_dir=args.cache,
        world=world,
        strategy=args.strategy,
        progress=not args.quiet,
    )
    return _report(done, recipe.run.steps, str(args.out / "model"), world)


def _report(done: int, steps: int, result: str, world: World) -> int:
    if done < steps:
        _tell(f"stopped after step {done} of {steps}; to resume, run the same command again", world)
        return INTERRUPTED
    return _tell(result, world)


def _tell(text: str, world: World) -> int:
    """Once, however many ranks there are."""
    if world.main:
        print(text)
    return 0


def _recipe(known: Mapping[str, Callable[[], Recipe]], name: str) -> Recipe:
    if name not in known:
        raise UserError(f"no recipe {quoted(name)}; there are {', '.join(known)}")
    return known[name]()


def with_flags(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """The recipe with what the command line changes. Raises UserError for what doesn't fit."""
    for name, least in (("steps", 1), ("batch_size", 1), ("micro_batch", 0), ("learning_rate", 0.0)):
        value = getattr(args, name)
        if value is not None and not least <= value <= 10**9:
            raise UserError(f"--{name.replace('_', '-')} {value} is out of range; leave it out for the recipe's own")
    names = ("steps", "batch_size", "micro_batch", "seed")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    run_config = dataclasses.replace(recipe.run, **changes)
    if args.no_bf16:
        run_config = dataclasses.replace(run_config, bf16=False)
    if args.learning_rate is not None:
        optimizer = dataclasses.replace(run_config.optimizer, learning_rate=args.learning_rate)
        run_config = dataclasses.replace(run_config, optimizer=optimizer)
    recipe = dataclasses.replace(recipe, run=run_config)
    for assignment in args.set:
        recipe = with_setting(recipe, assignment)
    return recipe
