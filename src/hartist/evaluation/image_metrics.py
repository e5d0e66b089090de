"""Pixel metrics of reconstructions: PSNR, SSIM, and LPIPS picture by picture"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

from hartist.errors import UserError
from hartist.pixels import from_uint8
from hartist.training.lpips import LpipsLoss

WINDOW, SIGMA = 11, 1.5
"""Pixels along a side of SSIM's window, and the deviation of its Gaussian weights."""
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
"""SSIM's constants for pixels of 0..255."""


def psnr(image: Float[Tensor, "b 3 h w"], target: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio in dB of images in [−1, 1], after rounding both to 8 bits; inf if equal."""

    def levels(x: Tensor) -> Tensor:
        return ((x.float().clamp(-1, 1) + 1) * 127.5).round()

    mse_B = (levels(image) - levels(target)).square().flatten(1).mean(1)
    return 10 * torch.log10(255.0**2 / mse_B)


def ssim(a_BHW3: UInt8[Tensor, "b h w 3"], b_BHW3: UInt8[Tensor, "b h w 3"]) -> Float64[Tensor, " b"]:
    """Structural similarity of pictures, 1 if equal (Wang et al. 2004, equation 13).

    Means, variances and covariance are Gaussian-weighted over 11×11 pixels, of each colour channel by itself, and
    only where the window lies within the picture, as the paper's authors compute it and scikit-image does. The result
    is the mean over positions and channels.
    Raises UserError for pictures smaller than the window.
    """
    h, w = a_BHW3.shape[1:3]
    if min(h, w) < WINDOW:
        raise UserError(f"SSIM needs pictures of at least {WINDOW}×{WINDOW} pixels, these have {h}×{w}; leave it out")
    return torch.cat([_ssim(a, b) for a, b in zip(a_BHW3.split(1), b_BHW3.split(1), strict=True)])


def _ssim(a_BHW3: Tensor, b_BHW3: Tensor) -> Tensor:
    a, b = (x.movedim(-1, 1).double() for x in (a_BHW3, b_BHW3))
    mean_a, mean_b, aa, bb, ab = _blur(torch.cat([a, b, a * a, b * b, a * b])).split(len(a))
    covariance = ab - mean_a * mean_b
    variances = aa - mean_a.square() + bb - mean_b.square()
    luminance = (2 * mean_a * mean_b + C1) / (mean_a.square() + mean_b.square() + C1)
    return (luminance * (2 * covariance + C2) / (variances + C2)).flatten(1).mean(1)


def _blur(x_BCHW: Tensor) -> Tensor:
    offset_L = torch.arange(WINDOW, dtype=x_BCHW.dtype, device=x_BCHW.device) - WINDOW // 2
    weight_L = torch.exp(-offset_L.square() / (2 * SIGMA**2))
    kernel = (weight_L / weight_L.sum()).expand(x_BCHW.shape[1], 1, 1, WINDOW)
    groups = x_BCHW.shape[1]
    return F.conv2d(F.conv2d(x_BCHW, kernel, groups=groups), kernel.mT, groups=groups)


@torch.inference_mode()
def lpips(
    network: LpipsLoss, a_BHW3: UInt8[Tensor, "b h w 3"], b_BHW3: UInt8[Tensor, "b h w 3"]
) -> Float[Tensor, " b"]:
    """LPIPS v0.1 (VGG-16) of each pair of pictures, 0 if equal: the distance that training minimises, by picture."""
    device = next(network.parameters()).device
    return network.distances(from_uint8(a_BHW3.to(device)), from_uint8(b_BHW3.to(device))).cpu()
