"""Training loss of residual diffusion: noise prediction plus the variational bound of the learned variance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hartist.residual.schedule import NoiseSchedule, constants


@dataclass(frozen=True)
class DiffusionLoss:
    """Per row; `total` = `mse` + `vb`."""

    mse_N: Float[Tensor, " n"]
    vb_N: Float[Tensor, " n"]

    @property
    def total_N(self) -> Float[Tensor, " n"]:
        return self.mse_N + self.vb_N


def add_noise(
    x0_NC: Float[Tensor, "n c"], noise_NC: Float[Tensor, "n c"], t_N: Int[Tensor, " n"], schedule: NoiseSchedule
) -> Float[Tensor, "n c"]:
    """q(x_t | x₀): √ᾱ·x₀ + √(1−ᾱ)·noise."""
    alpha_bar = torch.from_numpy(schedule.alphas_bar).to(t_N.device)[t_N][:, None]
    return alpha_bar.sqrt().float() * x0_NC + (1 - alpha_bar).sqrt().float() * noise_NC


def predict_x0(
    x_NC: Float[Tensor, "n c"], eps_NC: Float[Tensor, "n c"], t_N: Int[Tensor, " n"], schedule: NoiseSchedule
) -> Float[Tensor, "n c"]:
    """x₀ = x/√ᾱ − √(1/ᾱ − 1)·ε."""
    alpha_bar = torch.from_numpy(schedule.alphas_bar).to(t_N.device)[t_N][:, None]
    return (1 / alpha_bar).sqrt().float() * x_NC - (1 / alpha_bar - 1).sqrt().float() * eps_NC


def posterior_mean(
    x0_NC: Float[Tensor, "n c"], x_NC: Float[Tensor, "n c"], t_N: Int[Tensor, " n"], schedule: NoiseSchedule
) -> Float[Tensor, "n c"]:
    """Mean of q(x_{t−1} | x_t, x₀)."""
    weight_x0, weight_xt = schedule.posterior_weights
    return constants(weight_x0, t_N) * x0_NC + constants(weight_xt, t_N) * x_NC


def model_log_variance(
    v_NC: Float[Tensor, "n c"], t_N: Int[Tensor, " n"], schedule: NoiseSchedule
) -> Float[Tensor, "n c"]:
    """f·log β + (1−f)·log β̃ with f = (v+1)/2, unclamped."""
    fraction_NC = (v_NC + 1) / 2
    log_beta = constants(np.log(schedule.betas), t_N)
    return fraction_NC * log_beta + (1 - fraction_NC) * constants(schedule.posterior_log_variance, t_N)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 ‖ N2) in nats, elementwise."""
    return 0.5 * (
        log_variance2
        - log_variance1
        - 1.0
        + torch.exp(log_variance1 - log_variance2)
        + (mean1 - mean2).square() * torch.exp(-log_variance2)
    )


def discretised_gaussian_nll(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """−log P of the bin x ± 1/255 in nats; bins beyond ±0.999 are open. The CDF is the tanh approximation."""

    def cdf(value: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value.pow(3))))

    centred, inverse = x - mean, torch.exp(-log_scale)
    upper = cdf(inverse * (centred + 1 / 255))
    lower = cdf(inverse * (centred - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return -probability.clamp(min=1e-12).log()


def diffusion_loss(
    model: Callable[[Tensor, Tensor], Tensor],
    x0_NC: Float[Tensor, "n c"],
    t_N: Int[Tensor, " n"],
    noise_NC: Float[Tensor, "n c"],
    schedule: NoiseSchedule,
) -> DiffusionLoss:
    """MSE of ε, mean over C, plus the variational bound in bits, mean over C, with the mean frozen.

    `model(x_t, original step)` returns ε and v side by side; x₀ is already divided by its scale.
    """
    x_NC = add_noise(x0_NC, noise_NC, t_N, schedule)
    original_N = torch.tensor(schedule.timesteps, device=t_N.device)[t_N]
    eps_NC, v_NC = model(x_NC, original_N).float().chunk(2, -1)
    mse_N = (noise_NC - eps_NC).square().mean(-1)

    mean_NC = posterior_mean(predict_x0(x_NC, eps_NC.detach(), t_N, schedule), x_NC, t_N, schedule)
    log_variance_NC = model_log_variance(v_NC, t_N, schedule)
    true_mean_NC = posterior_mean(x0_NC, x_NC, t_N, schedule)
    true_log_variance = constants(schedule.posterior_log_variance, t_N)
    kl_N = normal_kl(true_mean_NC, true_log_variance, mean_NC, log_variance_NC).mean(-1)
    nll_N = discretised_gaussian_nll(x0_NC, mean_NC, 0.5 * log_variance_NC).mean(-1)
    return DiffusionLoss(mse_N, torch.where(t_N == 0, nll_N, kl_N) / math.log(2))
