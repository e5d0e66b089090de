"""CLIP score: how alike a picture and its own prompt are to a network that compares both. A pure function

The name belongs to CLIP networks, and a figure says which: those of ViT-L/14 and ViT-H/14 differ by several points.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor


def clip_score(image_ND: Float[Tensor, "n d"], text_ND: Float[Tensor, "n d"]) -> Float64[Tensor, " n"]:
    """100·max(0, cos) of picture i and text i (Hessel et al. 2021, equation 1, with the weight 100 for 2.5).

    The vectors may be of any length; a zero vector is like nothing, and scores 0.
    """
    return 100 * F.cosine_similarity(image_ND.double(), text_ND.double(), dim=1).clamp(min=0)
