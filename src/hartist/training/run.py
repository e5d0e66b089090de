"""Starting the stages from a data folder and a recipe."""

from __future__ import annotations

from pathlib import Path

from hartist.training.images import load_images
from hartist.training.loop import train
from hartist.training.recipes import TokenizerRecipe
from hartist.training.tokenizer_stage import TokenizerStage


def train_tokenizer(data: Path, out: Path, recipe: TokenizerRecipe, *, progress: bool = True) -> int:
    """Train a tokenizer; returns the number of finished steps. The result is in out/tokenizer."""
    train_set = load_images(data, "train", recipe.image_size, progress=progress)
    validation = load_images(data, "validation", recipe.image_size, progress=progress)
    stage = TokenizerStage(
        recipe.tokenizer, recipe.losses, recipe.run, train_set.pixels, validation.pixels, train_set.fingerprint
    )
    return train(stage, recipe.run, out, progress=progress)
