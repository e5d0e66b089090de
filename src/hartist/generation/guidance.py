"""Classifier-free guidance, growing with the scale (as in VAR)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def guidance_strength(cfg: float, k: int, num_scales: int, *, hold_last: bool) -> float:
    """t_k = cfg·k/(K−1).

    `hold_last` lets the last scale use the ratio of the scale before it, (K−2)/(K−1), as the released
    HART code does for logits and residual MLP; VAR does not.
    """
    if num_scales == 1:
        return cfg
    if hold_last and k == num_scales - 1:
        k -= 1
    return cfg * (k / (num_scales - 1))


def guide(
    conditional: Float[Tensor, "*shape"], unconditional: Float[Tensor, "*shape"], t: float
) -> Float[Tensor, "*shape"]:
    """(1+t)·conditional − t·unconditional."""
    return (1 + t) * conditional - t * unconditional
