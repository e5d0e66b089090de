"""What a recipe holds: the settings with which a tokenizer or a generator is trained"""

from __future__ import annotations

from dataclasses import dataclass

from hartist.config import TokenizerConfig, TransformerConfig
from hartist.errors import UserError
from hartist.generation.sampling import SamplingSettings
from hartist.training.config import GeneratorLossConfig, Phase, RunConfig, TokenizerLossConfig


@dataclass(frozen=True)
class TokenizerRecipe:
    image_size: int
    tokenizer: TokenizerConfig
    losses: TokenizerLossConfig
    run: RunConfig


@dataclass(frozen=True)
class GeneratorRecipe:
    name: str
    phases: tuple[Phase, ...]
    """Resolutions in order; the last one's scales are the transformer's."""
    transformer: TransformerConfig
    losses: GeneratorLossConfig
    run: RunConfig
    sampling: SamplingSettings
    """Sampling settings that the model is shipped with."""

    def __post_init__(self) -> None:
        if not self.phases or tuple(self.phases[-1].sides) != tuple(self.transformer.sides):
            raise UserError(f"recipe {self.name}: its last phase must have the transformer's scales")
        if self.phases[-1].scales not in (0, len(self.transformer.sides)):
            raise UserError(f"recipe {self.name}: its last phase must see all scales")
        if abs(sum(phase.share for phase in self.phases) - 1) > 1e-6:
            raise UserError(f"recipe {self.name}: the shares of its phases do not add up to 1")

    @property
    def image_size(self) -> int:
        return self.phases[-1].image_size

    def first_steps(self) -> list[int]:
        """The step with which each phase begins."""
        ends = [sum(phase.share for phase in self.phases[:i]) for i in range(len(self.phases))]
        return [round(end * self.run.steps) for end in ends]
