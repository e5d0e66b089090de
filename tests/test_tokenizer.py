"""The hybrid tokenizer: which φ serves which scale, and what encoding and training have in common."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hartist.errors import UserError
from hartist.scales import SIDES_256, SIDES_512, SIDES_1024, ScaleSchedule
from hartist.tokenizer.checkpoint import load_tokenizer, save_tokenizer
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.tokenizer.quantizer import Quantizer
from hartist.tokenizer.residual_loop import (
    area_downsample,
    map_to_tokens,
    nearest_codes,
    phi_index,
    tokens_to_map,
)
from small import RECTANGLES, SIDES, normal, random_quantizer, random_tokenizer, tokenizer_config

PHI_TABLES = {
    (5, 4): "01223",
    (10, 4): "0011122333",
    (14, 4): "00011112222333",
    (10, 1): "0" * 10,
    (10, 10): "0123456789",
    (1, 4): "0",
}


@st.composite
def grids(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Up to five grids, square or not, the last one the largest."""
    h, w = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    coarse = draw(st.lists(st.tuples(st.integers(1, h), st.integers(1, w)), max_size=4))
    return [*sorted(coarse), (h, w)]


def assert_close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# --------------------------------------------------------------------- schedule


def test_published_schedules_have_the_published_token_counts() -> None:
    counts = [ScaleSchedule.from_sides(sides).num_tokens for sides in (SIDES_256, SIDES_512, SIDES_1024)]
    assert counts == [680, 2240, 9451]


@pytest.mark.parametrize("sides", [[], [0, 2], [4, 2], [(1, 3), (2, 2)], [1, (2, 2, 2)]])
def test_impossible_schedules_are_refused(sides: list) -> None:
    with pytest.raises(UserError, match="schedule"):
        ScaleSchedule.from_sides(sides)


@given(grids())
def test_fractions_run_from_zero_to_one(sides: list[tuple[int, int]]) -> None:
    schedule = ScaleSchedule.from_sides(sides)
    fractions = [schedule.fraction(k) for k in range(len(schedule))]
    assert fractions[0] == 0
    assert fractions == sorted(fractions)
    assert fractions[-1] == (1 if len(schedule) > 1 else 0)
    assert [schedule.is_last(k) for k in range(len(schedule))] == [False] * (len(schedule) - 1) + [True]


# --------------------------------------------------------------------- φ


@pytest.mark.parametrize(("scales", "count"), PHI_TABLES)
def test_phi_index_follows_the_published_tables(scales: int, count: int) -> None:
    table = "".join(str(phi_index(k, scales, count)) for k in range(scales))
    assert table == PHI_TABLES[scales, count]


@given(st.integers(1, 20), st.integers(1, 20))
def test_phi_index_is_valid_and_never_goes_back(scales: int, count: int) -> None:
    indices = [phi_index(k, scales, count) for k in range(scales)]
    assert indices == sorted(indices)
    assert all(0 <= i < count for i in indices)


@pytest.mark.parametrize(
    ("changes", "count"),
    [({"phi_sharing": 4}, 4), ({"phi_sharing": 1}, 1), ({"phi_sharing": 0}, 4), ({"phi_sharing": 2}, 2)],
)
def test_each_scale_uses_its_own_phi_and_no_other(changes: dict, count: int) -> None:
    quantizer = random_quantizer(sides=SIDES, **changes)
    assert len(quantizer.phi) == count
    phi, x = quantizer.phi_function, normal(2, 4, 4, 4)
    for k in range(len(SIDES)):
        conv = quantizer.phi[phi_index(k, len(SIDES), count)]
        assert_close(phi(x, k, quantizer.schedule), 0.5 * x + 0.5 * conv(x))


def test_a_negative_ratio_counts_as_positive_and_zero_is_the_identity() -> None:
    x, schedule = normal(1, 4, 4, 4), tokenizer_config().schedule
    identity = random_quantizer(phi_ratio=0.0)
    assert len(identity.phi) == 0
    assert torch.equal(identity.phi_function(x, 1, schedule), x)
    positive, negative = random_quantizer(phi_ratio=0.3), random_quantizer(phi_ratio=-0.3)
    assert torch.equal(positive.phi_function(x, 1, schedule), negative.phi_function(x, 1, schedule))
    assert not torch.allclose(positive.phi_function(x, 1, schedule), x)


@torch.no_grad()
def test_phi_gives_an_image_the_same_bits_alone_and_in_a_batch() -> None:
    quantizer, x = random_quantizer(), normal(5, 4, 4, 4)
    together = quantizer.phi_function(x, 2, quantizer.schedule)
    for i in range(5):
        assert torch.equal(quantizer.phi_function(x[i : i + 1], 2, quantizer.schedule)[0], together[i])


# --------------------------------------------------------------------- codes, maps


