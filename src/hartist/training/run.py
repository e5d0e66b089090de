"""Starting the stages from a data folder and a recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from hartist.checkpoint import check_keys, read_weights
from hartist.errors import UserError
from hartist.generation.checkpoint import LoadedModel
from hartist.generation.loading import find_model
from hartist.text.loading import load_text_encoder
from hartist.tokenizer.checkpoint import load_tokenizer
from hartist.training.generator_stage import GeneratorStage, residual_scale
from hartist.training.images import load_images
from hartist.training.loop import train
from hartist.training.recipes import GeneratorRecipe, TokenizerRecipe
from hartist.training.token_cache import build_token_cache, cache_key
from hartist.training.tokenizer_stage import TokenizerStage
from hartist.transformer.model import ScaleTransformer


def train_tokenizer(data: Path, out: Path, recipe: TokenizerRecipe, *, progress: bool = True) -> int:
    """Train a tokenizer; returns the number of finished steps. The result is in out/tokenizer."""
    train_set = load_images(data, "train", recipe.image_size, progress=progress)
    validation = load_images(data, "validation", recipe.image_size, progress=progress)
    stage = TokenizerStage(
        recipe.tokenizer, recipe.losses, recipe.run, train_set.pixels, validation.pixels, train_set.fingerprint
    )
    return train(stage, recipe.run, out, progress=progress)


def train_generator(
    data: Path,
    tokenizer_dir: Path,
    out: Path,
    recipe: GeneratorRecipe,
    *,
    text_encoder_dir: Path | None = None,
    start_from: Path | None = None,
    progress: bool = True,
) -> int:
    """Train a text-conditional generator; returns the number of finished steps. The result is in out/model.

    Without `text_encoder_dir` the bundled model's MiniLM encodes the captions. Tokens and text states
    are computed once, into out/cache. `start_from` is a model whose transformer weights the run begins
    with, instead of random ones; it must have the recipe's configuration and fit the tokenizer.
    """
    tokenizer = load_tokenizer(tokenizer_dir)
    text_encoder_dir = text_encoder_dir or find_model(None) / "text_encoder"
    encoder = load_text_encoder(text_encoder_dir, num_tokens=recipe.transformer.context_tokens)
    _check_recipe(recipe, tokenizer.config.sides)

    caches = {}
    for split in ("train", "validation"):
        images = load_images(data, split, recipe.image_size, progress=progress)
        caches[split] = (
            build_token_cache(out / "cache" / f"{split}.safetensors", images, tokenizer, encoder, progress=progress),
            cache_key(images, tokenizer, encoder),
            images.items,
        )
    cache, key, items = caches["train"]
    config = dataclasses.replace(
        recipe.transformer,
        vocab_size=tokenizer.config.vocab_size,
        latent_channels=tokenizer.config.latent_channels,
        context_dim=encoder.dim,
    )
    if config.residual is not None:
        # The spread of the residual tokens is the tokenizer's; diffusion wants it within ±1.
        scale = residual_scale(cache, tokenizer.quantizer)
        config = dataclasses.replace(config, residual=dataclasses.replace(config.residual, target_scale=scale))
    torch.manual_seed(recipe.run.seed)
    transformer = ScaleTransformer(config)
    transformer.initialise()
    if start_from is not None:
        weights = read_weights(start_from / "transformer", torch.float32)
        check_keys(transformer.state_dict(), weights, str(start_from))
        transformer.load_state_dict(weights)
    model = LoadedModel(
        tokenizer, transformer, encoder, recipe.name, settings=recipe.sampling, text_encoder_dir=text_encoder_dir
    )
    held_out = caches["validation"][2]
    prompts = [item.text for item in items[:: max(1, len(items) // 24)][:24]]
    prompts += [item.text for item in held_out[:: max(1, len(held_out) // 8)][:8]]
    stage = GeneratorStage(config, recipe.losses, recipe.run, cache, caches["validation"][0], model, key, prompts)
    return train(stage, recipe.run, out, progress=progress)


def _check_recipe(recipe: GeneratorRecipe, sides: tuple[object, ...]) -> None:
    if tuple(recipe.transformer.sides) != tuple(sides):
        raise UserError(
            f"the tokenizer was trained for the scales {list(sides)}, the recipe has {list(recipe.transformer.sides)}"
        )
