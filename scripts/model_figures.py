"""The model card's figures: python scripts/model_figures.py DATASET   (as `hartist data emoji` wrote it)

Codes in use per scale over all training pictures, and the generator's cross-entropy over every ninth.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from hartist import Pipeline
from hartist.pixels import from_uint8
from hartist.training.generator_stage import GeneratorStage, TrainingPhase
from hartist.training.images import ImageSet, load_images
from hartist.training.recipes_emoji import emoji_128_generator
from hartist.training.token_cache import build_token_cache

EVERY = 9


@torch.no_grad()
def main(dataset: Path) -> None:
    pipe = Pipeline.from_pretrained(device="cpu")
    model = pipe.model
    assert model.text_encoder is not None
    images = load_images(dataset, "train", pipe.image_size[0])
    batches = [model.tokenizer.encode(from_uint8(pixels)).ids for pixels in images.pixels.split(32)]
    usage = [len(torch.cat(scale).unique()) for scale in zip(*batches, strict=True)]
    print("codes in use per scale:", usage)

    part = ImageSet(images.pixels[::EVERY], images.items[::EVERY], images.fingerprint)
    with tempfile.TemporaryDirectory() as folder:
        cache = build_token_cache(Path(folder) / "part", part, model.tokenizer, model.text_encoder)
    recipe, schedule = emoji_128_generator(), model.transformer.schedule
    phase = TrainingPhase(0, recipe.run.batch_size, schedule, len(schedule), cache, cache)
    stage = GeneratorStage(recipe.losses, recipe.run, [phase], model, "figures")
    torch.manual_seed(0)
    sums: dict[str, list[float]] = {}
    for rows in torch.arange(len(cache)).split(32):
        for key, value in stage.batch_loss(model.transformer, cache.rows(rows), scales=len(schedule)).logs.items():
            sums.setdefault(key, []).append(value)
    for key, values in sums.items():
        print(f"{key}: {sum(values) / len(values):.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
