"""Recipes, changes to them by name, and what a dry run says about them."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import pytest
import torch
from torch import nn

from hartist.cli import main
from hartist.errors import UserError
from hartist.scales import ScaleSchedule
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.training.config import GeneratorLossConfig, OptimizerConfig, Phase
from hartist.training.cost import forward_flops, peak_flops
from hartist.training.dry_run import describe_generator, describe_tokenizer, saved_bytes
from hartist.training.generator_cost import mean_kept
from hartist.training.parallel import World
from hartist.training.recipe import GeneratorRecipe, TokenizerRecipe
from hartist.training.recipes import GENERATOR_RECIPES, TOKENIZER_RECIPES
from hartist.training.recipes_emoji import emoji_generator, emoji_tokenizer
from hartist.training.settings import with_setting
from hartist.transformer.model import ScaleTransformer
from small import SIDES, tokenizer_config, transformer_config

# --------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", GENERATOR_RECIPES)
def test_a_generators_phases_fill_its_run(name: str) -> None:
    recipe = GENERATOR_RECIPES[name]()
    firsts = recipe.first_steps()
    assert firsts[0] == 0
    assert firsts == sorted(set(firsts))
    assert firsts[-1] < recipe.run.steps
    assert recipe.image_size == recipe.phases[-1].image_size
    assert recipe.run.batch_size % (recipe.run.micro_batch or 1) == 0


def test_phases_that_do_not_fit_are_refused() -> None:
    recipe = emoji_generator()
    first, *others = recipe.phases
    for phases, message in (
        (recipe.phases[:1], "last phase must have the transformer's scales"),
        ((), "last phase must have the transformer's scales"),
        ((dataclasses.replace(first, share=0.5), *others), "do not add up to 1"),
        ((*recipe.phases[:-1], dataclasses.replace(recipe.phases[-1], scales=3)), "must see all scales"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(recipe, phases=phases)


# --------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("losses.l1=2", 2),
        ("losses.l1=0.25", 0.25),
        ("run.bf16=false", False),
        ("run.optimizer.betas=[0.9,0.99]", (0.9, 0.99)),
        ("run.optimizer.schedule=wsd", "wsd"),
        ('losses.adversary.kind="patchgan"', "patchgan"),
        ("tokenizer.sides=[1,[2,3],[4,4]]", (1, (2, 3), (4, 4))),
        ("image_size=128", 128),
    ],
)
def test_any_setting_can_be_changed_by_its_name(assignment: str, value: Any) -> None:
    recipe = with_setting(emoji_tokenizer(), assignment)
    changed: Any = recipe
    for name in assignment.partition("=")[0].split("."):
        changed = getattr(changed, name)
    assert changed == value
    assert emoji_tokenizer() == emoji_tokenizer()  # nothing is changed in place
    assert recipe != emoji_tokenizer()


def test_a_setting_may_be_nothing_where_that_has_a_meaning() -> None:
    recipe = with_setting(emoji_generator(), "losses.drop_share=0.5")
    assert recipe.losses.drop_share == 0.5
    assert with_setting(recipe, "losses.drop_share=null").losses.drop_share is None
    assert with_setting(recipe, "transformer.residual=null").transformer.residual is None
    with pytest.raises(UserError, match="doesn't fit"):
        with_setting(recipe, "losses.residual=null")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("losses.l1", "no NAME=VALUE"),
        ("", "no NAME=VALUE"),
        ("loss.l1=2", "no setting 'loss'; there are image_size, tokenizer, losses, run"),
        ("losses.l3=2", "no setting 'l3'; there are l1, l2"),
        ("losses.l1.x=2", "l1 has no settings of its own"),
        ("losses.l1=much", "'much' doesn't fit; it is now 1.0"),
        ("losses.l1=", "doesn't fit"),
        ("losses=1", "doesn't fit"),
        ("run.steps=1.5", "1.5 doesn't fit; it is now 3000"),
        ("run.steps=0", "at least 1"),
        ("run.log_every=0", "at least 1"),
        ("run.micro_batch=-2", "at least 0"),
        ("run.bf16=1", "1 doesn't fit; it is now True"),
        ("run.optimizer.schedule=linear", "'linear' doesn't fit"),
        ("run.optimizer.betas=[0.9]", "doesn't fit"),
        ("run.optimizer.betas=0.9", "doesn't fit"),
        ("run.micro_batch=7", "a batch of 16 has no equal parts of 7 images"),
        ("losses.hybrid_probability=2", "2.0 is no probability"),
        ("losses.frozen_encoder=true", "frozen encoder has no continuous warm-up"),
        ("losses.adversary.start=3", "shares of the run"),
        ("run.seed=\n", "doesn't fit"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(assignment: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        with_setting(emoji_tokenizer(), assignment)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------- dry runs


def tiny_tokenizer_recipe(**changes: Any) -> TokenizerRecipe:
    recipe = emoji_tokenizer()
    run = dataclasses.replace(recipe.run, **({"batch_size": 8, "bf16": False} | changes))
    return dataclasses.replace(recipe, image_size=32, tokenizer=tokenizer_config(), run=run)


def tiny_generator_recipe(**changes: Any) -> GeneratorRecipe:
    recipe = emoji_generator()
    config = transformer_config()
    phases = (
        dataclasses.replace(recipe.phases[0], image_size=16, sides=SIDES[:2], share=0.25, batch_factor=3, scales=0),
        dataclasses.replace(recipe.phases[0], image_size=32, sides=SIDES, share=0.75, batch_factor=1, scales=0),
    )
    run = dataclasses.replace(recipe.run, **({"batch_size": 8, "bf16": False} | changes))
    return dataclasses.replace(recipe, transformer=config, phases=phases, run=run)


def gibibytes(text: str) -> tuple[float, float, float]:
    """Memory in all, of weights and the like, of activations."""
    found = re.search(r"per rank: ([\d.]+) GiB, of it ([\d.]+) for weights.* about ([\d.]+) for", text)
    assert found is not None, text
    return float(found[1]), float(found[2]), float(found[3])


def test_a_dry_run_tells_the_sizes_of_a_tokenizer() -> None:
    text = describe_tokenizer(tiny_tokenizer_recipe(), World())
    count = sum(p.numel() for p in HybridTokenizer(tokenizer_config()).parameters())
    assert f"tokenizer: {count / 1e6:.1f} M parameters, 32 px → 4×4" in text
    assert "tokens per image: 30 on 4 scales" in text
    assert "3,000 steps of 8 images" in text
    assert "8×H100, an estimate" in text


def test_a_dry_run_tells_the_sizes_of_a_generator_and_its_phases() -> None:
    text = describe_generator(tiny_generator_recipe(), World(), "ddp")
    count = sum(p.numel() for p in ScaleTransformer(transformer_config()).parameters())
    assert f"transformer: {count / 1e6:.1f} M parameters, width 32, 2 blocks" in text
    assert "tokens per image at 16 px: 5 of the condition, 5 on 2 scales" in text
    assert "tokens per image at 32 px: 5 of the condition, 30 on 4 scales" in text
    assert "1,500 steps of 24 images" in text
    assert "4,500 steps of 8 images" in text


def test_a_dry_run_follows_what_the_recipe_sees_of_the_last_scale() -> None:
    sides = (1, 2, 4, 16)
    schedule = ScaleSchedule.from_sides(sides)
    settings = [GeneratorLossConfig(subsample_last_scale=False), GeneratorLossConfig(drop_share=0.5)]
    settings.append(GeneratorLossConfig())
    assert [mean_kept(schedule, losses) for losses in settings] == [256, 128, 256 - 210]

    config = transformer_config(sides=sides, width=256, depth=12, heads=4)
    recipe = dataclasses.replace(tiny_generator_recipe(batch_size=64), transformer=config, phases=(Phase(256, sides),))
    world = World(device=torch.device("meta"))  # a machine that nothing is tried on
    every, half, few = (
        gibibytes(describe_generator(dataclasses.replace(recipe, losses=losses), world, "ddp"))[2]
        for losses in settings
    )
    assert every > 1.5 * half > 1.5 * 1.5 * few


def test_memory_grows_with_what_is_computed_at_once_and_shrinks_where_it_is_shared() -> None:
    """At sizes large enough to be seen in the two digits that are shown."""
    config = transformer_config(width=256, depth=12, heads=4, vocab_size=4096)

    def memory(strategy: Any = "ddp", ranks: int = 1, **changes: Any) -> tuple[float, float, float]:
        recipe = dataclasses.replace(tiny_generator_recipe(batch_size=256, **changes), transformer=config)
        recipe = dataclasses.replace(recipe, phases=(dataclasses.replace(recipe.phases[1], share=1.0),))
        world = World(size=ranks, device=torch.device("meta"))  # a machine that nothing is tried on
        return gibibytes(describe_generator(recipe, world, strategy))

    whole, parts = memory(), memory(micro_batch=64)
    assert whole[0] == pytest.approx(whole[1] + whole[2], abs=0.02)
    assert whole[1] == parts[1] > 0.1
    assert whole[2] == pytest.approx(4 * parts[2], rel=0.1)
    assert memory(bf16=True)[2] == pytest.approx(whole[2] / 2, rel=0.1)
    adamw = memory(optimizer=OptimizerConfig(kind="adamw"))  # the recipe's Muon has one moment less of matrices
    assert whole[1] == pytest.approx(adamw[1] * 4 / 5, rel=0.1)
    assert whole[1] > adamw[1] * 4 / 5
    assert memory(activation_checkpointing=True)[2] < 0.5 * whole[2]
    assert memory(ranks=4, micro_batch=64)[1] == whole[1]
    assert memory("fsdp", ranks=4, micro_batch=64)[1] == pytest.approx(whole[1] / 4, abs=0.01)


def test_saved_bytes_are_those_of_a_real_pass() -> None:
    """Of a network whose kept tensors can be counted by hand: inputs of both layers, and the sign of the ReLU."""
    layers = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    for device in ("cpu", "meta"):
        forward = functools.partial(layers.to(device), torch.empty(7, 10, device=device))
        # the ReLU keeps its output, which is the second layer's input
        assert saved_bytes(layers, forward, bf16=False) == 4 * (7 * 10 + 7 * 20)
        assert saved_bytes(layers, forward, bf16=True) == 2 * (7 * 10 + 7 * 20)


def test_operations_are_counted_without_computing() -> None:
    assert forward_flops(lambda: nn.Linear(30, 50), lambda net: net(torch.empty(7, 30))) == 2 * 7 * 30 * 50


def test_the_peak_is_measured_on_a_cpu_and_unknown_elsewhere() -> None:
    assert 1e8 < peak_flops(World(), bf16=False) < 1e14
    assert peak_flops(World(device=torch.device("meta")), bf16=False) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["generator", "--set", "transformer.depth=1", "--set", "run.batch_size=2"],
        ["tokenizer", "--set", "tokenizer.channels=32", "--set", "run.batch_size=2", "--set", "image_size=256"],
    ],
)
def test_the_command_prints_a_dry_run_and_touches_nothing(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    out = tmp_path / "run"
    call = ["train", *arguments, "--data", str(tmp_path / "none"), "--out", str(out), "--dry-run", "--device", "cpu"]
    assert main(call) == 0
    text = capsys.readouterr().out
    assert "M parameters" in text
    assert gibibytes(text)[0] > 0
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TOKENIZER_RECIPES, *GENERATOR_RECIPES])
def test_every_recipe_can_be_tried_dry(name: str) -> None:
    world = World(device=torch.device("meta"))
    if name in TOKENIZER_RECIPES:
        assert gibibytes(describe_tokenizer(TOKENIZER_RECIPES[name](), world))[0] > 0
    if name in GENERATOR_RECIPES:
        assert gibibytes(describe_generator(GENERATOR_RECIPES[name](), world, "fsdp"))[0] > 0
