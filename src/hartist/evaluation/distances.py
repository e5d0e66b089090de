"""Distances between two sets of pictures, by their features: Fréchet and kernel distance. Pure functions in float64

Neither is tied to a network, and neither is called FID or KID without FID's Inception network: the figures of two
networks cannot be compared. The Fréchet distance falls with the number of pictures, the kernel distance does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, pstdev

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from hartist.errors import UserError

ROWS = 1024
"""Rows of a kernel matrix that are in memory at once."""


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution; its covariance Σ is kept as a factor: Σ = factorᵀ·factor."""

    mean_D: Float64[Tensor, " d"]
    factor_RD: Float64[Tensor, "r d"]


def fit_gaussian(features_ND: Float[Tensor, "n d"]) -> Gaussian:
    """Mean and unbiased covariance of N ≥ 2 rows. Raises UserError for fewer."""
    count = len(features_ND)
    if count < 2:
        raise UserError(f"a distance needs at least 2 pictures, there are {count}; raise the limit or add pictures")
    x_ND = features_ND.double()
    mean_D = x_ND.mean(0)
    factor_RD = (x_ND - mean_D) / (count - 1) ** 0.5
    if count > x_ND.shape[1]:
        factor_RD = torch.linalg.qr(factor_RD, mode="r").R  # the same factorᵀ·factor in D rows
    return Gaussian(mean_D, factor_RD)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|μ_a − μ_b|² + tr Σ_a + tr Σ_b − 2·tr (Σ_a·Σ_b)^½: the squared 2-Wasserstein distance of two Gaussians.

    The last trace is the sum of the singular values of A·Bᵀ, where Σ_a = AᵀA and Σ_b = BᵀB: the eigenvalues of
    Σ_a·Σ_b = AᵀA·BᵀB are those of (A·Bᵀ)·(A·Bᵀ)ᵀ, the squares of these singular values. Taken this way no root of a
    rounding error is ever drawn, which matters with fewer pictures than features, where most eigenvalues are 0.
    """
    overlap = torch.linalg.svdvals(a.factor_RD @ b.factor_RD.T).sum()
    spread = a.factor_RD.square().sum() + b.factor_RD.square().sum()
    return max(0.0, ((a.mean_D - b.mean_D).square().sum() + spread - 2 * overlap).item())


def kernel_distance(x_ND: Float[Tensor, "n d"], y_MD: Float[Tensor, "m d"]) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy with the kernel k(x, y) = (x·y/D + 1)³ (KID's).

    mean of k(x, x') over x ≠ x' + mean of k(y, y') over y ≠ y' − 2·mean of k(x, y); it can fall below 0.
    Raises UserError for fewer than 2 rows.
    """
    n, m = len(x_ND), len(y_MD)
    if min(n, m) < 2:
        raise UserError(f"a distance needs at least 2 pictures, there are {min(n, m)}; raise the limit or add pictures")
    x_ND, y_MD = x_ND.double(), y_MD.double()
    within = (_kernel_sum(x_ND, x_ND) - _kernel_diagonal(x_ND)) / (n * (n - 1))
    within = within + (_kernel_sum(y_MD, y_MD) - _kernel_diagonal(y_MD)) / (m * (m - 1))
    return (within - 2 * _kernel_sum(x_ND, y_MD) / (n * m)).item()


@dataclass(frozen=True)
class KernelEstimate:
    """The kernel distance over random subsets: mean and standard deviation."""

    mean: float
    deviation: float


def kernel_distance_of_subsets(
    x_ND: Float[Tensor, "n d"], y_MD: Float[Tensor, "m d"], *, size: int, subsets: int = 100, seed: int = 0
) -> KernelEstimate:
    """`kernel_distance` of `subsets` pairs of subsets of `size` rows, drawn without repetition within a subset.

    The mean estimates the same quantity; the deviation says what sets of that size are good for.
    """
    size = min(size, len(x_ND), len(y_MD))
    generator = torch.Generator().manual_seed(seed)

    def subset(rows: Tensor) -> Tensor:
        return rows[torch.randperm(len(rows), generator=generator)[:size]]

    values = [kernel_distance(subset(x_ND), subset(y_MD)) for _ in range(subsets)]
    return KernelEstimate(fmean(values), pstdev(values))


def _kernel_sum(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    dim = x_ND.shape[1]
    return torch.stack([(rows @ y_MD.T / dim + 1).pow(3).sum() for rows in x_ND.split(ROWS)]).sum()


def _kernel_diagonal(x_ND: Tensor) -> Tensor:
    return (x_ND.square().mean(1) + 1).pow(3).sum()
