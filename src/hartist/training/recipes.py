"""Recipes: the settings with which a model is trained, as functions. docs/recipes/ has a page for each"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from hartist.config import TokenizerConfig, TransformerConfig
from hartist.generation.sampling import SamplingSettings
from hartist.presets import hart_class
from hartist.scales import SIDES_256, SIDES_512, SIDES_1024
from hartist.training.adversarial_config import AdversarialConfig
from hartist.training.config import GeneratorLossConfig, OptimizerConfig, Phase, RunConfig, TokenizerLossConfig
from hartist.training.recipe import GeneratorRecipe, TokenizerRecipe
from hartist.training.recipes_emoji import (
    emoji_128_generator,
    emoji_128_tokenizer,
    emoji_256_generator,
    emoji_256_tokenizer,
    emoji_generator,
    emoji_tokenizer,
)


def published_tokenizer() -> TokenizerRecipe:
    """The paper's way: decoder training on top of VAR's public tokenizer (`--start-from vae_ch160v4096z32.pth`)."""
    return TokenizerRecipe(
        image_size=256,
        tokenizer=TokenizerConfig(),
        losses=TokenizerLossConfig(
            frozen_encoder=True,
            perceptual=1.0,
            perceptual_network="lpips",
            perceptual_crop=256,
            adversarial=0.5,
            adversary=AdversarialConfig(channels=64, start=0.2),
            revive_every=0,
        ),
        run=RunConfig(
            steps=100_000,
            batch_size=256,
            micro_batch=32,
            optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=1000, weight_decay=0.0, ema_decay=0.9999),
            picture_every=2000,
            checkpoint_seconds=900.0,
        ),
    )


def scratch_tokenizer() -> TokenizerRecipe:
    """The released sizes from random weights, in three stages: continuous, discrete, then the coin flip."""
    recipe = published_tokenizer()
    losses = replace(
        recipe.losses, frozen_encoder=False, continuous_steps=20_000, discrete_steps=60_000, revive_every=200
    )
    return replace(recipe, losses=losses, run=replace(recipe.run, steps=300_000))


def imagenet(depth: int) -> GeneratorRecipe:
    """Class-conditional HART at 256 px on ImageNet (paper table 4), with VAR's published settings of its depth."""
    batch, epochs, base_rate, decay, floor = {
        16: (768, 200, 1e-4, 0.05, 0.1),
        20: (768, 250, 1e-4, 0.05, 0.1),
        24: (768, 350, 8e-5, 0.05, 0.01),
        30: (1024, 350, 8e-5, 0.08, 0.01),
    }[depth]
    steps = epochs * 1_281_167 // batch
    return GeneratorRecipe(
        name=f"imagenet-d{depth}",
        phases=(Phase(256, SIDES_256),),
        transformer=hart_class(depth)[1],
        losses=GeneratorLossConfig(),
        run=RunConfig(
            steps=steps,
            batch_size=batch,
            micro_batch=32,
            optimizer=OptimizerConfig(
                learning_rate=base_rate * batch / 256,
                warmup_steps=steps // 50,
                final_fraction=floor,
                weight_decay=decay,
                clip_norm=2.0,
                ema_decay=0.9999,
            ),
            log_every=100,
            picture_every=5000,
            checkpoint_seconds=1800.0,
            compile=True,
            activation_checkpointing=depth >= 30,
        ),
        sampling=SamplingSettings(guidance=1.5, top_k=900),
    )


def text_to_image() -> GeneratorRecipe:
    """The released size, 256 → 512 → 1024 px with the same weights. Batch, rates and steps are our choice: the
    authors have not published theirs."""
    return GeneratorRecipe(
        name="text-to-image",
        phases=(
            Phase(256, SIDES_256, share=0.6, batch_factor=4),
            Phase(512, SIDES_512, share=0.25, batch_factor=2),
            Phase(1024, SIDES_1024, share=0.15),
        ),
        transformer=TransformerConfig(sides=SIDES_1024, rope="axial", attention_scale=1.0),
        losses=GeneratorLossConfig(),
        run=RunConfig(
            steps=400_000,
            batch_size=256,
            micro_batch=8,
            optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=2000, ema_decay=0.9999),
            log_every=100,
            picture_every=5000,
            checkpoint_seconds=1800.0,
            compile=True,
            activation_checkpointing=True,
        ),
        sampling=SamplingSettings(),
    )


TOKENIZER_RECIPES: dict[str, Callable[[], TokenizerRecipe]] = {
    "emoji": emoji_tokenizer,
    "emoji-128": emoji_128_tokenizer,
    "emoji-256": emoji_256_tokenizer,
    "published": published_tokenizer,
    "scratch": scratch_tokenizer,
}
GENERATOR_RECIPES: dict[str, Callable[[], GeneratorRecipe]] = {
    "emoji": emoji_generator,
    "emoji-128": emoji_128_generator,
    "emoji-256": emoji_256_generator,
    **{f"imagenet-d{depth}": partial(imagenet, depth) for depth in (16, 20, 24, 30)},
    "text-to-image": text_to_image,
}
