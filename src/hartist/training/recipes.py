"""Recipes: the settings with which a model is trained, as functions. docs/recipes/ has a page for each"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from hartist.config import ResidualConfig, TokenizerConfig, TransformerConfig
from hartist.errors import UserError
from hartist.generation.sampling import SamplingSettings
from hartist.presets import hart_class
from hartist.scales import SIDES_256, SIDES_512, SIDES_1024
from hartist.training.adversarial_config import AdversarialConfig
from hartist.training.config import GeneratorLossConfig, OptimizerConfig, Phase, RunConfig, TokenizerLossConfig

SIDES_64, SIDES_128 = SIDES_256[:4], SIDES_256[:7]
"""The beginnings of the 256 px schedule: grids of 4×4 and 8×8 cells, f16. Scale k is the same size in all."""


@dataclass(frozen=True)
class TokenizerRecipe:
    image_size: int
    tokenizer: TokenizerConfig
    losses: TokenizerLossConfig
    run: RunConfig


@dataclass(frozen=True)
class GeneratorRecipe:
    name: str
    phases: tuple[Phase, ...]
    """Resolutions in order; the last one's scales are the transformer's."""
    transformer: TransformerConfig
    losses: GeneratorLossConfig
    run: RunConfig
    sampling: SamplingSettings
    """Sampling settings that the model is shipped with."""

    def __post_init__(self) -> None:
        if not self.phases or tuple(self.phases[-1].sides) != tuple(self.transformer.sides):
            raise UserError(f"recipe {self.name}: its last phase must have the transformer's scales")
        if self.phases[-1].scales not in (0, len(self.transformer.sides)):
            raise UserError(f"recipe {self.name}: its last phase must see all scales")
        if abs(sum(phase.share for phase in self.phases) - 1) > 1e-6:
            raise UserError(f"recipe {self.name}: the shares of its phases do not add up to 1")

    @property
    def image_size(self) -> int:
        return self.phases[-1].image_size

    def first_steps(self) -> list[int]:
        """The step with which each phase begins."""
        ends = [sum(phase.share for phase in self.phases[:i]) for i in range(len(self.phases))]
        return [round(end * self.run.steps) for end in ends]


def emoji_tokenizer() -> TokenizerRecipe:
    """256 px, 16×16×32 latent, 2,048 codes, the paper's ten scales: the bundled tokenizer, for two CPU cores."""
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


def emoji_generator() -> GeneratorRecipe:
    """A transformer of 19 M with axial RoPE over MiniLM states, for two cores: the bundled model.

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
    "published": published_tokenizer,
    "scratch": scratch_tokenizer,
}
GENERATOR_RECIPES: dict[str, Callable[[], GeneratorRecipe]] = {
    "emoji": emoji_generator,
    **{f"imagenet-d{depth}": partial(imagenet, depth) for depth in (16, 20, 24, 30)},
    "text-to-image": text_to_image,
}
