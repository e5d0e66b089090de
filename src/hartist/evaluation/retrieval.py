"""Text–image agreement as retrieval: does a picture find its own prompt among all prompts? Pure functions

R@k depends on how many prompts there are and on how alike they are: give it beside the figure of real pictures of
the same prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hartist.errors import UserError


@dataclass(frozen=True)
class Retrieval:
    """How well pictures find their prompts."""

    pictures: int
    prompts: int
    """Different texts among which each picture has to find its own."""
    recall_at_1: float
    """Share of the pictures whose own text is the most similar one."""
    recall_at_10: float
    auc: float
    """Probability that a picture and its own text are more similar than a picture and another text; chance is ½."""


def retrieve(images_NE: Float[Tensor, "n e"], texts_ME: Float[Tensor, "m e"], own_N: Int[Tensor, " n"]) -> Retrieval:
    """Scores of N pictures against M different texts; picture i shows text `own_N[i]`. Compared by inner product.

    Raises UserError for fewer than 2 texts, among which there is nothing to find.
    """
    if len(texts_ME) < 2:
        raise UserError("retrieval needs at least 2 different prompts; raise the limit or add captions")
    similarity_NM = images_NE.double() @ texts_ME.double().T
    return Retrieval(
        len(images_NE),
        len(texts_ME),
        recall(similarity_NM, own_N, 1),
        recall(similarity_NM, own_N, 10),
        matched_auc(similarity_NM, own_N),
    )


def distinct(texts: Sequence[str]) -> tuple[list[str], Int[Tensor, " n"]]:
    """The different texts in order, and the row of each of `texts` among them: equal captions count as one."""
    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    return list(rows), torch.tensor([rows[text] for text in texts])


def recall(similarity_NM: Float[Tensor, "n m"], own_N: Int[Tensor, " n"], k: int) -> float:
    """Share of the rows whose own column is among the k largest.

    Ties are settled by lot, in expectation: with g larger columns and t others equal to the own one, the chance is
    (k − g)/(t + 1), within 0 and 1. So a network that finds everything equally similar gets k/M, not 1.
    """
    own_N1 = similarity_NM.gather(1, own_N[:, None])
    larger_N = (similarity_NM > own_N1).sum(1)
    tied_N = (similarity_NM == own_N1).sum(1)  # the own column among them
    return ((k - larger_N).double() / tied_N).clamp(0, 1).mean().item()


def matched_auc(similarity_NM: Float[Tensor, "n m"], own_N: Int[Tensor, " n"]) -> float:
    """Probability that a matched pair has a larger similarity than a mismatched one; a tie counts half.

    Over all N matched and N·(M−1) mismatched pairs, M ≥ 2 (the Mann–Whitney statistic).
    """
    matched_N = similarity_NM.gather(1, own_N[:, None])[:, 0]
    is_own_NM = torch.zeros_like(similarity_NM, dtype=torch.bool).scatter_(1, own_N[:, None], True)
    others = similarity_NM[~is_own_NM].sort().values
    below_N = torch.searchsorted(others, matched_N, side="left")
    not_above_N = torch.searchsorted(others, matched_N, side="right")
    return ((below_N + not_above_N).double() / (2 * len(others))).mean().item()
