"""The generator stage: losses on the tokens, residual targets, conditions, phases and classes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hartist.config import ResidualConfig
from hartist.data.records import Skipped
from hartist.data.stream import Sample
from hartist.errors import UserError
from hartist.generation.checkpoint import LoadedModel, load_transformer
from hartist.residual.loss import diffusion_loss
from hartist.scales import ScaleSchedule
from hartist.text.encoder import TextContext, TextEncoder, unconditional_context
from hartist.tokenizer.residual_loop import nearest_codes
from hartist.training.batches import MicroBatch
from hartist.training.config import GeneratorLossConfig, OptimizerConfig, RunConfig
from hartist.training.generator_cost import step_flops
from hartist.training.generator_stage import GeneratorStage, TrainingPhase, drop_condition, residual_scale
from hartist.training.loop import Stage, StepLoss, train
from hartist.training.subsampling import drop_ratio, kept_count, kept_positions
from hartist.training.token_cache import build_token_cache, cache_parts
from hartist.training.token_filling import fill_token_cache
from hartist.training.token_shards import TokenCache, open_token_cache
from hartist.transformer.model import Condition, ScaleTransformer, TeacherForced
from runs import assert_same_state, log_rows, loss_curve, state_tensors, stop_after
from small import (
    SIDES,
    TOKENS,
    VAR,
    WordEncoder,
    image_set,
    make_generator_stage,
    pictures,
    random_context,
    random_tokenizer,
    randomise,
    run_config,
    transformer_config,
)

ONE_CAPTION = [0, 3, 6]
"""Images with a single caption: nothing is drawn for them."""


def whole(step: int, size: int = 4) -> MicroBatch:
    return MicroBatch(step, 0, 1, size, seed=0)


def loss_of(stage: GeneratorStage, rows: list[int], **options: Any) -> StepLoss:
    """The loss of some images of the first phase, on all scales unless `options` say otherwise."""
    phase = stage.phases[0]
    batch = phase.cache.rows(torch.tensor(rows))
    return stage.batch_loss(stage.transformer, batch, **({"scales": phase.scales} | options))


# --------------------------------------------------------------------- subsampling, condition dropout


def test_drop_ratios_follow_the_truncated_normal() -> None:
    generator = torch.Generator().manual_seed(0)
    ratios = torch.tensor([drop_ratio(generator) for _ in range(4000)])
    assert ratios.min() >= 0.5
    assert ratios.max() <= 1
    # E|z| over the half normal cut at two deviations
    phi0, phi2 = (math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) for z in (0, 2))
    mean = 1 - 0.25 * (phi0 - phi2) / (0.5 * math.erf(2 / math.sqrt(2)))
    assert mean == pytest.approx(0.82, abs=0.005)
    assert float(ratios.mean()) == pytest.approx(mean, abs=0.01)


@given(st.integers(1, 5000), st.floats(0.5, 1))
def test_kept_cells_follow_the_formula(tokens: int, ratio: float) -> None:
    count = kept_count(tokens, ratio)
    if tokens >= 32:
        assert count == tokens - min(math.ceil(tokens * ratio), tokens - 32)
        assert 32 <= count <= max(32, tokens // 2)
    else:
        assert count == tokens


def test_kept_positions_are_distinct_sorted_and_uniform() -> None:
    kept = kept_positions(2000, 10, 4, torch.Generator().manual_seed(0))
    assert kept.shape == (2000, 4)
    assert (kept.diff(dim=1) > 0).all()
    shares = kept.flatten().bincount(minlength=10) / 2000
    torch.testing.assert_close(shares, torch.full((10,), 0.4), rtol=0, atol=0.05)


def test_dropped_conditions_are_the_unconditional_context_at_the_given_rate() -> None:
    context = random_context(2000)
    torch.manual_seed(0)
    dropped = drop_condition(context, 0.1)
    empty = unconditional_context(context)

    def rows_equal(a: TextContext, b: TextContext) -> Tensor:
        same = (a.states_BSC == b.states_BSC).flatten(1).all(1)
        return same & (a.mask_BS == b.mask_BS).all(1) & (a.position_ids_BS == b.position_ids_BS).all(1)

    gone, kept = rows_equal(dropped, empty), rows_equal(dropped, context)
    assert (gone ^ kept).all()
    assert float(gone.float().mean()) == pytest.approx(0.1, abs=0.03)
    assert rows_equal(drop_condition(context, 0.0), context).all()
    assert rows_equal(drop_condition(context, 1.0), empty).all()


def test_the_residual_scale_holds_nearly_all_targets(tmp_path: Path) -> None:
    tokenizer = random_tokenizer()
    cache = build_token_cache(tmp_path / "cache", image_set(7), tokenizer, WordEncoder(), progress=False)
    scale = residual_scale(cache, tokenizer.quantizer, 16)
    ids = nearest_codes(cache.last_scale_NmC, tokenizer.quantizer.codebook)
    residual = (cache.last_scale_NmC - tokenizer.quantizer.lookup(ids)) / scale
    assert 0.7 < float(residual.abs().quantile(0.999)) < 0.9


# --------------------------------------------------------------------- losses


def test_training_a_generator_reduces_its_loss(tmp_path: Path) -> None:
    run = run_config(30, batch_size=10, optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=2, ema_decay=0.9))
    stage = make_generator_stage(run, tmp_path)
    assert isinstance(stage, Stage)
    train(stage, run, tmp_path / "run", progress=False)
    rows = [row for row in log_rows(tmp_path / "run") if "loss" in row]
    assert rows[0]["cross_entropy"] == pytest.approx(math.log(32), rel=0.05)  # the head starts uniform
    last = [sum(row[key] for row in rows[-5:]) / 5 for key in ("cross_entropy", "residual")]
    assert last[0] < 0.8 * rows[0]["cross_entropy"]
    assert last[1] < rows[0]["residual"]
    figures = log_rows(tmp_path / "run")[-1]
    assert math.isfinite(figures["validation_cross_entropy"])
    exported = load_transformer(tmp_path / "run" / "model" / "transformer")
    average = state_tensors(tmp_path / "run")["average.transformer.head.linear.weight"]
    torch.testing.assert_close(exported.head.linear.weight, average, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_the_generators_loss_is_the_cross_entropy_of_a_plain_pass(tmp_path: Path, dropout: float) -> None:
    """Without subsampling and residual tokens nothing is random but the caption and whether it is dropped."""
    losses = GeneratorLossConfig(condition_dropout=0.0, subsample_last_scale=False, residual=0.0)
    stage = make_generator_stage(run_config(1), tmp_path, losses)
    randomise(stage.transformer)  # freshly initialised, it hardly heeds its condition
    result = loss_of(stage, ONE_CAPTION, dropout=dropout)
    transformer, quantizer = stage.transformer, stage.tokenizer.quantizer
    batch = stage.phases[0].cache.rows(torch.tensor(ONE_CAPTION))
    ids = batch.ids_NL.long().split(transformer.schedule.lengths, 1)
    context = batch.context(batch.first_caption_N)
    condition = transformer.prepare(unconditional_context(context) if dropout else context)
    hidden = transformer.forward_all(quantizer.teacher_forcing_input(ids), condition).hidden_BTD
    chances = transformer.logits(hidden, condition).log_softmax(-1)
    wanted = -chances.gather(-1, torch.cat(ids, 1)[..., None]).mean()
    torch.testing.assert_close(result.loss, wanted)
    assert "residual" not in result.logs
    shares = [n / transformer.schedule.num_tokens for n in transformer.schedule.lengths]
    parts = [result.logs[f"cross_entropy_{k}"] for k in range(len(shares))]
    assert sum(s * p for s, p in zip(shares, parts, strict=True)) == pytest.approx(
        result.logs["cross_entropy"], rel=1e-5
    )


def test_the_residual_target_is_what_the_sampled_code_leaves_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the MLP is told which code that was; the codes are the transformer's own choice, not the right ones."""
    losses = GeneratorLossConfig(subsample_last_scale=False, diffusion_repeats=3)
    scale = 0.25
    residual = ResidualConfig(width=32, depth=1, target_scale=scale)
    stage = make_generator_stage(run_config(1), tmp_path, losses, residual=residual)
    conditions, targets = [], []
    plain = stage.transformer.residual_condition

    def residual_condition(hidden_BlD: Tensor, code_BlC: Tensor) -> Tensor:
        conditions.append(code_BlC)
        return plain(hidden_BlD, code_BlC)

    def loss(model: Any, x0_NC: Tensor, t_N: Tensor, noise_NC: Tensor, schedule: Any) -> Any:
        targets.append(x0_NC)
        assert len(t_N.unique()) > 10  # every row has a time of its own
        return diffusion_loss(model, x0_NC, t_N, noise_NC, schedule)

    stage.transformer.residual_condition = residual_condition  # type: ignore[method-assign]
    monkeypatch.setattr("hartist.training.generator_stage.diffusion_loss", loss)
    torch.manual_seed(0)
    loss_of(stage, list(range(10)))
    (codes_BmC,), (x0_NC,) = conditions, targets
    batch = stage.phases[0].cache.rows(torch.arange(10))
    wanted = (batch.last_scale_NmC - codes_BmC).flatten(0, 1).repeat(3, 1)
    torch.testing.assert_close(scale * x0_NC, wanted, rtol=0, atol=1e-5)
    codebook = stage.tokenizer.quantizer.codebook
    chosen = torch.cdist(codes_BmC.flatten(0, 1), codebook)
    assert chosen.amin(1).max() < 1e-3
    right = batch.ids_NL[:, -16:].flatten()
    assert 0.5 < float((chosen.argmin(1) != right).float().mean()) < 1  # an untrained one is mostly wrong


