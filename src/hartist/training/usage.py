"""How evenly a codebook is used, scale by scale"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def perplexity_per_scale(hits_KV: Int[Tensor, "k v"]) -> Float[Tensor, " k"]:
    """Effective number of codes in use on every scale: exp of the entropy of its hits (float64, 0 without hits).

    From 1 (one code for everything: collapsed) to V (all alike). n tokens show at most n codes, so sum the
    hits of a window of batches: one of B images has but B·l_k tokens on scale k.
    """
    total_K1 = hits_KV.sum(1, keepdim=True)
    entropy_K = torch.special.entr(hits_KV.double() / total_K1.clamp(min=1)).sum(1)
    return entropy_K.exp() * (total_K1[:, 0] > 0)
