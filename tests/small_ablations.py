"""A dataset, networks and sizes for the ablations' and claims' commands, small enough for tests"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hartist.config import ResidualConfig, TokenizerConfig
from hartist.evaluation.features import FeatureNetwork
from hartist.training.recipes_emoji import emoji_generator
from small import pictures, write_images
from tiny import TEXT_TOKENS, WORDS, write_tiny_bert

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import ablation_runs

SIDE, STEPS = 32, 2


def fake_network(name: str) -> FeatureNetwork:
    """Mean colours of the picture's quarters."""

    def compute(pixels_BHW3: Tensor) -> Tensor:
        parts = torch.nn.functional.adaptive_avg_pool2d(pixels_BHW3.movedim(-1, 1).float() / 255, 2)
        return parts.flatten(1)

    return FeatureNetwork(name, f"fake-{name}", compute)


def tiny_sizes() -> ablation_runs.Sizes:
    sides = (1, 2, 8)
    tokenizer = TokenizerConfig(
        vocab_size=32,
        latent_channels=4,
        channels=32,
        channel_multipliers=(1,),
        blocks_per_level=1,
        stem=4,
        sides=sides,
    )
    transformer = replace(
        emoji_generator().transformer,
        sides=sides,
        context_tokens=TEXT_TOKENS,
        width=32,
        depth=2,
        heads=2,
        residual=ResidualConfig(width=32, depth=1, steps=2),
    )
    return ablation_runs.Sizes(SIDE, tokenizer, transformer, tokenizer_batch=4, generator_batch=4, perceptual=0.0)


def write_dataset(root: Path) -> Path:
    """Ten training and six validation pictures in root/data; and a text encoder beside them."""
    for seed, (split, count) in enumerate([("train", 10), ("validation", 6)]):
        texts = [f"a {WORDS[i % 5]}, flat" for i in range(count)]
        write_images(root / "data" / split, pictures(count, seed, SIDE), texts)
    write_tiny_bert(root / "text_encoder")
    return root