def test_scale_weights_can_make_every_scale_count_alike(tmp_path: Path) -> None:
    losses = GeneratorLossConfig(residual=0.0, scale_weight_power=1.0)
    stage = make_generator_stage(run_config(1), tmp_path, losses)
    logs = loss_of(stage, [0, 1, 2], dropout=0.1).logs
    parts = [logs[f"cross_entropy_{k}"] for k in range(len(stage.transformer.schedule))]
    assert logs["loss"] == pytest.approx(sum(parts) / len(parts), rel=1e-5)


def test_the_residual_weight_reaches_the_loss(tmp_path: Path) -> None:
    stage = make_generator_stage(run_config(1), tmp_path)
    for weight in (1.0, 3.0):
        stage.losses = dataclasses.replace(stage.losses, residual=weight)
        logs = loss_of(stage, [0, 1], dropout=0.1).logs
        assert logs["loss"] == pytest.approx(logs["cross_entropy"] + weight * logs["residual"], rel=1e-5)


def test_a_coarse_step_is_the_loss_of_the_first_scales_alone(tmp_path: Path) -> None:
    losses = GeneratorLossConfig(subsample_last_scale=False, residual=0.0, coarse_share=1.0, coarse_until=0.5)
    stage = make_generator_stage(run_config(4), tmp_path, losses)
    randomise(stage.transformer)
    coarse = loss_of(stage, ONE_CAPTION, scales=2)
    full = loss_of(stage, ONE_CAPTION)
    assert coarse.logs.keys() == {"coarse_loss", "cross_entropy_0", "cross_entropy_1"}
    for k in range(2):
        assert coarse.logs[f"cross_entropy_{k}"] == pytest.approx(full.logs[f"cross_entropy_{k}"], rel=1e-5)
    first, second = (coarse.logs[f"cross_entropy_{k}"] for k in range(2))
    assert coarse.loss.item() == pytest.approx((first + 4 * second) / 5, rel=1e-5)  # 1 and 4 tokens
    assert ["coarse_loss" in stage.loss(whole(step)).logs for step in range(4)] == [True, True, False, False]
    assert stage.flops(0) < 0.5 * stage.flops(3)


