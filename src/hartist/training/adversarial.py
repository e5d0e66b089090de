"""The adversarial loss of tokenizer training: a discriminator, both sides' losses and what stabilises them"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hartist.training.adversarial_config import AdversarialConfig
from hartist.training.adversarial_terms import (
    hinge_generator_loss,
    hinge_loss,
    lecam_penalty,
    non_saturating_generator_loss,
    non_saturating_loss,
    r1_penalty,
)
from hartist.training.augmentation import augment
from hartist.training.discriminator import PatchDiscriminator
from hartist.training.residual_discriminator import ResidualDiscriminator

Maps = tuple[Tensor, ...]
"""Logits of patches, one B×1×h×w map for every scale on which a discriminator judges."""

LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "hinge": (hinge_loss, hinge_generator_loss),
    "non-saturating": (non_saturating_loss, non_saturating_generator_loss),
}
"""The discriminator's and the tokenizer's side."""


@dataclass(frozen=True)
class DiscriminatorLoss:
    loss: Float[Tensor, ""]
    logs: dict[str, float]


class MovingLogits(nn.Module):
    """LeCAM's moving averages of the mean logit for real and reconstructed images, of every scale.

    Buffers, and changed in place: a run that is resumed goes on with them.
    """

    def __init__(self, scales: int, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.real_S: Tensor
        self.fake_S: Tensor
        self.count: Tensor
        self.register_buffer("real_S", torch.zeros(scales))
        self.register_buffer("fake_S", torch.zeros(scales))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def update(self, real: Maps, fake: Maps) -> None:
        """Take in a batch: the plain mean at first, so that the zeros at the start don't count."""
        means = torch.stack([torch.stack([x.float().mean() for x in maps]) for maps in (real, fake)])
        if not means.isfinite().all():
            return  # one failed batch must not spoil all that follow
        self.count += 1
        weight = torch.clamp(1 / self.count, min=1 - self.decay)
        self.real_S.lerp_(means[0], weight)
        self.fake_S.lerp_(means[1], weight)


class AdversarialLoss(nn.Module):
    """A discriminator with both sides' losses, averaged over its scales (hinge or non-saturating, as configured).

    Its parameters are the discriminator's; its buffers hold all else that lasts beyond a step. Neither side's
    call depends on the mode the modules were left in.
    """

    def __init__(self, config: AdversarialConfig, discriminator: PatchDiscriminator | None = None) -> None:
        """`discriminator`: one to go on with (kind `patchgan`) in place of a fresh one."""
        super().__init__()
        self.config = config
        self.discriminator = discriminator or build_discriminator(config)
        self.moving = MovingLogits(self.discriminator.scales) if config.lecam else None

    def maps(self, image: Float[Tensor, "b 3 h w"], generator: torch.Generator | None) -> Maps:
        maps = self.discriminator(augment(image, generator) if self.config.augment else image)
        return tuple(x.float() for x in (maps if isinstance(maps, tuple) else (maps,)))

    def generator_loss(
        self, reconstruction: Float[Tensor, "b 3 h w"], generator: torch.Generator | None = None
    ) -> Float[Tensor, ""]:
        """The tokenizer's loss; no gradient reaches the discriminator.

        `generator`: the random numbers of the augmentation, on the CPU.
        """
        self.train()
        with frozen(self.discriminator):
            fake = self.maps(reconstruction, generator)
        return torch.stack([LOSSES[self.config.loss][1](x) for x in fake]).mean()

    def discriminator_loss(
        self,
        real: Float[Tensor, "b 3 h w"],
        fake: Float[Tensor, "b 3 h w"],
        step: int,
        generator: torch.Generator | None = None,
    ) -> DiscriminatorLoss:
        """The discriminator's loss, with LeCAM and, every `r1_every` steps, R1; no gradient reaches the tokenizer."""
        config = self.config
        self.train()
        real, fake = real.detach(), fake.detach()
        penalised = config.r1 > 0 and step % config.r1_every == 0
        # The penalty's second derivatives are too coarse in half precision.
        with torch.autocast(real.device.type, enabled=False) if penalised else nullcontext():
            real_maps = self.maps(real.requires_grad_(penalised), generator)
        fake_maps = self.maps(fake, generator)
        pairs = list(zip(real_maps, fake_maps, strict=True))
        loss = torch.stack([LOSSES[config.loss][0](a, b) for a, b in pairs]).mean()
        logs = {"discriminator": loss.item(), "real": _mean(real_maps), "fake": _mean(fake_maps)}
        if self.moving is not None:
            self.moving.update(real_maps, fake_maps)
            usual = zip(self.moving.real_S, self.moving.fake_S, strict=True)
            lecam = torch.stack([lecam_penalty(*pair, *both) for pair, both in zip(pairs, usual, strict=True)]).mean()
            loss = loss + config.lecam * lecam
            logs["lecam"] = lecam.item()
        if penalised:
            r1 = r1_penalty(real_maps, real)
            loss = loss + 0.5 * config.r1 * config.r1_every * r1
            logs["r1"] = r1.item()
        return DiscriminatorLoss(loss, logs)


def build_discriminator(config: AdversarialConfig) -> PatchDiscriminator | ResidualDiscriminator:
    kind = PatchDiscriminator if config.kind == "patchgan" else ResidualDiscriminator
    return kind(config.channels, config.layers)


def _mean(maps: Maps) -> float:
    """The mean logit, every scale counting the same."""
    return torch.stack([x.detach().mean() for x in maps]).mean().item()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """What is computed inside has no gradient for the module's parameters."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
