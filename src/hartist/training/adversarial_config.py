"""Settings of the tokenizer's adversarial part"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hartist.errors import UserError


@dataclass(frozen=True)
class AdversarialConfig:
    """Which discriminator, which loss, and what keeps the game between the two networks stable."""

    kind: Literal["patchgan", "residual"] = "residual"
    """`patchgan`: as in the released checkpoints, with BatchNorm; `residual`: independent of the batch."""
    channels: int = 32
    """Width before the first downsampling; the released one has 64."""
    layers: int = 3
    """Downsampling steps, which decide how large a patch is judged."""
    loss: Literal["hinge", "non-saturating"] = "hinge"
    start: float = 0.2
    """Share of the run after which the discriminator joins in."""
    ramp: float = 0.05
    """Share of the run over which its weight for the tokenizer then rises from 0 to 1."""
    lecam: float = 0.001
    """Weight of the LeCAM regularisation; 0 = none. MAGVIT-v2 uses 0.001."""
    r1: float = 0.0
    """γ of the R1 gradient penalty on real images; 0 = none. MAGVIT uses 10."""
    r1_every: int = 16
    """Steps from one R1 penalty to the next, which then counts that many times (lazy regularisation)."""
    augment: bool = False
    """Judge images after random colour, shift and cutout (DiffAugment): for a few thousand images and less."""

    def __post_init__(self) -> None:
        if min(self.channels, self.layers, self.r1_every) < 1:
            raise UserError("an adversarial loss needs channels, layers and r1_every of at least 1")
        if not (0 <= self.start <= 1 and 0 <= self.ramp <= 1):
            raise UserError("start and ramp of an adversarial loss are shares of the run: give numbers from 0 to 1")

    def first_step(self, steps: int) -> int:
        """The step of a run of `steps` in which the discriminator joins in."""
        return round(self.start * steps)

    def share(self, step: int, steps: int) -> float:
        """How much of its weight the tokenizer's side has in a step: 0 before the first, then a ramp up to 1."""
        done = step - self.first_step(steps) + 1
        return min(1.0, max(0.0, done / max(self.ramp * steps, 1.0)))
