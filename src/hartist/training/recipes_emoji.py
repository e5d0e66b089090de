"""The recipes of emoji, for two CPU cores. docs/recipes/emoji.md"""

from __future__ import annotations

from dataclasses import replace

from hartist.config import ResidualConfig, TokenizerConfig, TransformerConfig
from hartist.generation.sampling import SamplingSettings
from hartist.scales import SIDES_256
from hartist.training.config import GeneratorLossConfig, OptimizerConfig, Phase, RunConfig, TokenizerLossConfig
from hartist.training.recipe import GeneratorRecipe, TokenizerRecipe

SIDES_64, SIDES_128 = SIDES_256[:4], SIDES_256[:7]
"""The beginnings of the 256 px schedule: grids of 4×4 and 8×8 cells, f16. Scale k is the same size in all."""

EMOJI_128_SIDES = (1, 2, 3, 4, 6, 9, 16)


def emoji_tokenizer() -> TokenizerRecipe:
    """256 px, 16×16×32 latent, 2,048 codes, the paper's ten scales: from nothing, for two CPU cores."""
    return TokenizerRecipe(
        image_size=256,
        tokenizer=TokenizerConfig(
            vocab_size=2048,
            latent_channels=32,
            channels=64,
            channel_multipliers=(1, 2, 4),
            blocks_per_level=1,
            stem=4,
            sides=SIDES_256,
        ),
        losses=TokenizerLossConfig(
            perceptual=0.1,
            perceptual_crop=64,
            perceptual_share=0.5,
            continuous_steps=1200,
            revive_every=50,
        ),
        run=RunConfig(
            steps=3000,
            batch_size=16,
            optimizer=OptimizerConfig(
                kind="muon", learning_rate=2e-3, warmup_steps=100, final_fraction=0.02, ema_decay=0.998
            ),
            picture_every=300,
        ),
    )


def emoji_128_tokenizer() -> TokenizerRecipe:
    """128 px, 16×16×16 latent, 1,024 codes, seven scales: what the bundled tokenizer began as."""
    return TokenizerRecipe(
        image_size=128,
        tokenizer=TokenizerConfig(
            vocab_size=1024,
            latent_channels=16,
            channels=64,
            channel_multipliers=(1, 2),
            stem=4,
            sides=EMOJI_128_SIDES,
        ),
        losses=TokenizerLossConfig(
            perceptual=0.1, perceptual_crop=48, perceptual_share=0.5, continuous_steps=400, revive_every=50
        ),
        run=RunConfig(
            steps=3600,
            batch_size=16,
            optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=100, ema_decay=0.998),
            picture_every=500,
        ),
    )


def emoji_256_tokenizer() -> TokenizerRecipe:
    """The bundled tokenizer: `emoji-128`'s for twice the size, on the paper's ten scales (`--start-from`)."""
    recipe, run = emoji_tokenizer(), emoji_tokenizer().run
    return replace(
        recipe,
        tokenizer=replace(emoji_128_tokenizer().tokenizer, stem=8, sides=SIDES_256),
        losses=replace(recipe.losses, continuous_steps=0),
        run=replace(run, steps=2000, optimizer=replace(run.optimizer, learning_rate=1e-3)),
    )


def emoji_generator() -> GeneratorRecipe:
    """A transformer of 19 M with axial RoPE over MiniLM states, for two cores: from nothing.

    64 → 128 → 256 px, there with the coarse scales first: what a prompt decides lies in them, and they are cheap.
    """
    return GeneratorRecipe(
        name="emoji",
        phases=(
            Phase(64, SIDES_64, share=0.17, batch_factor=4),
            Phase(128, SIDES_128, share=0.17, batch_factor=2),
            Phase(256, SIDES_256, share=0.38, batch_factor=2, scales=7),
            Phase(256, SIDES_256, share=0.28),
        ),
        transformer=TransformerConfig(
            sides=SIDES_256,
            vocab_size=2048,
            latent_channels=32,
            context_tokens=32,
            context_dim=384,
            width=384,
            depth=9,
            heads=6,
            mlp_ratio=4.0,
            modulation="table",
            rope="axial",
            step_embedding="table",
            context_norm_scale=1.0,
            attention_scale=1.0,
            residual=ResidualConfig(width=320, depth=3, steps=8),
        ),
        losses=GeneratorLossConfig(diffusion_repeats=2, scale_weight_power=0.5),
        run=RunConfig(
            steps=6000,
            batch_size=16,
            optimizer=OptimizerConfig(
                kind="muon",
                learning_rate=1.5e-3,
                schedule="wsd",
                warmup_steps=100,
                final_fraction=0.02,
                ema_decay=0.998,
            ),
            picture_every=500,
        ),
        sampling=SamplingSettings(
            guidance=2.0, top_k=100, temperature=0.5, residual_guidance=0.0, residual_temperature=0.5
        ),
    )


def emoji_128_generator() -> GeneratorRecipe:
    """A transformer of 11 M on the tokens of `emoji-128`, coarse scales first: what the bundled model began as."""
    recipe = emoji_generator()
    return replace(
        recipe,
        phases=(Phase(128, EMOJI_128_SIDES),),
        transformer=replace(
            recipe.transformer,
            sides=EMOJI_128_SIDES,
            vocab_size=1024,
            latent_channels=16,
            context_tokens=24,
            width=320,
            depth=8,
            heads=5,
            mlp_ratio=3.6,
            residual=ResidualConfig(width=256, depth=3, steps=8),
        ),
        losses=replace(recipe.losses, coarse_share=0.6, coarse_until=0.477),
        run=RunConfig(
            steps=5800,
            batch_size=16,
            optimizer=OptimizerConfig(learning_rate=8e-4, warmup_steps=150, ema_decay=0.999),
            picture_every=800,
        ),
    )


def emoji_256_generator() -> GeneratorRecipe:
    """The bundled model: `emoji-128`'s transformer carried to 256 px and the paper's ten scales (`--start-from`)."""
    recipe, run = emoji_generator(), emoji_generator().run
    return replace(
        recipe,
        phases=(Phase(256, SIDES_256, share=0.58, batch_factor=2, scales=7), Phase(256, SIDES_256, share=0.42)),
        transformer=replace(emoji_128_generator().transformer, sides=SIDES_256),
        run=replace(run, steps=3000, optimizer=replace(run.optimizer, learning_rate=1e-3, warmup_steps=50)),
    )
