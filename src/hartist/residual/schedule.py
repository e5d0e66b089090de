"""The noise schedule of residual diffusion (paper section 3.2): cosine, respaced for generation."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TRAINING_STEPS = 1000
MAX_BETA = 0.999


@dataclass(frozen=True)
class NoiseSchedule:
    """n steps, in float64; step i of it is step `timesteps[i]` of the original thousand."""

    timesteps: tuple[int, ...]
    betas: np.ndarray
    """β_i, shape (n,)."""

    def __len__(self) -> int:
        return len(self.timesteps)

    @functools.cached_property
    def alphas_bar(self) -> np.ndarray:
        """ᾱ_i = Π (1 − β)."""
        return np.cumprod(1.0 - self.betas)

    @functools.cached_property
    def alphas_bar_previous(self) -> np.ndarray:
        return np.append(1.0, self.alphas_bar[:-1])

    @functools.cached_property
    def posterior_log_variance(self) -> np.ndarray:
        """log β̃_i of q(x_{i−1} | x_i, x₀); β̃₀ = 0 is replaced by β̃₁ (by β₀ in a one-step schedule)."""
        variance = self.betas * (1 - self.alphas_bar_previous) / (1 - self.alphas_bar)
        first = variance[1] if len(variance) > 1 else self.betas[0]
        return np.log(np.append(first, variance[1:]))

    @functools.cached_property
    def posterior_weights(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights of x₀ and x_i in the posterior mean."""
        weight_x0 = self.betas * np.sqrt(self.alphas_bar_previous) / (1 - self.alphas_bar)
        weight_xt = (1 - self.alphas_bar_previous) * np.sqrt(1 - self.betas) / (1 - self.alphas_bar)
        return weight_x0, weight_xt


@functools.cache
def training_schedule() -> NoiseSchedule:
    """The 1000-step cosine schedule: β = 1 − ᾱ(t+1)/ᾱ(t), at most 0.999."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    n = TRAINING_STEPS
    betas = [min(1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), MAX_BETA) for i in range(n)]
    return NoiseSchedule(tuple(range(n)), np.array(betas, dtype=np.float64))


@functools.cache
def respaced_schedule(steps: int) -> NoiseSchedule:
    """`steps` evenly spaced steps of the thousand: round(999·i/(n−1)), with β = 1 − ᾱ_i/ᾱ_{i−1}.

    The positions are summed up stride by stride, as released: for some n (21, 23, 27, …) the rounding
    of the sum decides which way a half goes. One step starts from the noisiest, 999.
    Raises ValueError outside 1..1000.
    """
    if not 1 <= steps <= TRAINING_STEPS:
        raise ValueError(f"{steps} diffusion steps; between 1 and {TRAINING_STEPS} are possible")
    last = TRAINING_STEPS - 1
    strides = itertools.repeat(last / (steps - 1), steps - 1) if steps > 1 else ()
    timesteps = [last] if steps == 1 else [round(x) for x in itertools.accumulate(strides, initial=0.0)]
    alphas_bar = training_schedule().alphas_bar[timesteps]
    return NoiseSchedule(tuple(timesteps), 1 - alphas_bar / np.append(1.0, alphas_bar[:-1]))


def constants(values: np.ndarray, t_N: Tensor) -> Tensor:
    """Schedule values at steps t, float32, N×1."""
    return torch.from_numpy(values).to(t_N.device)[t_N].float()[:, None]
