"""A model on other scales than it was made for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from hartist.cli import main
from hartist.errors import UserError
from hartist.generation.checkpoint import load_model
from hartist.generation.loading import load_tokenizer_of
from hartist.scales import ScaleSchedule
from hartist.tokenizer.checkpoint import save_tokenizer
from hartist.tokenizer.sides import tokenizer_with_sides
from hartist.training.config import Phase
from hartist.training.recipes_emoji import emoji_256_generator
from hartist.training.run import train_generator
from hartist.transformer.sides import transformer_with_sides
from small import VAR, normal, pictures, random_context, random_tokenizer, random_transformer, write_images
from tiny import SIZE, write_tiny_text_model

OLD, NEW = (1, 2, 4), (1, 2, 3, 4)


def test_a_tokenizer_on_other_scales_is_the_same_network_with_that_schedule() -> None:
    old = random_tokenizer(sides=OLD)
    new = tokenizer_with_sides(old, NEW)
    assert (old.config.sides, new.config.sides) == (OLD, NEW)
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    expected, found = old.encode(image, ScaleSchedule.from_sides(NEW)), new.encode(image)
    assert [ids.shape[1] for ids in found.ids] == [1, 4, 9, 16]
    assert all(torch.equal(a, b) for a, b in zip(expected.ids, found.ids, strict=True))
    torch.testing.assert_close(new.decode(found), old.decode(expected))


def test_a_tokenizer_with_a_phi_a_scale_has_no_other_schedule() -> None:
    old = random_tokenizer(sides=OLD, phi_sharing=0)
    assert tokenizer_with_sides(old, (1, 3, 4)).config.sides == (1, 3, 4)  # as many scales: as many φ
    with pytest.raises(UserError, match="φ for each of its 3 scales"):
        tokenizer_with_sides(old, NEW)


def test_a_transformers_table_is_read_between_its_scales() -> None:
    old = random_transformer(sides=OLD, step_embedding="table")
    new = transformer_with_sides(old, NEW)
    table, read = old.step_embed.weight, new.step_embed.weight
    assert torch.equal(read[[0, 1, 3]], table)
    share = (torch.tensor(9 / 4).log() / torch.tensor(16 / 4).log()).item()  # 3×3 cells lie between 2×2 and 4×4
    torch.testing.assert_close(read[2], table[1].lerp(table[2], share))
    larger = transformer_with_sides(old, (1, 4, 8)).step_embed.weight
    assert torch.equal(larger[2], table[2])  # beyond the last one there is nothing to read
    assert torch.equal(transformer_with_sides(new, OLD).step_embed.weight, table)


def test_a_transformer_on_other_scales_sees_cells_where_it_saw_them() -> None:
    """The first scales of a schedule, its last one unchanged, don't depend on what comes after."""
    old = random_transformer(sides=(1, 2, 3, 4))
    new = transformer_with_sides(old, (1, 2, 4))
    inputs = [normal(2, n * n, 4, seed=n) for n in (2, 3, 4)]
    context = random_context(2)
    before = old.forward_all(torch.cat(inputs, 1), old.prepare(context)).hidden_BTD
    after = new.forward_all(torch.cat([inputs[0], inputs[2]], 1), new.prepare(context)).hidden_BTD
    torch.testing.assert_close(after[:, :5], before[:, :5])
    assert not torch.allclose(after[:, 5:], before[:, 14:], atol=1e-3)  # these see other scales before them


def test_absolute_positions_have_no_other_scales() -> None:
    old = random_transformer(**{**VAR, "sides": OLD})
    assert transformer_with_sides(old, OLD).config == old.config
    with pytest.raises(UserError, match="absolute positions"):
        transformer_with_sides(old, NEW)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split in ("train", "validation"):
        write_images(tmp_path / "data" / split, pictures(6, 0, SIZE), ["a red apple, 3d"] * 6)
    return tmp_path / "data"


def test_a_tokenizers_run_can_change_its_scales(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tokenizer(random_tokenizer(sides=(1, 4)), tmp_path / "old")
    command = ["train", "tokenizer", "--data", str(data), "--out", str(tmp_path / "run"), "-q", "--scales", "1,2,3,4"]
    command += ["--steps", "1", "--batch-size", "2", "--set", f"image_size={SIZE}", "--set", "losses.perceptual=0"]
    command += ["--set", "losses.continuous_steps=0"]
    assert main(command) == 2
    assert "--scales" in capsys.readouterr().err
    command += ["--start-from", str(tmp_path / "old")]
    assert main([*command, "--scales", "1,2,3"]) == 2
    assert "do not make the 3×3 cells" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(command) == 0
    assert load_tokenizer_of(tmp_path / "run" / "tokenizer").config.sides == (1, 2, 3, 4)


def test_a_generators_run_carries_a_model_to_the_recipes_scales(data: Path, tmp_path: Path) -> None:
    """The model's own sizes, whatever the recipe's are; its tokenizer's new scales."""
    start, scales = write_tiny_text_model(tmp_path / "start"), (1, 2, 4)
    recipe = emoji_256_generator()
    recipe = dataclasses.replace(
        recipe,
        phases=(Phase(SIZE, scales),),
        transformer=dataclasses.replace(recipe.transformer, sides=scales),
        run=dataclasses.replace(recipe.run, steps=1, batch_size=2),
    )
    save_tokenizer(tokenizer_with_sides(load_tokenizer_of(start), scales), tmp_path / "tokenizer")
    model = load_model(start)
    train_generator(data, tmp_path / "tokenizer", tmp_path / "run", recipe, start=model, progress=False)
    config = load_model(tmp_path / "run" / "model").transformer.config
    assert config == dataclasses.replace(model.transformer.config, sides=scales)
    save_tokenizer(random_tokenizer(sides=scales), tmp_path / "stranger")
    with pytest.raises(UserError, match="32 codes of 4 channels"):
        train_generator(data, tmp_path / "stranger", tmp_path / "other", recipe, start=model, progress=False)
