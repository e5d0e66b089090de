"""Residual diffusion: the noise schedule, its algebra, the loss and the sampler."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hartist.config import ResidualConfig
from hartist.residual.denoise import denoise
from hartist.residual.loss import (
    add_noise,
    diffusion_loss,
    discretised_gaussian_nll,
    model_log_variance,
    normal_kl,
    posterior_mean,
    predict_x0,
)
from hartist.residual.mlp import ResidualMLP
from hartist.residual.schedule import NoiseSchedule, constants, respaced_schedule, training_schedule
from small import normal, randomise

C, D = 4, 8


def all_steps(schedule: NoiseSchedule) -> Tensor:
    return torch.arange(len(schedule))


# --------------------------------------------------------------------- schedule


def test_the_training_schedule_is_the_capped_cosine() -> None:
    schedule = training_schedule()
    assert schedule.timesteps == tuple(range(1000))
    assert schedule.betas.dtype == np.float64
    i = np.arange(1, 1001)
    cosine = np.cos((i / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    # the product of 1 − β telescopes to the cosine up to the last step, where the cap bites
    np.testing.assert_allclose(schedule.alphas_bar[:-1], cosine[:-1], rtol=1e-9)
    assert schedule.betas[-1] == 0.999
    assert (schedule.betas[:-1] < 0.999).all()
    assert (np.diff(schedule.betas[:-1]) > 0).all()


@pytest.mark.parametrize("steps", [1, 2, 8, 20, 250, 1000])
def test_schedules_run_from_almost_clean_to_almost_noise(steps: int) -> None:
    schedule = respaced_schedule(steps)
    assert len(schedule) == steps == len(schedule.betas)
    assert ((schedule.betas > 0) & (schedule.betas < 1)).all()
    assert (np.diff(schedule.alphas_bar) < 0).all()
    assert schedule.alphas_bar[-1] < 1e-4
    assert schedule.timesteps[-1] == 999
    assert np.isfinite(schedule.posterior_log_variance).all()
    # each respaced step has the noise level of the original step it stands for
    np.testing.assert_allclose(schedule.alphas_bar, training_schedule().alphas_bar[list(schedule.timesteps)])


def test_published_steps() -> None:
    assert respaced_schedule(8).timesteps == (0, 143, 285, 428, 571, 714, 856, 999)
    assert respaced_schedule(1).timesteps == (999,)
    assert respaced_schedule(2).timesteps == (0, 999)
    whole = respaced_schedule(1000)
    assert whole.timesteps == training_schedule().timesteps
    np.testing.assert_allclose(whole.betas, training_schedule().betas, rtol=1e-9)


@given(st.integers(2, 1000))
def test_respaced_steps_are_even(steps: int) -> None:
    timesteps = np.array(respaced_schedule(steps).timesteps)
    assert timesteps[0] == 0
    assert (np.diff(timesteps) > 0).all()
    assert np.abs(timesteps - np.arange(steps) * 999 / (steps - 1)).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="diffusion steps"):
        respaced_schedule(steps)


def test_the_first_posterior_variance_is_replaced_by_the_second() -> None:
    schedule = training_schedule()
    variance = np.exp(schedule.posterior_log_variance)
    assert variance[0] == variance[1]
    for i in (1, 500, 999):
        before = schedule.alphas_bar[i - 1]
        assert variance[i] == pytest.approx(schedule.betas[i] * (1 - before) / (1 - schedule.alphas_bar[i]))


# --------------------------------------------------------------------- algebra


@settings(deadline=None)
@given(st.sampled_from([2, 8, 1000]), st.integers(0, 10**6), st.integers(0, 1000))
def test_predicting_x0_undoes_adding_noise(steps: int, draw: int, seed: int) -> None:
    schedule = respaced_schedule(steps)
    t = torch.tensor([draw % (steps - 1)])  # at the last step nothing but noise is left
    x0, noise = normal(1, C, seed=seed).clamp(-1, 1), normal(1, C, seed=seed + 1)
    x = add_noise(x0, noise, t, schedule)
    tolerance = 1e-5 / math.sqrt(schedule.alphas_bar[int(t)])
    torch.testing.assert_close(predict_x0(x, noise, t, schedule), x0, rtol=0, atol=tolerance)


def test_noise_keeps_unit_variance() -> None:
    schedule = training_schedule()
    t = all_steps(schedule)
    one, zero = torch.ones(1000, 1), torch.zeros(1000, 1)
    signal, noise = add_noise(one, zero, t, schedule), add_noise(zero, one, t, schedule)
    torch.testing.assert_close(signal.square() + noise.square(), one, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [8, 1000])
def test_the_posterior_is_the_product_of_prior_and_likelihood(steps: int) -> None:
    """q(x_{t−1} | x_t, x₀) ∝ q(x_t | x_{t−1})·q(x_{t−1} | x₀): precisions add, means are weighted by them."""
    schedule = respaced_schedule(steps)
    t = all_steps(schedule)[1:]
    beta, before = schedule.betas[1:], schedule.alphas_bar[:-1]
    x0, x = normal(1, 1, seed=1).double().item(), normal(1, 1, seed=2).double().item()
    prior_precision, likelihood_precision = 1 / (1 - before), (1 - beta) / beta
    variance = 1 / (prior_precision + likelihood_precision)
    mean = variance * (prior_precision * np.sqrt(before) * x0 + likelihood_precision * x / np.sqrt(1 - beta))
    ours = posterior_mean(torch.full((steps - 1, 1), x0), torch.full((steps - 1, 1), x), t, schedule)
    np.testing.assert_allclose(ours[:, 0], mean, rtol=0, atol=1e-5)
    np.testing.assert_allclose(schedule.posterior_log_variance[1:], np.log(variance), rtol=1e-6)


def test_the_posterior_of_the_first_step_is_x0_itself() -> None:
    x0 = normal(1, C)
    for schedule in (training_schedule(), respaced_schedule(8)):
        mean = posterior_mean(x0, normal(1, C, seed=1), torch.tensor([0]), schedule)
        torch.testing.assert_close(mean, x0, rtol=0, atol=1e-6)


def test_the_variance_is_interpolated_in_the_logarithm_without_clamping() -> None:
    schedule = respaced_schedule(8)
    t = torch.tensor([3, 3, 3, 3])
    v = torch.tensor([[-1.0], [1.0], [0.0], [3.0]])
    low, high = schedule.posterior_log_variance[3], np.log(schedule.betas[3])
    wanted = [low, high, (low + high) / 2, 2 * high - low]
    np.testing.assert_allclose(model_log_variance(v, t, schedule)[:, 0], wanted, rtol=1e-5)


def test_constants_are_looked_up_row_by_row() -> None:
    assert constants(np.array([0.5, 2.0, 7.0]), torch.tensor([2, 0])).tolist() == [[7.0], [0.5]]


# --------------------------------------------------------------------- loss


def exact_model(noise_NC: Tensor, v: float) -> object:
    return lambda x, t: torch.cat([noise_NC, torch.full_like(noise_NC, v)], -1)


def test_a_model_without_error_has_no_mse_and_with_the_true_variance_no_kl() -> None:
    schedule = training_schedule()
    t = torch.tensor([0, 1, 10, 500, 990])
    x0, noise = normal(5, C).clamp(-1, 1), normal(5, C, seed=1)
    losses = diffusion_loss(exact_model(noise, v=-1.0), x0, t, noise, schedule)
    assert losses.mse_N.tolist() == [0.0] * 5
    torch.testing.assert_close(losses.vb_N[1:], torch.zeros(4), rtol=0, atol=1e-4)
    assert torch.equal(losses.total_N, losses.mse_N + losses.vb_N)
    wrong_variance = diffusion_loss(exact_model(noise, v=1.0), x0, t, noise, schedule)
    assert wrong_variance.mse_N.tolist() == [0.0] * 5
    assert (wrong_variance.vb_N[1:3] > losses.vb_N[1:3] + 1e-3).all()


def test_mse_is_the_mean_over_channels() -> None:
    noise = normal(2, C)
    losses = diffusion_loss(
        exact_model(noise + torch.tensor([[1.0], [3.0]]), 0.0),
        noise,
        torch.tensor([5, 7]),
        noise,
        training_schedule(),
    )
    torch.testing.assert_close(losses.mse_N, torch.tensor([1.0, 9.0]))


def test_the_model_is_asked_at_the_original_step() -> None:
    asked: list[int] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        asked.extend(t.tolist())
        return torch.zeros(len(x), 2 * C)

    diffusion_loss(model, normal(3, C), torch.tensor([0, 3, 7]), normal(3, C), respaced_schedule(8))
    assert asked == [0, 428, 999]


def test_the_variance_does_not_pull_at_the_mean() -> None:
    noise = normal(4, C)
    eps, v = normal(4, C, seed=1).requires_grad_(), normal(4, C, seed=2).requires_grad_()
    losses = diffusion_loss(
        lambda x, t: torch.cat([eps, v], -1),
        normal(4, C, seed=3),
        torch.tensor([0, 5, 100, 900]),
        noise,
        training_schedule(),
    )
    losses.vb_N.sum().backward()
    assert eps.grad is None or not eps.grad.any()
    assert v.grad is not None
    assert (v.grad != 0).all()


@settings(deadline=None)
@given(*(st.floats(-3, 3) for _ in range(4)))
def test_kl_is_never_negative_and_zero_only_for_the_same_normal(a: float, b: float, c: float, d: float) -> None:
    mean1, log1, mean2, log2 = (torch.tensor(v, dtype=torch.float64) for v in (a, b, c, d))
    kl = float(normal_kl(mean1, log1, mean2, log2))
    reference = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean1, (log1 / 2).exp()),
        torch.distributions.Normal(mean2, (log2 / 2).exp()),
    )
    assert kl >= -1e-12
    assert kl == pytest.approx(float(reference), abs=1e-9, rel=1e-9)
    assert float(normal_kl(mean1, log1, mean1, log1)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("mean", "log_scale"), [(0.0, -1.0), (0.3, -3.0), (-0.9, -2.0), (1.5, 0.5)])
def test_the_probabilities_of_all_bins_sum_to_one(mean: float, log_scale: float) -> None:
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    nll = discretised_gaussian_nll(x, torch.full_like(x, mean), torch.full_like(x, log_scale))
    assert (nll >= 0).all()
    assert float((-nll).exp().sum()) == pytest.approx(1, abs=1e-6)


def test_the_nll_is_smallest_at_the_mean_and_has_a_floor() -> None:
    x = torch.linspace(-0.99, 0.99, 199)
    nll = discretised_gaussian_nll(x, torch.full_like(x, 0.2), torch.full_like(x, -2.0))
    assert x[nll.argmin()] == pytest.approx(0.2, abs=0.006)
    far = discretised_gaussian_nll(torch.tensor(0.9), torch.tensor(-0.9), torch.tensor(-6.0))
    assert float(far) == pytest.approx(-math.log(1e-12), rel=1e-6)


# --------------------------------------------------------------------- sampling


class Step(nn.Module):
    """Stands in for the time embedding: passes the original step on."""

    def forward(self, t_N: Tensor) -> Tensor:
        return t_N.float()[:, None]


class Oracle(ResidualMLP):
    """Knows x₀ of every row (its condition) and so the noise; v is a constant."""

    def __init__(self, v: float = -1.0) -> None:
        super().__init__(ResidualConfig(width=8, depth=1), C, C)
        self.time_embed = Step()  # type: ignore[assignment]
        self.condition_embed = nn.Identity()  # type: ignore[assignment]
        self.v = v

    def predict(self, x_NC: Tensor, time: Tensor, condition_NW: Tensor) -> Tensor:
        alpha_bar = training_schedule().alphas_bar[int(time[0, 0])]
        eps = (x_NC - math.sqrt(alpha_bar) * condition_NW) / math.sqrt(1 - alpha_bar)
        return torch.cat([eps, torch.full_like(eps, self.v)], -1)


def small_mlp() -> ResidualMLP:
    return randomise(ResidualMLP(ResidualConfig(width=32, depth=2), C, D))


def seeded_noise(rows: int, seed: int = 0):
    """Other numbers at every turn; the first rows don't depend on how many there are."""
    return lambda turn: torch.stack([normal(C, seed=1000 * seed + 100 * turn + row) for row in range(rows)])


