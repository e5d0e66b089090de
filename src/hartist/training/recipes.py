"""Recipes: the settings with which a model is trained, as functions."""

from __future__ import annotations

from dataclasses import dataclass

from hartist.config import ResidualConfig, TokenizerConfig, TransformerConfig
from hartist.training.config import GeneratorLossConfig, OptimizerConfig, RunConfig, TokenizerLossConfig

EMOJI_SIDES = (1, 2, 3, 4, 6, 9, 16)


@dataclass(frozen=True)
class TokenizerRecipe:
    image_size: int
    tokenizer: TokenizerConfig
    losses: TokenizerLossConfig
    run: RunConfig


@dataclass(frozen=True)
class GeneratorRecipe:
    transformer: TransformerConfig
    losses: GeneratorLossConfig
    run: RunConfig


def emoji_tokenizer(steps: int = 3600) -> TokenizerRecipe:
    """128 px, 16×16×16 latent, 1,024 codes, seven scales: the bundled model's tokenizer, for two CPU cores."""
    return TokenizerRecipe(
        image_size=128,
        tokenizer=TokenizerConfig(
            vocab_size=1024,
            latent_channels=16,
            channels=64,
            channel_multipliers=(1, 2),
            stem=4,
            sides=EMOJI_SIDES,
        ),
        losses=TokenizerLossConfig(perceptual=0.1, perceptual_crop=48, perceptual_share=0.5, continuous_steps=400, revive_every=50),
        run=RunConfig(
            steps=steps,
            batch_size=16,
            optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=100, ema_decay=0.998),
            picture_every=500,
        ),
    )
