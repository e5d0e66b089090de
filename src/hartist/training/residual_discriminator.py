"""A residual, anti-aliased patch discriminator with spectral norm, for small batches"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

BLUR = (1.0, 3.0, 3.0, 1.0)
"""Binomial filter before every subsampling (Karras et al. 2020)."""


class SpectralConv2d(nn.Conv2d):
    """A convolution whose kernel, as a matrix out × (in·k·k), has spectral norm 1 (Miyato et al. 2018, eq. 8).

    One step of power iteration a forward pass in training mode. The norm is float32 also under autocast.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, *, bias: bool = True) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
        self.u: Tensor
        self.register_buffer("u", F.normalize(torch.randn(outputs), dim=0))
        for _ in range(10):
            self.spectral_norm()  # brings u near its limit

    def spectral_norm(self) -> Float[Tensor, ""]:
        """σ = uᵀWv, differentiable in W alone; in training mode u takes one step towards its limit."""
        with torch.autocast(self.weight.device.type, enabled=False):
            matrix = self.weight.flatten(1).float()
            with torch.no_grad():
                v = F.normalize(matrix.mT @ self.u, dim=0)
                u = F.normalize(matrix @ v, dim=0)
                if self.training:
                    self.u.copy_(u)
            return u @ (matrix @ v)

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b _c h w"]:
        return self._conv_forward(input, self.weight / self.spectral_norm(), self.bias)


def blur_pool(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c _h _w"]:
    """Half the size without aliasing: low-pass, then every second pixel (Zhang 2019)."""
    tap = x.new_tensor(BLUR) / sum(BLUR)
    kernel = torch.outer(tap, tap).expand(x.shape[1], 1, -1, -1)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, stride=2, groups=x.shape[1])


def activate(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Leaky ReLU that keeps the variance, without which spectral norm would let the signal fade."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


class ResidualBlock(nn.Module):
    """Half the size, `outputs` channels: StyleGAN2's discriminator block (Karras et al. 2020, figure 7c)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = SpectralConv2d(inputs, inputs, 3)
        self.conv2 = SpectralConv2d(inputs, outputs, 3)
        self.skip = SpectralConv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b _c _h _w"]:
        y = activate(self.conv2(blur_pool(activate(self.conv1(x)))))
        return (y + self.skip(blur_pool(x))) / math.sqrt(2)


class ResidualDiscriminator(nn.Module):
    """Judges patches of two sizes, 38 and 82 pixels with three layers, by logits at 1/4 and 1/8 of the image.

    Why so, against the PatchGAN of the released checkpoints:
    * blocks with a skip and a low-pass before subsampling: StyleGAN2 (Karras et al. 2020), Zhang 2019; MAGVIT
      (Yu et al. 2023) trains its image and video tokenizers against such a network;
    * no BatchNorm, whose statistics tie an image's logits to its batch and are noise at batch 16 and below:
      spectral norm (Miyato et al. 2018) bounds every layer instead, and gradient penalties stay per image;
    * patches (Isola et al. 2017), because the other losses keep the picture as a whole, on two scales
      (pix2pixHD, Wang et al. 2018), here two heads on one trunk, which costs less than two networks.
    LeCAM and R1 (`adversarial_terms`) come on top.
    """

    def __init__(self, channels: int = 32, layers: int = 3) -> None:
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        self.stem = SpectralConv2d(3, channels, 3)
        self.blocks = nn.ModuleList(ResidualBlock(a, b) for a, b in itertools.pairwise(widths))
        self.heads = nn.ModuleList(SpectralConv2d(width, 1, 3) for width in widths[1:][-2:])
        self.scales = len(self.heads)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b 1 _h _w"], ...]:
        """A map of logits for every scale, the finer one first."""
        x = activate(self.stem(image))
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        judged = features[-self.scales :]
        return tuple(head(x) for head, x in zip(self.heads, judged, strict=True))