@pytest.mark.parametrize("steps", [1, 2, 8, 50])
def test_an_oracle_recovers_x0(steps: int) -> None:
    x0 = normal(6, C).clamp(-1, 1)
    found = denoise(Oracle(), x0, 1.0, seeded_noise(6), respaced_schedule(steps), 0.6)
    # a single step has only noise of 1/√ᾱ ≈ 10⁴ times the signal to go by
    torch.testing.assert_close(found, 0.6 * x0, rtol=0, atol=0.02 if steps == 1 else 2e-4)


def test_results_are_clipped_and_scaled() -> None:
    found = denoise(Oracle(), 5 * normal(6, C).sign(), 1.0, seeded_noise(6), respaced_schedule(8), 0.6)
    torch.testing.assert_close(found, 0.6 * normal(6, C).sign(), rtol=0, atol=1e-4)


def test_guidance_of_an_oracle_extrapolates_between_its_branches() -> None:
    conditional, unconditional = 0.2 * normal(3, C).clamp(-1, 1), 0.2 * normal(3, C, seed=1).clamp(-1, 1)
    z = torch.cat([conditional, unconditional])
    found = denoise(Oracle(), z, 0.5, seeded_noise(6), respaced_schedule(8), 1.0)
    # ε is linear in the oracle's x₀, so the guided ε is that of the guided x₀
    torch.testing.assert_close(found[:3], 1.5 * conditional - 0.5 * unconditional, rtol=0, atol=2e-4)