@given(st.integers(0, 1000), st.integers(1, 30))
def test_nearest_codes_agrees_with_brute_force(seed: int, codes: int) -> None:
    codebook, z = normal(codes, 3, seed=seed), normal(2, 6, 3, seed=seed + 1)
    chosen = nearest_codes(z, codebook)
    distance = (z[:, :, None].double() - codebook.double()).square().sum(-1)
    taken = distance.gather(-1, chosen[..., None])[..., 0]
    assert_close(taken, distance.amin(-1))


def test_the_first_of_equally_near_codes_is_taken() -> None:
    codebook = torch.tensor([[4.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert nearest_codes(torch.tensor([[[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]]), codebook).tolist() == [[1, 1, 2]]


def test_maps_and_tokens_are_each_others_inverse_in_row_order() -> None:
    x = normal(2, 4, 2, 3)
    tokens = map_to_tokens(x)
    assert torch.equal(tokens[:, 4], x[:, :, 1, 1])
    assert torch.equal(tokens_to_map(tokens, (2, 3)), x)


def test_area_downsampling_averages_overlapping_windows() -> None:
    x = torch.arange(4.0).expand(1, 1, 4, 4)
    assert_close(area_downsample(x, (2, 2))[0, 0], torch.tensor([[0.5, 2.5]] * 2))
    # 4 → 3: windows of two columns that share one, not exact area weights
    assert_close(area_downsample(x, (3, 3))[0, 0], torch.tensor([[0.5, 1.5, 2.5]] * 3))
    assert area_downsample(x, (4, 4)) is x


# --------------------------------------------------------------------- quantizer


@settings(max_examples=40, deadline=None)
@given(grids(), st.sampled_from([0, 1, 2, 4]), st.integers(0, 1000))
def test_hybrid_tokens_give_the_latent_back(sides: list[tuple[int, int]], sharing: int, seed: int) -> None:
    quantizer = random_quantizer(sides=tuple(sides), phi_sharing=sharing)
    schedule = quantizer.schedule
    f = normal(2, 4, *schedule.finest, seed=seed)
    tokens = quantizer.encode(f)
    assert tuple(ids.shape[1] for ids in tokens.ids) == schedule.lengths
    assert_close(quantizer.dequantize_hybrid(tokens), f)
    assert_close(quantizer.lookup(tokens.ids[-1]) + tokens.residual_BlC, tokens.last_scale_BlC)


@settings(max_examples=20, deadline=None)
@given(grids(), st.integers(0, 1000))
def test_discrete_path_is_the_training_pass(sides: list[tuple[int, int]], seed: int) -> None:
    quantizer = random_quantizer(sides=tuple(sides))
    f = normal(2, 4, *quantizer.schedule.finest, seed=seed)
    trained = quantizer.training_pass(f, add_residual=False)
    # the last scale's target is the same with or without φ there, so encode finds the same ids
    assert_close(quantizer.dequantize_discrete(quantizer.encode(f).ids), trained.f_hat_BChw)
    assert_close(quantizer.training_pass(f, add_residual=True).f_hat_BChw, f)


@pytest.mark.parametrize("sides", [SIDES, RECTANGLES, (4,)])
def test_teacher_forcing_gives_the_inputs_that_encoding_met(sides: tuple) -> None:
    quantizer = random_quantizer(sides=sides)
    f = normal(2, 4, *quantizer.schedule.finest)
    tokens = quantizer.encode(f)
    inputs = quantizer.teacher_forcing_input(tokens.ids)
    wanted = [
        map_to_tokens(area_downsample(step.f_hat_BChw, quantizer.schedule.grids[step.k + 1]))
        for step in quantizer.steps_from_ids(tokens.ids, phi_at_last_scale=False)
        if step.k + 1 < len(sides)
    ]
    assert inputs.shape == (2, sum(quantizer.schedule.lengths[1:]), 4)
    if wanted:
        assert torch.equal(inputs, torch.cat(wanted, 1))


def test_the_residual_before_the_last_scale_is_what_the_scales_before_left_over() -> None:
    quantizer = random_quantizer()
    f = normal(2, 4, 4, 4)
    tokens = quantizer.encode(f)
    *_, before = quantizer.steps_from_ids(tokens.ids[:-1])
    assert_close(tokens_to_map(tokens.last_scale_BlC, (4, 4)), f - before.f_hat_BChw)


def test_steps_from_ids_stops_with_the_ids_it_was_given() -> None:
    quantizer = random_quantizer()
    tokens = quantizer.encode(normal(1, 4, 4, 4))
    steps = list(quantizer.steps_from_ids(tokens.ids[:2]))
    assert [step.k for step in steps] == [0, 1]
    assert_close(steps[0].f_hat_BChw + steps[1].update_BChw, steps[1].f_hat_BChw)


@pytest.mark.parametrize("add_residual", [False, True])
def test_the_straight_through_gradient_reaches_f_unchanged(add_residual: bool) -> None:
    quantizer = Quantizer(tokenizer_config())
    f = normal(2, 4, 4, 4).requires_grad_()
    weight = normal(2, 4, 4, 4, seed=1)
    output = quantizer.training_pass(f, add_residual=add_residual)
    (output.f_hat_BChw * weight).sum().backward()
    assert f.grad is not None
    assert_close(f.grad, weight, 1e-6)
    assert quantizer.codebook.grad is None
    assert all(p.grad is None for p in quantizer.phi.parameters())


def test_the_quantizer_loss_moves_codes_and_phi_and_commits_the_encoder() -> None:
    quantizer = random_quantizer().requires_grad_()
    f = normal(2, 4, 4, 4).requires_grad_()
    output = quantizer.training_pass(f, add_residual=False)
    output.loss.backward()
    assert f.grad is not None
    assert f.grad.abs().sum() > 0
    hit = output.hits_KV.sum(0) > 0
    assert quantizer.codebook.grad is not None
    assert (quantizer.codebook.grad.abs().sum(1) > 0).tolist() == hit.tolist()
    assert all(conv.weight.grad.abs().sum() > 0 for conv in quantizer.phi)


def test_the_quantizer_loss_is_the_mean_over_scales_of_both_terms() -> None:
    quantizer = random_quantizer(beta=0.4)
    f = normal(2, 4, 4, 4)
    output = quantizer.training_pass(f, add_residual=True)
    errors = [(s.f_hat_BChw - f).square().mean() for s in quantizer.steps_from_ids(quantizer.encode(f).ids)]
    assert_close(output.loss, 1.4 * torch.stack(errors).mean(), 1e-5)


def test_usage_counts_codes_hit_on_any_scale() -> None:
    quantizer = random_quantizer()
    f = normal(3, 4, 4, 4)
    output = quantizer.training_pass(f, add_residual=False)
    ids = quantizer.encode(f).ids
    assert output.usage == pytest.approx(len(torch.cat([i.flatten() for i in ids]).unique()) / 32)
    assert output.usage_per_scale == pytest.approx([len(i.unique()) / 32 for i in ids])
    assert output.hits_KV.sum(1).tolist() == [i.numel() for i in ids]


def test_another_schedule_than_the_configs_can_be_encoded() -> None:
    tokenizer = random_tokenizer()
    other = ScaleSchedule.from_sides((1, 3, 6))
    image = normal(1, 3, 48, 48).clamp(-1, 1)
    tokens = tokenizer.encode(image, other)
    assert tuple(ids.shape[1] for ids in tokens.ids) == (1, 9, 36)
    assert tokens.schedule == other
    assert_close(tokenizer.quantizer.dequantize_hybrid(tokens), tokenizer.encode_latent(image))
    assert tokenizer.decode(tokens).shape == image.shape
    assert tokenizer.decode_discrete(tokens.ids, other).shape == image.shape
    assert tokenizer.quantizer.teacher_forcing_input(tokens.ids, other).shape == (1, 45, 4)


# --------------------------------------------------------------------- autoencoder


@pytest.mark.parametrize(
    ("stem", "multipliers", "kernel"), [(1, (1, 2), 3), (2, (1, 1, 1), 1), (4, (2,), 3), (1, (1, 1, 2), 3)]
)
def test_an_image_becomes_a_latent_and_an_image_again(stem: int, multipliers: tuple, kernel: int) -> None:
    config = tokenizer_config(stem=stem, channel_multipliers=multipliers, quant_conv_kernel=kernel)
    tokenizer = HybridTokenizer(config).eval().requires_grad_(False)
    assert config.downsampling == stem * 2 ** (len(multipliers) - 1)
    h, w = 3, 4
    image = normal(2, 3, h * config.downsampling, w * config.downsampling).clamp(-1, 1)
    latent = tokenizer.encode_latent(image)
    assert latent.shape == (2, 4, h, w)
    decoded = tokenizer.decode_latent(latent)
    assert decoded.shape == image.shape
    assert decoded.abs().max() <= 1


def test_decoded_images_are_clamped() -> None:
    tokenizer = random_tokenizer()
    assert tokenizer.decode_latent(1000 * normal(1, 4, 4, 4)).abs().max() == 1


def test_a_saved_tokenizer_is_the_same_tokenizer(tmp_path) -> None:
    tokenizer = random_tokenizer(sides=RECTANGLES)
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path / "tokenizer")
    assert loaded.config == tokenizer.config
    image = normal(1, 3, 24, 40).clamp(-1, 1)
    assert torch.equal(loaded.encode_latent(image), tokenizer.encode_latent(image))
    save_tokenizer(tokenizer, tmp_path / "half", torch.bfloat16)
    assert_close(load_tokenizer(tmp_path / "half").quantizer.codebook, tokenizer.quantizer.codebook, 0.01)
