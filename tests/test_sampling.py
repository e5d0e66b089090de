"""Guidance and the choice of token ids."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hartist.config import from_dict, to_dict
from hartist.errors import UserError
from hartist.generation.guidance import guidance_strength, guide
from hartist.generation.noise import ImageNoise
from hartist.generation.sampling import SamplingSettings, keep_top_k, keep_top_p, sample_ids, smooth_vectors
from small import normal

ALL = SamplingSettings(top_k=0)
"""The softmax itself."""


def kept(logits: Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero()[:, 0].tolist() for row in logits.flatten(0, -2)]


# --------------------------------------------------------------------- guidance


def test_guidance_grows_with_the_scale() -> None:
    strengths = [guidance_strength(4.5, k, 10, hold_last=False) for k in range(10)]
    assert strengths == pytest.approx([4.5 * k / 9 for k in range(10)])


def test_the_last_scale_can_hold_the_strength_of_the_one_before() -> None:
    strengths = [guidance_strength(4.5, k, 10, hold_last=True) for k in range(10)]
    assert strengths[:9] == pytest.approx([4.5 * k / 9 for k in range(9)])
    assert strengths[9] == strengths[8] == 4.5 * (8 / 9)


@pytest.mark.parametrize("hold_last", [True, False])
def test_a_single_scale_has_full_guidance(hold_last: bool) -> None:
    assert guidance_strength(3.0, 0, 1, hold_last=hold_last) == 3.0


@given(st.floats(0, 10))
def test_guidance_extrapolates_away_from_the_unconditional(t: float) -> None:
    conditional, unconditional = normal(2, 3, 5), normal(2, 3, 5, seed=1)
    wanted = conditional + t * (conditional - unconditional)
    torch.testing.assert_close(guide(conditional, unconditional, t), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(guide(conditional, unconditional, 0.0), conditional)


# --------------------------------------------------------------------- top-k, top-p


@given(st.integers(1, 20), st.integers(0, 1000))
def test_top_k_keeps_the_k_largest(top_k: int, seed: int) -> None:
    logits = normal(2, 3, 16, seed=seed)
    filtered = keep_top_k(logits, top_k)
    for row, ids in zip(logits.flatten(0, 1), kept(filtered), strict=True):
        assert sorted(ids) == sorted(row.topk(min(top_k, 16)).indices.tolist())
    finite = filtered.isfinite()
    assert torch.equal(filtered[finite], logits[finite])


def test_top_k_keeps_ties_with_the_kth_and_zero_keeps_all() -> None:
    logits = torch.tensor([[[3.0, 1.0, 2.0, 2.0, 0.0, 2.0]]])
    assert kept(keep_top_k(logits, 2)) == [[0, 2, 3, 5]]
    assert kept(keep_top_k(logits, 1)) == [[0]]
    assert torch.equal(keep_top_k(logits, 0), logits)


def test_top_p_removes_what_sums_to_at_most_the_rest() -> None:
    logits = torch.tensor([[[0.1, 0.4, 0.2, 0.3]]]).log()
    assert kept(keep_top_p(logits, 0.95)) == [[0, 1, 2, 3]]  # 0.1 > 0.05
    assert kept(keep_top_p(logits, 0.85)) == [[1, 2, 3]]  # 0.1 ≤ 0.15 < 0.1 + 0.2
    assert kept(keep_top_p(logits, 0.65)) == [[1, 3]]
    assert kept(keep_top_p(logits, 0.3)) == [[1]]
    assert torch.equal(keep_top_p(logits, 0.0), logits)


@given(st.floats(0.001, 1), st.integers(0, 1000))
def test_top_p_keeps_at_least_p_and_always_the_likeliest(top_p: float, seed: int) -> None:
    logits = 3 * normal(1, 4, 12, seed=seed)
    filtered = keep_top_p(logits, top_p)
    probabilities = logits.softmax(-1)
    for row, ids in zip(probabilities[0], kept(filtered), strict=True):
        assert int(row.argmax()) in ids
        assert float(row[ids].sum()) >= top_p - 1e-5
        assert min(float(row[i]) for i in ids) >= max((float(row[i]) for i in range(12) if i not in ids), default=0)


def test_the_released_top_k_is_600_and_from_scale_7_on_300() -> None:
    assert [SamplingSettings().top_k_at(k) for k in range(10)] == [600] * 7 + [300] * 3
    assert [SamplingSettings(top_k=50).top_k_at(k) for k in (0, 6, 7, 13)] == [50] * 4
    logits = torch.arange(1000.0).expand(1, 2000, 1000) / 1e6  # almost uniform
    uniform = ((torch.arange(2000.0) + 0.5) / 2000)[None]
    for k, count in ((6, 600), (7, 300)):
        ids = sample_ids(logits, SamplingSettings(), k, uniform)
        assert int(ids.min()) == 1000 - count
        assert len(ids.unique()) == count


# --------------------------------------------------------------------- sampling


def test_evenly_spread_uniform_numbers_give_the_softmax() -> None:
    logits = 2 * normal(1, 1, 8)
    count = 20_000
    uniform = ((torch.arange(count, dtype=torch.float64) + 0.5) / count)[None]
    ids = sample_ids(logits.expand(1, count, 8), ALL, 0, uniform)
    frequencies = ids.flatten().bincount(minlength=8) / count
    torch.testing.assert_close(frequencies, logits[0, 0].softmax(-1), rtol=0, atol=1.5 / count)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_frequencies_pass_a_chi_square_test(temperature: float) -> None:
    logits, count = normal(1, 1, 8, seed=3), 20_000
    chosen = SamplingSettings(top_k=0, temperature=temperature)
    ids = sample_ids(logits.expand(1, count, 8), chosen, 0, ImageNoise([11]).uniform(count))
    expected = count * (logits[0, 0] / temperature).softmax(-1)
    chi_square = ((ids.flatten().bincount(minlength=8) - expected).square() / expected).sum()
    assert chi_square < 24.3  # 7 degrees of freedom, 0.1 %


def test_temperature_zero_is_greedy_and_needs_no_luck() -> None:
    logits = normal(2, 5, 16)
    for uniform in (0.0, 0.5, 0.999999):
        ids = sample_ids(logits, SamplingSettings(temperature=0.0), 0, torch.full((2, 5), uniform))
        assert torch.equal(ids, logits.argmax(-1))


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 16),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.3, 0.999999, 1 - 2**-53, 1.0]),
    st.floats(0.1, 3),
    st.integers(0, 1000),
)
def test_a_removed_code_is_never_chosen(
    top_k: int, top_p: float, uniform: float, temperature: float, seed: int
) -> None:
    logits = 5 * normal(1, 20, 16, seed=seed)
    chosen = SamplingSettings(top_k=top_k, top_p=top_p, temperature=temperature)
    allowed = kept(keep_top_p(keep_top_k(logits / temperature, top_k), top_p))
    ids = sample_ids(logits, chosen, 0, torch.full((1, 20), uniform, dtype=torch.float64))
    for choice, ids_allowed in zip(ids[0].tolist(), allowed, strict=True):
        assert choice in ids_allowed


def test_a_low_uniform_number_takes_the_likeliest_code_and_a_high_one_the_last_kept() -> None:
    logits = torch.tensor([[[0.0, 4.0, 2.0, -1.0, 3.0]]])
    chosen = SamplingSettings(top_k=3)
    assert sample_ids(logits, chosen, 0, torch.tensor([[0.0]])).tolist() == [[1]]
    assert sample_ids(logits, chosen, 0, torch.tensor([[0.999999]])).tolist() == [[2]]


# --------------------------------------------------------------------- smoothing, noise, settings


def test_smoothing_mixes_codes_and_hardens_towards_the_end() -> None:
    logits, codebook = normal(1, 200, 16), normal(16, 4, seed=1)
    gumbel = ImageNoise([0]).gumbel(200, 16)
    soft, hard = (smooth_vectors(logits, fraction, gumbel, codebook) for fraction in (0.0, 1.0))
    assert torch.equal(soft, ((logits + gumbel) / 0.27).softmax(-1) @ codebook)
    torch.testing.assert_close(hard, ((2 * logits + gumbel) / 0.0135).softmax(-1) @ codebook)

    def distance(vectors: Tensor) -> float:
        return float(torch.cdist(vectors[0], codebook).amin(-1).mean())

    assert distance(hard) < 0.3 * distance(soft)


def test_smoothing_noise_samples_the_softmax() -> None:
    logits, count = normal(8), 20_000
    chosen = (logits + ImageNoise([5]).gumbel(count, 8)[0]).argmax(-1)
    expected = count * logits.softmax(-1)
    assert ((chosen.bincount(minlength=8) - expected).square() / expected).sum() < 24.3


def test_noise_of_an_image_depends_on_its_seed_alone() -> None:
    together, alone = ImageNoise([3, 8, 3]), ImageNoise([8])
    uniform = together.uniform(5)
    assert torch.equal(uniform[1:2], alone.uniform(5))
    assert torch.equal(uniform[0], uniform[2])
    assert not torch.equal(uniform[0], uniform[1])
    assert torch.equal(together.gumbel(4, 6)[1:2], alone.gumbel(4, 6))
    assert torch.equal(together.normal(4, 3)[4:8], alone.normal(4, 3))
    assert not torch.equal(alone.normal(4, 3), alone.normal(4, 3))  # every call draws anew


@pytest.mark.parametrize("seed", [-1, 0, 2**63, 2**64 + 5, 10**30])
def test_any_integer_is_a_seed(seed: int) -> None:
    drawn = ImageNoise([seed]).uniform(100)
    assert ((drawn >= 0) & (drawn < 1)).all()


@pytest.mark.parametrize(
    "values",
    [
        {"guidance": -1.0},
        {"guidance": 101.0},
        {"guidance": float("nan")},
        {"top_k": -1},
        {"top_p": 1.5},
        {"temperature": -0.1},
        {"diffusion_steps": 0},
        {"diffusion_steps": 1001},
    ],
)
def test_settings_outside_their_range_are_refused_in_one_line(values: dict) -> None:
    with pytest.raises(UserError) as error:
        SamplingSettings(**values)
    assert "\n" not in str(error.value)
    assert str(next(iter(values.values()))) in str(error.value)


def test_settings_survive_json() -> None:
    chosen = SamplingSettings(guidance=2.0, top_k=7, smoothing=True, diffusion_steps=3)
    assert from_dict(SamplingSettings, to_dict(chosen)) == chosen


@pytest.mark.parametrize(
    "values", [{"residual_guidance": -1.0}, {"residual_temperature": -0.1}, {"residual_temperature": 11.0}]
)
def test_residual_settings_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match="outside"):
        SamplingSettings(**values)  # type: ignore[arg-type]