def test_the_noise_is_asked_for_turn_by_turn() -> None:
    turns: list[int] = []
    noise = seeded_noise(2)

    def counted(turn: int) -> Tensor:
        turns.append(turn)
        return noise(turn)

    denoise(small_mlp(), normal(2, D), 1.0, counted, respaced_schedule(4), 0.6)
    assert turns == [0, 1, 2, 3, 4]


@torch.inference_mode()
def test_guidance_of_exactly_one_is_off() -> None:
    mlp, z, schedule = small_mlp(), normal(6, D), respaced_schedule(4)
    off = denoise(mlp, z, 1.0, seeded_noise(6), schedule, 0.6)
    alone = denoise(mlp, z[:3], 1.0, seeded_noise(3), schedule, 0.6)
    torch.testing.assert_close(off[:3], alone, rtol=0, atol=1e-6)
    nearly = denoise(mlp, z, 1.001, seeded_noise(6), schedule, 0.6)
    assert (off[:3] - nearly[:3]).abs().max() > 1e-3


@torch.inference_mode()
@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_half_as_many_rows_of_noise_serve_both_branches(guidance: float) -> None:
    mlp, z, schedule, half = small_mlp(), normal(6, D), respaced_schedule(4), seeded_noise(3)
    doubled = denoise(mlp, z, guidance, lambda i: torch.cat([half(i), half(i)]), schedule, 0.6)
    assert torch.equal(denoise(mlp, z, guidance, half, schedule, 0.6), doubled)


