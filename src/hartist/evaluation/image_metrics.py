"""Pixel metrics of reconstructions."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def psnr(image: Float[Tensor, "b 3 h w"], target: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio in dB of images in [−1, 1], after rounding both to 8 bits; inf if equal."""

    def levels(x: Tensor) -> Tensor:
        return ((x.float().clamp(-1, 1) + 1) * 127.5).round()

    mse_B = (levels(image) - levels(target)).square().flatten(1).mean(1)
    return 10 * torch.log10(255.0**2 / mse_B)