def test_training_sees_a_part_of_a_large_last_scale(tmp_path: Path) -> None:
    """At 64 px the last scale has 64 cells, of which 32 are kept however many the draw would drop."""
    sides, images, encoder = (1, 3, 8), image_set(4), WordEncoder()
    images = dataclasses.replace(images, pixels=pictures(4, side=64))
    tokenizer = random_tokenizer(sides=sides)
    cache = build_token_cache(tmp_path / "cache", images, tokenizer, encoder, progress=False)
    transformer = ScaleTransformer(transformer_config(sides=sides))
    transformer.initialise()
    phase = TrainingPhase(0, 4, ScaleSchedule.from_sides(sides), 3, cache)
    model = LoadedModel(tokenizer, transformer, encoder, "tiny")
    seen: list[Tensor | None] = []
    plain = transformer.forward_all

    def forward_all(input_BLC: Tensor, condition: Condition, kept_Bm: Tensor | None = None) -> TeacherForced:
        seen.append(kept_Bm)
        return plain(input_BLC, condition, kept_Bm)

    transformer.forward_all = forward_all  # type: ignore[method-assign]

    def kept(losses: GeneratorLossConfig) -> Tensor | None:
        stage = GeneratorStage(losses, run_config(1), [phase], model, "data")
        assert math.isfinite(stage.loss(whole(0)).logs["loss"])
        return seen[-1]

    published = kept(GeneratorLossConfig())
    assert published is not None
    assert published.shape == (4, 32)
    assert not torch.equal(published[0], published[1])  # other cells in every image
    fixed = kept(GeneratorLossConfig(drop_share=0.25))
    assert fixed is not None
    assert fixed.shape == (4, 48)
    assert kept(GeneratorLossConfig(subsample_last_scale=False)) is None