@torch.inference_mode()
@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_a_conditional_row_depends_on_its_own_conditions_alone(guidance: float) -> None:
    mlp, schedule = small_mlp(), respaced_schedule(4)
    z = normal(8, D)
    whole = denoise(mlp, z, guidance, seeded_noise(4 if guidance != 1 else 8), schedule, 0.6)
    for row in range(4):
        own = z[[row, 4 + row]]
        noise = seeded_noise(8)
        rows = [row] if guidance != 1 else [row, 4 + row]
        alone = denoise(mlp, own, guidance, lambda i, n=noise, r=rows: n(i)[r], schedule, 0.6)
        torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=1e-6)


@torch.inference_mode()
def test_without_guidance_strength_the_unconditional_branch_does_not_matter() -> None:
    mlp, schedule = small_mlp(), respaced_schedule(4)
    z, other = normal(6, D), normal(6, D, seed=1)
    other[:3] = z[:3]
    one = denoise(mlp, z, 0.0, seeded_noise(3), schedule, 0.6)
    two = denoise(mlp, other, 0.0, seeded_noise(3), schedule, 0.6)
    assert torch.equal(one[:3], two[:3])
    guided = denoise(mlp, other, 1.5, seeded_noise(3), schedule, 0.6)
    assert not torch.allclose(guided[:3], denoise(mlp, z, 1.5, seeded_noise(3), schedule, 0.6)[:3])


def test_an_untrained_mlp_predicts_nothing() -> None:
    torch.manual_seed(0)
    mlp = ResidualMLP(ResidualConfig(width=32, depth=2), C, D)
    mlp.initialise()
    assert not mlp(normal(3, C), torch.tensor([0, 5, 999]), normal(3, D)).any()


def test_one_time_embedding_serves_all_rows() -> None:
    mlp, x, z = small_mlp(), normal(20, C), normal(20, D)
    each = mlp(x, torch.full((20,), 428), z)
    shared = mlp.predict(x, mlp.time_embed(torch.tensor([428])), mlp.condition_embed(z))
    torch.testing.assert_close(each, shared, rtol=0, atol=1e-5)
