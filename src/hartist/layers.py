"""Layers that the transformer and the residual MLP share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

MIN_ROWS = 16


class Linear(nn.Linear):
    """nn.Linear, except that float32 products of few rows on a CPU are padded to 16 rows.

    CPU matrix kernels sum in another order below a handful of rows. With the padding an image's
    coarse scales give the same bits whether it is generated alone or in a batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        return steady_linear(x, self.weight, self.bias)


def steady_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear with the padding described in `Linear`."""
    rows = x.numel() // x.shape[-1]
    if rows >= MIN_ROWS or x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    padded = F.pad(x.reshape(rows, -1), (0, 0, 0, MIN_ROWS - rows))
    return F.linear(padded, weight, bias)[:rows].view(*x.shape[:-1], -1)


def scale_shift(
    y: Float[Tensor, "*b d"], scale: Float[Tensor, "*#b d"], shift: Float[Tensor, "*#b d"]
) -> Float[Tensor, "*b d"]:
    """y·(1 + scale) + shift, in one pass over y where the types agree."""
    if y.dtype == scale.dtype == shift.dtype:
        return torch.addcmul(shift, y, 1 + scale)
    return y * (1 + scale) + shift


def add_gated(
    x: Float[Tensor, "*b d"], gate: Float[Tensor, "*#b d"], y: Float[Tensor, "*b d"]
) -> Float[Tensor, "*b d"]:
    """x + gate·y, in one pass where the types agree."""
    return torch.addcmul(x, gate, y) if x.dtype == gate.dtype == y.dtype else x + gate * y


def sinusoidal_embedding(index: Int[Tensor, " n"], channels: int = 256) -> Float[Tensor, "n {channels}"]:
    """cos, then sin, of index · exp(−ln 10⁴ · i / half): raw integers, not normalised."""
    half = channels // 2
    frequency = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=index.device) / half)
    angle = index.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class SinusoidalEmbedder(nn.Module):
    """Index → 256 sinusoids → linear → SiLU → linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(256, width), nn.SiLU(), Linear(width, width))

    def forward(self, index_N: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        first: Tensor = self.mlp[0].weight  # type: ignore[assignment]
        return self.mlp(sinusoidal_embedding(index_N).to(first.dtype))
