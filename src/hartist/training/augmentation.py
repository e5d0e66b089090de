"""Differentiable augmentation of what a discriminator sees (DiffAugment, Zhao et al. 2020)"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

SHIFT = 1 / 8
"""Largest shift, as a share of the side."""
CUTOUT = 1 / 2
"""Side of the square that is blanked, as a share of the side."""


def augment(image: Float[Tensor, "b 3 h w"], generator: torch.Generator | None = None) -> Float[Tensor, "b 3 h w"]:
    """Random colour, shift and cutout of every image, for itself; gradients pass through to the pixels.

    Applied to real and reconstructed images alike, it keeps a discriminator from learning few images by heart
    without teaching the other network to draw augmented ones. `generator` is one on the CPU.
    """
    B, _, H, W = image.shape
    draws_BN = torch.rand(B, 7, generator=generator)
    brightness, saturation, contrast = draws_BN[:, :3, None, None, None].to(image).unbind(1)
    image = image + (brightness - 0.5)
    grey = image.mean(1, keepdim=True)
    image = grey + (image - grey) * (2 * saturation)
    mean = image.mean((1, 2, 3), keepdim=True)
    image = mean + (image - mean) * (contrast + 0.5)

    down, right = round(H * SHIFT), round(W * SHIFT)
    padded = F.pad(image, (right, right, down, down))
    tops = (draws_BN[:, 3] * (2 * down + 1)).long().tolist()
    lefts = (draws_BN[:, 4] * (2 * right + 1)).long().tolist()
    image = torch.stack([padded[i, :, y : y + H, x : x + W] for i, (y, x) in enumerate(zip(tops, lefts, strict=True))])

    def far(side: int, draws_B: Tensor) -> Tensor:
        """Which positions along one side lie outside the blanked stretch."""
        distance_BN = torch.arange(side)[None] + 0.5 - draws_B[:, None] * side
        return (distance_BN.abs() > side * CUTOUT / 2).to(image.device)

    kept_BHW = far(H, draws_BN[:, 5])[:, :, None] | far(W, draws_BN[:, 6])[:, None]
    return image * kept_BHW[:, None]
