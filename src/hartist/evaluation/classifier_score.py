"""Inception Score: are pictures clear, and unlike each other, to a classifier? A pure function in float64

The name belongs to FID's Inception network. The same figure of another classifier's logits is its own quantity, and
what reports it names the network. It sees no real pictures: a generator that makes one perfect picture of each class
scores best.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, pstdev

import torch
from jaxtyping import Float
from torch import Tensor

from hartist.errors import UserError

SPLITS = 10


@dataclass(frozen=True)
class ClassifierScore:
    """Mean and population standard deviation over the splits, from 1 to the number of classes."""

    mean: float
    deviation: float


def inception_score(logits_NK: Float[Tensor, "n k"], splits: int = SPLITS, seed: int = 0) -> ClassifierScore:
    """exp of the mean over pictures of KL(p(y|x) ‖ p(y)), within each of `splits` equal parts (Salimans et al. 2016).

    The rows are shuffled first, by `seed` alone: pictures that lie in the order of their classes would otherwise make
    parts of few classes, and score lower. Raises UserError for fewer pictures than parts, or no part.
    """
    count = len(logits_NK)
    if not 1 <= splits <= count:
        raise UserError(f"a score over {splits} splits needs at least as many pictures, and 1; there are {count}")
    order_N = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    log_p_NK = logits_NK[order_N.to(logits_NK.device)].double().log_softmax(1)
    scores = []
    for log_p_nK in log_p_NK.tensor_split(splits):
        p_nK = log_p_nK.exp()
        # entr is 0 at 0, where p·log p would be NaN
        marginal_entropy = torch.special.entr(p_nK.mean(0)).sum()
        scores.append((marginal_entropy - torch.special.entr(p_nK).sum(1).mean()).exp().item())
    return ClassifierScore(fmean(scores), pstdev(scores))
