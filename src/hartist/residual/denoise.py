"""Sampling residual tokens: a few guided denoising steps of the residual MLP (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from hartist.residual.loss import model_log_variance, posterior_mean, predict_x0
from hartist.residual.mlp import ResidualMLP
from hartist.residual.schedule import NoiseSchedule

ROWS = 2048
"""So many rows at a time, what the MLP makes along the way stays in a CPU's cache."""


def denoise(
    mlp: ResidualMLP,
    z_RD: Float[Tensor, "r d"],
    guidance: float,
    noise: Callable[[int], Float[Tensor, "_n c"]],
    schedule: NoiseSchedule,
    target_scale: float,
    temperature: float = 1.0,
) -> Float[Tensor, "r c"]:
    """Residual tokens for the rows of conditions `z_RD`, from pure noise, in len(schedule) steps.

    With guidance t ≠ 1 the first half of the rows is the conditional branch, the second the
    unconditional one; at every step both feed the MLP the conditional half's x, ε is
    (1+t)·ε_cond − t·ε_uncond for both, and each keeps its own v and noise. Only the conditional half
    is of use afterwards. Guidance of exactly 1 means "off", as released: rows are independent.

    `noise(0)` is the start, `noise(i)` the noise of the i-th step; half as many rows as z serve both
    branches alike. `temperature` scales the noise of the steps, not the start. Everything but the MLP
    is float32.
    """
    guided = guidance != 1.0
    dtype = mlp.input_proj.weight.dtype
    rows = len(z_RD)
    half = rows // 2
    x_RC = _rows(noise(0), rows)
    condition_RW = mlp.condition_embed(z_RD.to(dtype))
    for turn, i in enumerate(reversed(range(len(schedule))), start=1):
        t_R = torch.full((rows,), i, device=z_RD.device)
        time_1W = mlp.time_embed(torch.tensor([schedule.timesteps[i]], device=z_RD.device))
        seen_RC = torch.cat([x_RC[:half], x_RC[:half]]) if guided else x_RC
        eps_RC, v_RC = _predict(mlp, seen_RC.to(dtype), time_1W, condition_RW).float().chunk(2, -1)
        if guided:
            eps_half = (1 + guidance) * eps_RC[:half] - guidance * eps_RC[half:]
            eps_RC = torch.cat([eps_half, eps_half])
        x0_RC = predict_x0(x_RC, eps_RC, t_R, schedule).clamp(-1, 1)
        step_noise = noise(turn)
        x_RC_mean = posterior_mean(x0_RC, x_RC, t_R, schedule)
        if i > 0:
            deviation_RC = torch.exp(0.5 * model_log_variance(v_RC, t_R, schedule))
            x_RC = x_RC_mean + temperature * deviation_RC * _rows(step_noise, rows)
        else:
            x_RC = x_RC_mean
    return x_RC * target_scale


def _predict(mlp: ResidualMLP, x_RC: Tensor, time_1W: Tensor, condition_RW: Tensor) -> Tensor:
    """`mlp.predict`, on a CPU in pieces."""
    if x_RC.device.type != "cpu" or torch.is_grad_enabled() or len(x_RC) <= ROWS:
        return mlp.predict(x_RC, time_1W, condition_RW)
    pieces = zip(x_RC.split(ROWS), condition_RW.split(ROWS), strict=True)
    return torch.cat([mlp.predict(x, time_1W, condition) for x, condition in pieces])


def _rows(noise_NC: Tensor, rows: int) -> Tensor:
    """Noise for all rows: given for all, or for the conditional half alone and used twice."""
    return noise_NC if len(noise_NC) == rows else torch.cat([noise_NC, noise_NC])
