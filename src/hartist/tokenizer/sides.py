"""A tokenizer carried to other scales: the same weights, another schedule (paper section 3.2)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hartist.errors import UserError
from hartist.scales import Side
from hartist.tokenizer.hybrid import HybridTokenizer


def tokenizer_with_sides(tokenizer: HybridTokenizer, sides: Sequence[Side]) -> HybridTokenizer:
    """The tokenizer with a schedule of these sides; its own weights are left alone.

    Codes and φ serve any schedule, a scale takes the φ next to its place between the first and the last one.
    They were learned for other scales, though, so training should go on. Raises UserError for sides that
    are no schedule, and where every scale has a φ of its own.
    """
    config = replace(tokenizer.config, sides=tuple(sides))
    if config.phi_count != tokenizer.config.phi_count:
        raise UserError(
            f"this tokenizer has a φ for each of its {len(tokenizer.config.sides)} scales, so it has no other schedule"
        )
    other = HybridTokenizer(config).to(tokenizer.quantizer.codebook.dtype)
    other.load_state_dict(tokenizer.state_dict())
    return other.train(tokenizer.training)
