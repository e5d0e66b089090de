"""Precision and recall of a generator: how much of it is real-looking, how much of what is real it makes

Kynkäänniemi et al. 2019, section 3.1. Each set is taken for the union of balls around its features, each as wide as
the distance to the k-th nearest other feature of the set. Pure functions in float64, a block of distances at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from hartist.errors import UserError

NEIGHBOURS = 3
ROWS, COLUMNS = 1024, 8192
"""Of a block of distances: 64 MB."""
ROUNDING = 1e-12
"""Squared distances below this share of the squared norms are rounding errors of the product: equal rows."""


@dataclass(frozen=True)
class PrecisionRecall:
    """Both are shares, from 0 to 1."""

    precision: float
    """Of the generated pictures, those within a ball of the real ones."""
    recall: float
    """Of the real pictures, those within a ball of the generated ones."""


def precision_recall(
    real_ND: Float[Tensor, "n d"], generated_MD: Float[Tensor, "m d"], k: int = NEIGHBOURS
) -> PrecisionRecall:
    """Share of each set that lies within the other's balls, their borders included.

    Both fall and rise with the numbers of pictures: compare only figures of equal numbers. Raises UserError for sets
    of k pictures or fewer.
    """
    fewest = min(len(real_ND), len(generated_MD))
    if not 1 <= k < fewest:
        raise UserError(f"precision and recall with k = {k} need at least {k + 1} pictures each, there are {fewest}")
    centre_D = real_ND.double().mean(0)  # smaller norms, smaller rounding errors
    real_ND, generated_MD = real_ND.double() - centre_D, generated_MD.double() - centre_D
    return PrecisionRecall(
        _share_within(generated_MD, real_ND, squared_radii(real_ND, k)),
        _share_within(real_ND, generated_MD, squared_radii(generated_MD, k)),
    )


def squared_radii(x_ND: Float64[Tensor, "n d"], k: int) -> Float64[Tensor, " n"]:
    """Squared distance of each row to its k-th nearest other row; equal rows are neighbours at distance 0."""
    radii = []
    for rows_nD in x_ND.split(ROWS):
        nearest = torch.empty(len(rows_nD), 0, dtype=torch.float64, device=x_ND.device)
        for block_nm, _ in _blocks(rows_nD, x_ND):
            both = torch.cat([nearest, block_nm], dim=1)
            nearest = both.topk(min(k + 1, both.shape[1]), largest=False).values  # the row itself among them
        radii.append(nearest.max(1).values)
    return torch.cat(radii)


def _share_within(x_MD: Tensor, centres_ND: Tensor, radii_N: Tensor) -> float:
    inside = []
    for rows_mD in x_MD.split(ROWS):
        found: Bool[Tensor, " m"] = torch.zeros(len(rows_mD), dtype=torch.bool, device=x_MD.device)
        for block_mn, columns in _blocks(rows_mD, centres_ND):
            found |= (block_mn <= radii_N[columns]).any(1)
        inside.append(found)
    return torch.cat(inside).double().mean().item()


def _blocks(x_nD: Tensor, y_ND: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Squared distances of all rows of x to rows of y, by columns, and which columns they are."""
    x_n1 = x_nD.square().sum(1, keepdim=True)
    for start in range(0, len(y_ND), COLUMNS):
        columns = slice(start, start + COLUMNS)
        y_mD = y_ND[columns]
        norms_nm = x_n1 + y_mD.square().sum(1)
        squared_nm = norms_nm - 2 * x_nD @ y_mD.T
        yield squared_nm.masked_fill(squared_nm <= ROUNDING * norms_nm, 0), columns
