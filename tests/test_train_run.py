"""From a folder of captioned images to a model that generates, by the functions the command line calls."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hartist import Pipeline, UserError
from hartist.config import ResidualConfig
from hartist.generation.checkpoint import load_model, load_transformer
from hartist.training.config import OptimizerConfig, Phase, RunConfig, TokenizerLossConfig
from hartist.training.recipe import GeneratorRecipe, TokenizerRecipe
from hartist.training.recipes_emoji import emoji_generator, emoji_tokenizer
from hartist.training.run import train_generator, train_tokenizer
from tiny import SIDES, SIZE, TEXT_TOKENS, write_tiny_bert

STEPS = 4
RUN = RunConfig(steps=STEPS, batch_size=4, optimizer=OptimizerConfig(warmup_steps=1), log_every=2, picture_every=STEPS)


def tokenizer_recipe() -> TokenizerRecipe:
    recipe = emoji_tokenizer()
    config = dataclasses.replace(
        recipe.tokenizer, vocab_size=32, latent_channels=8, channels=32, channel_multipliers=(1, 1), sides=SIDES
    )
    losses = TokenizerLossConfig(continuous_steps=1, revive_every=2)
    return dataclasses.replace(recipe, image_size=SIZE, tokenizer=config, losses=losses, run=RUN)


def generator_recipe(**changes: object) -> GeneratorRecipe:
    recipe = emoji_generator()
    config = dataclasses.replace(
        recipe.transformer,
        sides=SIDES,
        context_tokens=TEXT_TOKENS,
        width=32,
        depth=2,
        heads=2,
        residual=ResidualConfig(width=32, depth=1, steps=2),
        **changes,  # type: ignore[arg-type]
    )
    losses = dataclasses.replace(recipe.losses, coarse_share=0.5)
    phases = (Phase(SIZE // 2, SIDES[:2], share=0.5, batch_factor=2), Phase(SIZE, SIDES, share=0.5))
    return dataclasses.replace(recipe, phases=phases, transformer=config, losses=losses, run=RUN)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder, a tokenizer and a generator, trained for a few steps."""
    root = tmp_path_factory.mktemp("training")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 4)):
        folder = root / "data" / split
        folder.mkdir(parents=True)
        lines = []
        for i in range(count):
            pixels = np.full((SIZE, SIZE, 3), 255, np.uint8)
            pixels[4 + i : 20 + i, 8:24] = rng.integers(0, 255, 3)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            lines.append(
                json.dumps({"file_name": f"{i}.png", "text": "red apple, 3d", "captions": ["red apple", "a cat"]})
            )
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    bert = write_tiny_bert(root / "bert")
    assert train_tokenizer(root / "data", root / "tok", tokenizer_recipe(), progress=False) == STEPS
    done = train_generator(
        root / "data",
        root / "tok" / "tokenizer",
        root / "gen",
        generator_recipe(),
        text_encoder_dir=bert,
        progress=False,
    )
    assert done == STEPS
    return root


def test_the_result_generates(trained: Path) -> None:
    pipe = Pipeline.from_pretrained(trained / "gen" / "model", device="cpu")
    assert pipe("red apple, 3d", seed=1)[0].size == (SIZE, SIZE)
    assert pipe.model.settings == emoji_generator().sampling
    assert pipe.model.transformer.config.context_dim == pipe.model.text_encoder.dim  # type: ignore[union-attr]


def test_pictures_and_logs_appear(trained: Path) -> None:
    for run, picture in (("tok", "reconstruction"), ("gen", "samples")):
        assert list((trained / run / "pictures").glob(f"{picture}_*.png"))
        rows = [json.loads(line) for line in (trained / run / "log.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == STEPS
        assert any(key.startswith("validation_") for row in rows for key in row)


def test_running_again_does_nothing_and_says_so(trained: Path) -> None:
    before = (trained / "gen" / "model" / "transformer" / "model.safetensors").read_bytes()
    done = train_generator(
        trained / "data",
        trained / "tok" / "tokenizer",
        trained / "gen",
        generator_recipe(),
        text_encoder_dir=trained / "bert",
        progress=False,
    )
    assert done == STEPS
    assert (trained / "gen" / "model" / "transformer" / "model.safetensors").read_bytes() == before


def test_a_run_can_begin_with_the_weights_of_a_model(trained: Path, tmp_path: Path) -> None:
    still = dataclasses.replace(RUN, steps=1, optimizer=OptimizerConfig(learning_rate=0.0, warmup_steps=1))
    recipe = dataclasses.replace(generator_recipe(), run=still)
    arguments = (trained / "data", trained / "tok" / "tokenizer", tmp_path / "run", recipe)
    start = trained / "gen" / "model"
    train_generator(*arguments, text_encoder_dir=trained / "bert", start=load_model(start), progress=False)
    old, new = (load_transformer(path / "transformer").state_dict() for path in (start, tmp_path / "run" / "model"))
    for name, tensor in old.items():
        torch.testing.assert_close(new[name], tensor, msg=name, rtol=1e-2, atol=1e-3)  # stored as bfloat16


def test_scales_that_do_not_fit_the_tokenizer_are_refused(trained: Path, tmp_path: Path) -> None:
    recipe = generator_recipe()
    other = dataclasses.replace(
        recipe,
        phases=(Phase(SIZE, (1, 2, 3)),),
        transformer=dataclasses.replace(recipe.transformer, sides=(1, 2, 3)),
    )
    with pytest.raises(UserError, match="pixels a cell"):
        train_generator(
            trained / "data",
            trained / "tok" / "tokenizer",
            tmp_path / "run",
            other,
            text_encoder_dir=trained / "bert",
            progress=False,
        )
