"""Token subsampling: training sees only some cells of the last scale (paper section 3.3)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Int
from torch import Tensor

MIN_KEPT = 32
MEAN_DROP = 0.82
"""The mean of `drop_ratio`."""


def drop_ratio(generator: torch.Generator | None = None) -> float:
    """r ~ N(1, 0.25) truncated to [0.5, 1], by inverse CDF; 0.82 on average."""
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    low = normal.cdf(torch.tensor((0.5 - 1) / 0.25, dtype=torch.float64))
    u = low + torch.rand((), generator=generator, dtype=torch.float64) * (0.5 - low)
    return float(1 + 0.25 * normal.icdf(u))


def kept_count(tokens: int, ratio: float) -> int:
    """Cells that stay of a last scale of `tokens` cells: at least 32 (all, if there are no more)."""
    return tokens - max(0, min(math.ceil(tokens * ratio), tokens - MIN_KEPT))


def kept_positions(
    batch: int, tokens: int, count: int, generator: torch.Generator | None = None
) -> Int[Tensor, "b {count}"]:
    """Random cells to keep, other ones in every row, in ascending order."""
    return torch.rand(batch, tokens, generator=generator).argsort(1)[:, :count].sort(1).values
