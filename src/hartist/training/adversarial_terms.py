"""The terms of the adversarial losses: hinge, non-saturating, LeCAM, R1 and their weights"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def hinge_loss(real: Float[Tensor, "*shape"], fake: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """The discriminator's loss on its logits for real and reconstructed images (Lim and Ye 2017, halved)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def hinge_generator_loss(fake: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """What the tokenizer lowers against a discriminator with hinge loss."""
    return -fake.mean()


def non_saturating_loss(real: Float[Tensor, "*shape"], fake: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Cross-entropy of real against reconstructed (Goodfellow et al. 2014, halved)."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def non_saturating_generator_loss(fake: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """−log of the probability that the discriminator gives the reconstruction to be real."""
    return F.softplus(-fake).mean()


def adaptive_weight(
    reconstruction: Float[Tensor, ""], adversarial: Float[Tensor, ""], last_layer: Tensor
) -> Float[Tensor, ""]:
    """Ratio of the two losses' gradients at the decoder's last layer (VQGAN eq. 7), at most 10⁴."""
    (grad_rec,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (grad_adv,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (grad_rec.norm() / (grad_adv.norm() + 1e-4)).clamp(0, 1e4).detach()


def lecam_penalty(
    real: Float[Tensor, "*shape"],
    fake: Float[Tensor, "*shape"],
    usual_real: Float[Tensor, ""],
    usual_fake: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """LeCAM (Tseng et al. 2021): logits shall not leave the other side's moving average too far behind.

    One-sided, as in its authors' code: only real logits above, and fake ones below, are held back.
    """
    return F.relu(real - usual_fake).square().mean() + F.relu(usual_real - fake).square().mean()


def r1_penalty(logits: Sequence[Float[Tensor, "b 1 _h _w"]], image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
    """Squared gradient norm of the logits with regard to real images (R1, Mescheder et al. 2018, eq. 9, without γ/2).

    With one logit an image it is just that. Maps of P logits are summed with the factor 1/√P (and averaged
    alike over scales), so that patches which don't overlap give the mean of their own penalties.
    """
    score = image.new_zeros(())
    for map_B1hw in logits:
        score = score + map_B1hw.float().sum() / math.sqrt(len(logits) * map_B1hw[0].numel())
    (gradient_B3HW,) = torch.autograd.grad(score, image, create_graph=True)
    return gradient_B3HW.float().square().sum((1, 2, 3)).mean()
