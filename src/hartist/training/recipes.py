"""Recipes: the settings with which a model is trained, as functions."""

from __future__ import annotations

from dataclasses import dataclass

from hartist.config import ResidualConfig, TokenizerConfig, TransformerConfig
from hartist.generation.sampling import SamplingSettings
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
    name: str
    image_size: int
    transformer: TransformerConfig
    losses: GeneratorLossConfig
    run: RunConfig
    sampling: SamplingSettings
    """Sampling settings that the model is shipped with."""


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
        losses=TokenizerLossConfig(
            perceptual=0.1,
            perceptual_crop=48,
            perceptual_share=0.5,
            continuous_steps=400,
            revive_every=50,
        ),
        run=RunConfig(
            steps=steps,
            batch_size=16,
            optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=100, ema_decay=0.998),
            picture_every=500,
        ),
    )


def emoji_generator(steps: int = 5800) -> GeneratorRecipe:
    """An 11 M transformer with axial RoPE over MiniLM states: the bundled model, for two CPU cores."""
    return GeneratorRecipe(
        name="emoji",
        image_size=128,
        transformer=TransformerConfig(
            sides=EMOJI_SIDES,
            vocab_size=1024,
            latent_channels=16,
            context_tokens=24,
            context_dim=384,
            width=320,
            depth=8,
            heads=5,
            mlp_ratio=3.6,
            modulation="table",
            rope="axial",
            step_embedding="table",
            context_norm_scale=1.0,
            attention_scale=1.0,
            residual=ResidualConfig(width=256, depth=3, steps=8),
        ),
        losses=GeneratorLossConfig(diffusion_repeats=2, scale_weight_power=0.5, coarse_share=0.6, coarse_until=0.477),
        run=RunConfig(
            steps=steps,
            batch_size=16,
            optimizer=OptimizerConfig(learning_rate=8e-4, warmup_steps=150, ema_decay=0.999),
            picture_every=800,
        ),
        sampling=SamplingSettings(
            guidance=2.0, top_k=100, temperature=0.5, residual_guidance=0.0, residual_temperature=0.5
        ),
    )