def test_the_tokenizer_is_frozen_while_the_generator_trains(tmp_path: Path) -> None:
    run = run_config(2)
    stage = make_generator_stage(run, tmp_path)
    before = {name: tensor.clone() for name, tensor in stage.tokenizer.state_dict().items()}
    train(stage, run, tmp_path / "run", progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stage.tokenizer.state_dict().items())
    assert not any("tokenizer" in name for name in state_tensors(tmp_path / "run"))


def test_the_word_encoder_counts_what_it_cuts() -> None:
    assert isinstance(WordEncoder(), TextEncoder)
    assert WordEncoder().count_truncated_tokens(["a", "a b c d e f"]) == [0, 7 - TOKENS]


def test_recomputed_activations_give_the_same_gradients(tmp_path: Path) -> None:
    gradients = []
    for recompute in (False, True):
        run = run_config(1, activation_checkpointing=recompute)
        stage = make_generator_stage(run, tmp_path)
        randomise(stage.transformer).requires_grad_(True)
        micro = whole(0)
        micro.seed_global_generator()
        loss = stage.loss(micro).loss
        gradients.append([loss, *torch.autograd.grad(loss, list(stage.transformer.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("changes", [{}, VAR], ids=["text", "class"])
def test_the_operations_of_a_step_are_those_of_real_passes(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Forward and backward, with all cells kept. The fused attention of CPUs is none of those counted."""
    losses = GeneratorLossConfig(drop_share=0.0)
    run = run_config(1)
    stage = make_class_stage(run, tmp_path, losses) if changes else make_generator_stage(run, tmp_path, losses)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stage.loss(whole(0)).loss.backward()
    # beside them: teacher forcing's φ, no gradient for the first layer's input, and what is added, not multiplied
    assert stage.flops(0) == pytest.approx(counter.get_total_flops(), rel=0.1)
    per_image = step_flops(stage.transformer.config, stage.phases[0].schedule, losses)
    assert stage.flops(0) == 4 * per_image


# --------------------------------------------------------------------- phases


def test_weights_are_carried_from_one_resolution_to_the_next(tmp_path: Path) -> None:
    """Half the size for two steps. What the run has learnt, its moments and its averages, goes on."""
    run = run_config(4)
    stage = make_generator_stage(run, tmp_path, coarse_first=True)
    seen: list[tuple[int, ...]] = []
    plain = stage.batch_loss

    def batch_loss(transformer: ScaleTransformer, *arguments: Any, **options: Any) -> StepLoss:
        seen.append(transformer.schedule.lengths)
        return plain(transformer, *arguments, **options)

    stage.batch_loss = batch_loss  # type: ignore[method-assign]
    train(stage, run, tmp_path / "run", progress=False)
    assert seen[:4] == [(1, 4)] * 2 + [(1, 4, 9, 16)] * 2
    steps = {int(t) for n, t in state_tensors(tmp_path / "run").items() if n.endswith(".step")}
    assert steps == {4}
    assert stage.flops(0) < 0.5 * stage.flops(2)
    exported = load_transformer(tmp_path / "run" / "model" / "transformer")
    assert exported.config.sides == SIDES


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_run_that_stops_at_the_border_of_two_phases_ends_up_the_same(tmp_path: Path, stop: int) -> None:
    run = run_config(4)
    for name, stops in (("whole", (None,)), ("parts", (stop, None))):
        for last in stops:
            stage = make_generator_stage(run, tmp_path, coarse_first=True)
            if last is not None:
                stop_after(stage, last)
            train(stage, run, tmp_path / name, progress=False)
    assert_same_state(tmp_path / "whole", tmp_path / "parts")
    assert loss_curve(tmp_path / "whole") == loss_curve(tmp_path / "parts")


def test_phases_have_batches_of_their_own_size_and_may_see_the_first_scales_only(tmp_path: Path) -> None:
    run = run_config(4, picture_every=2, batch_size=2, micro_batch=2)
    stage = make_generator_stage(run, tmp_path, GeneratorLossConfig(condition_dropout=0.0))
    (phase,) = stage.phases
    stage.phases = [dataclasses.replace(phase, scales=2, batch_size=6), dataclasses.replace(phase, first_step=2)]
    sizes: list[int] = []
    plain = stage.batch_loss

    def batch_loss(transformer: ScaleTransformer, batch: TokenCache, **options: Any) -> StepLoss:
        sizes.append(len(batch))
        return plain(transformer, batch, **options)

    stage.batch_loss = batch_loss  # type: ignore[method-assign]
    train(stage, run, tmp_path / "run", progress=False)
    assert [size for size in sizes if size != 3] == [2] * (3 + 3 + 1 + 1)  # three are held out
    assert [stage.batch_at(step) for step in range(4)] == [(6, 0), (6, 0), (2, 2), (2, 2)]
    rows = log_rows(tmp_path / "run")
    assert ["coarse_loss" in row for row in rows if "rate" in row] == [True, True, False, False]
    assert "validation_coarse_loss" in rows[2]
    assert "validation_loss" in rows[-1]
    for step in (2, 4):
        assert (tmp_path / "run" / "pictures" / f"samples_000000{step}.png").exists()
    grids = [[1, 1], [2, 2], [3, 3], [4, 4]]
    assert stage.identity["phases"] == [[0, 6, 2, grids], [2, 2, 4, grids]]


def test_held_out_images_may_be_missing(tmp_path: Path) -> None:
    stage = make_generator_stage(run_config(1), tmp_path)
    stage.phases = [dataclasses.replace(stage.phases[0], validation=None)]
    with torch.no_grad():
        assert stage.pictures({"transformer": stage.transformer}, tmp_path / "pictures", 1) == {}
    assert (tmp_path / "pictures" / "samples_0000001.png").exists()


# --------------------------------------------------------------------- classes


class Labelled:
    """Images with class numbers and no captions, as a stream."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels, self.skipped = pixels, Skipped()

    def __iter__(self) -> Iterator[Sample]:
        for i, image in enumerate(self.pixels):
            yield Sample(image.numpy(), (), str(i), i)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("nothing to resume")


def make_class_stage(run: RunConfig, folder: Path, losses: GeneratorLossConfig | None = None) -> GeneratorStage:
    """A class-conditional transformer in VAR's form over four pictures, one of each class; seven are possible."""
    tokenizer = random_tokenizer(seed=5)
    parts = cache_parts(tokenizer, None, 32)
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], dtype=torch.uint8)
    images = pictures(4) // 4 + colours[:, None, None] // 4 * 3
    fill_token_cache(folder / "classes", Labelled(images), tokenizer, None, parts, progress=False)
    cache = open_token_cache(folder / "classes", parts)
    torch.manual_seed(run.seed)
    transformer = ScaleTransformer(transformer_config(**VAR))
    transformer.initialise()
    phase = TrainingPhase(0, run.batch_size, tokenizer.schedule, len(SIDES), cache, cache)
    model = LoadedModel(tokenizer, transformer, None, "classes")
    return GeneratorStage(losses or GeneratorLossConfig(), run, [phase], model, "classes")


def test_a_class_conditional_generator_learns_its_few_pictures_by_heart(tmp_path: Path) -> None:
    run = run_config(120, optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5, ema_decay=0.5), log_every=120)
    losses = GeneratorLossConfig(subsample_last_scale=False)
    stage = make_class_stage(run, tmp_path, losses)
    train(stage, run, tmp_path / "run", progress=False)
    figures = log_rows(tmp_path / "run")[-1]
    assert figures["validation_cross_entropy"] < 0.1
    assert (tmp_path / "run" / "pictures" / "samples_0000120.png").exists()
    shipped = load_transformer(tmp_path / "run" / "model" / "transformer")
    batch = stage.phases[0].cache.rows(torch.arange(4))
    assert batch.label_N is not None
    ids = batch.ids_NL.long().split(shipped.schedule.lengths, 1)
    inputs = stage.quantizer.teacher_forcing_input(ids)

    def right(labels: Tensor) -> float:
        """How many of the codes of scale 1, which depend on the class alone, are the likeliest."""
        condition = shipped.prepare(labels)
        hidden = shipped.forward_all(inputs, condition).hidden_BTD
        return float((shipped.logits(hidden, condition).argmax(-1)[:, :1] == ids[0]).float().mean())

    with torch.no_grad():
        assert right(batch.label_N) == 1
        assert len(ids[0].unique()) > 1
        assert right(batch.label_N.roll(1)) < 1


def test_classes_are_dropped_to_the_unconditional_one(tmp_path: Path) -> None:
    stage = make_class_stage(run_config(1), tmp_path)
    batch = stage.phases[0].cache.rows(torch.arange(4).repeat(500))
    assert batch.label_N is not None
    torch.manual_seed(0)
    labels = stage.condition(batch, 0.1)
    assert isinstance(labels, Tensor)
    dropped = labels == 7
    assert float(dropped.float().mean()) == pytest.approx(0.1, abs=0.03)
    assert torch.equal(labels[~dropped], batch.label_N[~dropped])
    assert torch.equal(stage.condition(batch, 0.0), batch.label_N)  # type: ignore[arg-type]
    assert (stage.condition(batch, 1.0) == 7).all()  # type: ignore[union-attr]


def test_classes_that_the_data_does_not_have_are_missed_in_one_line(tmp_path: Path) -> None:
    stage = make_class_stage(run_config(1), tmp_path)
    cache = stage.phases[0].cache
    assert isinstance(cache, TokenCache)
    stage.phases = [dataclasses.replace(stage.phases[0], cache=dataclasses.replace(cache, label_N=None))]
    with pytest.raises(UserError, match="class-conditional generator needs the images' classes"):
        stage.loss(whole(0))
