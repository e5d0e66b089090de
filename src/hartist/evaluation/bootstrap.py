"""Confidence intervals by resampling pictures: how far a figure would move with other pictures of the same kind

Each function returns R resampled values of a figure; `percentile_interval` makes an interval of them. The draws depend
on the seed and the number of pictures alone, so two runs over the same items are resampled at the same items, and the
difference of their resampled values is that of a paired bootstrap. Means and the kernel distance are resampled with
repetition (Efron 1979).

The Fréchet distance is not. It falls with the number of different pictures, so a resample with repetitions lies above
the figure by more than the interval is wide, and with fewer pictures than features its spread is several times too
large. It is computed from random halves without repetition, whose spread is that of whole samples to first order (half
the pictures double the variance, being half of a finite set halves it), and the halves' values are moved to have the
figure as their mean. The interval is thus one for the distance at this number of pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from tqdm import tqdm

from hartist.errors import UserError
from hartist.evaluation.distances import ROWS, Gaussian, fit_gaussian, frechet_distance, kernel_distance

RESAMPLES = 2000
"""Of means, unless another number is asked for."""
DISTANCE_RESAMPLES = 200
"""Of distances: a Fréchet distance takes the eigenvalues of a matrix of as many rows as pictures or features."""
LEVEL = 0.95
SMALLEST = 4
"""Pictures that an interval needs: a half must still have a covariance."""
BLOCK = 1 << 22
"""Counts of drawn pictures in memory at once."""


@dataclass(frozen=True)
class Interval:
    """From `low` to `high`, both included."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def percentile_interval(resampled_R: Float64[Tensor, " r"], level: float = LEVEL) -> Interval:
    """The middle share `level` of resampled values."""
    tail = (1 - level) / 2
    low, high = torch.nanquantile(resampled_R, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(low, high)


def resampled_means(
    values_N: Float[Tensor, " n"], *, resamples: int = RESAMPLES, seed: int = 0
) -> Float64[Tensor, " {resamples}"]:
    """Means of N draws with repetition; NaN is left out of the mean, not of the draw.

    Raises UserError below 4 values that are numbers.
    """
    measured_N = ~values_N.isnan()
    _require(int(measured_N.sum()))
    # as two columns, sum and count, one product of matrices does both
    both_N2 = torch.stack([values_N.double().nan_to_num(), measured_N.double()], 1)
    sums_R2 = torch.cat([counts_BN @ both_N2 for counts_BN in _draws(len(values_N), resamples, seed)])
    return sums_R2[:, 0] / sums_R2[:, 1]


def resampled_frechet(
    generated_ND: Float[Tensor, "n d"],
    reference_MD: Float[Tensor, "m d"],
    *,
    resamples: int = DISTANCE_RESAMPLES,
    seed: int = 0,
    resample_reference: bool = False,
    progress: bool = False,
) -> Float64[Tensor, " {resamples}"]:
    """Fréchet distances of random halves, moved to have the distance of all pictures as their mean.

    The reference is fixed: the interval then says what other pictures of the same model would give. With
    `resample_reference` it is halved as well, for what other real pictures would give on top; that is slow, for each
    half then needs a decomposition of its own. Raises UserError below 4 pictures.
    """
    _require(len(generated_ND))
    x_ND, y_MD = generated_ND.double(), reference_MD.double()
    target = fit_gaussian(y_MD)
    projected_NR = x_ND @ target.factor_RD.T
    halves, reference_halves = _halves(len(x_ND), seed), _halves(len(y_MD), seed + 1)
    values = []
    for _ in tqdm(range(resamples), desc="resampling", leave=False, disable=None if progress else True):
        half = next(halves)
        if resample_reference:
            target = fit_gaussian(y_MD[next(reference_halves)])
            values.append(_frechet(x_ND[half], x_ND[half] @ target.factor_RD.T, target))
        else:
            values.append(_frechet(x_ND[half], projected_NR[half], target))
    values_R = torch.stack(values)
    return values_R - values_R.mean() + frechet_distance(fit_gaussian(x_ND), fit_gaussian(y_MD))


def resampled_kernel(
    generated_ND: Float[Tensor, "n d"],
    reference_MD: Float[Tensor, "m d"],
    *,
    resamples: int = DISTANCE_RESAMPLES,
    seed: int = 0,
    resample_reference: bool = False,
    progress: bool = False,
) -> Float64[Tensor, " {resamples}"]:
    """Kernel distances of draws with repetition; pairs of a picture with itself stay out, drawn twice or not.

    With w how often each picture was drawn, Σ wᵢ·wⱼ·k(xᵢ, xⱼ) over i ≠ j, divided by Σ wᵢ·wⱼ, stays unbiased. All
    resamples share one pass over the kernel matrix, of which a block is in memory at a time. The reference is fixed
    unless `resample_reference`. Raises UserError below 4 pictures.
    """
    n, m = len(generated_ND), len(reference_MD)
    _require(n)
    x_ND, y_MD = generated_ND.double(), reference_MD.double()
    w_RN = torch.cat(list(_draws(n, resamples, seed)))
    v_RM = torch.cat(list(_draws(m, resamples, seed + 1))) if resample_reference else torch.ones(1, m).double()
    with tqdm(total=2 * n + m, desc="resampling", leave=False, disable=None if progress else True) as bar:
        within_R = _weighted_pairs(x_ND, w_RN, x_ND, w_RN, bar) - (w_RN.square() @ _diagonal(x_ND))
        within_R = within_R / (n * n - w_RN.square().sum(1))
        reference_R = _weighted_pairs(y_MD, v_RM, y_MD, v_RM, bar) - (v_RM.square() @ _diagonal(y_MD))
        reference_R = reference_R / (m * m - v_RM.square().sum(1))
        across_R = _weighted_pairs(x_ND, w_RN, y_MD, v_RM, bar) / (n * m)
    return within_R + reference_R - 2 * across_R


def figure_of(kind: str, generated_ND: Float[Tensor, "n d"], reference_MD: Float[Tensor, "m d"]) -> float:
    """The distance itself, "frechet" or "kernel": what a figure should be, if these are its rows."""
    if kind == "frechet":
        return frechet_distance(fit_gaussian(generated_ND), fit_gaussian(reference_MD))
    return kernel_distance(generated_ND, reference_MD)


def _frechet(x_ND: Tensor, projected_NR: Tensor, target: Gaussian) -> Tensor:
    """`frechet_distance`, given X·Bᵀ with Σ_b = BᵀB: centring these rows gives A·Bᵀ, whose singular values count.

    They are the roots of the eigenvalues of the smaller of its two Gram matrices. Rounding leaves eigenvalues that
    should be 0 at 1e-16 of the largest, which moves the sum by less than 1e-5 of it: nothing, beside the spread.
    """
    count = len(x_ND)
    mean_D, mean_R = x_ND.mean(0), projected_NR.mean(0)
    spread = (x_ND.square().sum() - count * mean_D.square().sum()) / (count - 1)
    a_NR = (projected_NR - mean_R) / (count - 1) ** 0.5
    gram = a_NR @ a_NR.T if len(a_NR) < a_NR.shape[1] else a_NR.T @ a_NR
    overlap = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
    return (mean_D - target.mean_D).square().sum() + spread + target.factor_RD.square().sum() - 2 * overlap


def _weighted_pairs(a_ND: Tensor, w_RN: Tensor, b_MD: Tensor, v_RM: Tensor, bar: tqdm) -> Float64[Tensor, " r"]:
    """Σᵢⱼ wᵢ·vⱼ·k(aᵢ, bⱼ) of each resample; a single row of weights serves all."""
    total = torch.zeros(()).double()
    for start in range(0, len(a_ND), ROWS):
        rows = slice(start, start + ROWS)
        kernel_bM = (a_ND[rows] @ b_MD.T / a_ND.shape[1] + 1).pow(3)
        total = total + ((kernel_bM @ v_RM.T).T * w_RN[:, rows]).sum(1)
        bar.update(len(kernel_bM))
    return total


def _diagonal(x_ND: Tensor) -> Tensor:
    return (x_ND.square().mean(1) + 1).pow(3)


def _draws(count: int, resamples: int, seed: int) -> Iterator[Float64[Tensor, "b n"]]:
    """How often each of `count` pictures is drawn in each resample, some resamples at a time."""
    generator = torch.Generator().manual_seed(seed)
    step = max(1, BLOCK // count)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn_BN = torch.randint(count, (size, count), generator=generator)
        yield torch.zeros(size, count).double().scatter_add_(1, drawn_BN, torch.ones(1, 1).double().expand_as(drawn_BN))


def _halves(count: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randperm(count, generator=generator)[: count // 2]


def _require(count: int) -> None:
    if count < SMALLEST:
        raise UserError(f"an interval needs at least {SMALLEST} pictures, there are {count}; evaluate more")
