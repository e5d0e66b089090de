"""The PatchGAN discriminator and the hinge loss of the tokenizer's optional adversarial part."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Strided 4×4 convolutions that judge overlapping patches; GroupNorm, so that small batches work."""

    def __init__(self, channels: int = 32, layers: int = 3) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for i in range(1, layers + 1):
            wider = channels * min(2**i, 8)
            stride = 2 if i < layers else 1
            blocks += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(min(32, wider), wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        blocks.append(nn.Conv2d(width, 1, 4, padding=1))
        self.net = nn.Sequential(*blocks)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 _h _w"]:
        return self.net(image)


def hinge_loss(real: Float[Tensor, "*shape"], fake: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """The discriminator's loss on its logits for real and reconstructed images."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(
    reconstruction: Float[Tensor, ""], adversarial: Float[Tensor, ""], last_layer: Tensor
) -> Float[Tensor, ""]:
    """Ratio of the two losses' gradients at the decoder's last layer (VQGAN eq. 7), at most 10⁴."""
    (grad_rec,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (grad_adv,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (grad_rec.norm() / (grad_adv.norm() + 1e-4)).clamp(0, 1e4).detach()
