"""A transformer carried to other scales: the same weights, another schedule (paper section 3.2)"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from hartist.errors import UserError
from hartist.scales import ScaleSchedule, Side
from hartist.transformer.model import ScaleTransformer


def transformer_with_sides(transformer: ScaleTransformer, sides: Sequence[Side]) -> ScaleTransformer:
    """The transformer with a schedule of these sides; its own weights are left alone.

    Coordinates of relative positions are those of the finest grid, so they mean the same on any scale. A table of step
    embeddings is read between its entries: a scale gets what the old scales next to it in size have. Training should
    go on from there. Raises UserError for sides that are no schedule, and where every cell has a position of its own.
    """
    config = replace(transformer.config, sides=tuple(sides))
    if config.sides != transformer.config.sides and config.positions == "absolute":
        raise UserError("a model with absolute positions has no other scales; relative ones (rope) carry over")
    weights = dict(transformer.state_dict())
    if config.step_embedding == "table":
        weights["step_embed.weight"] = _resampled(
            weights["step_embed.weight"], transformer.config.schedule, config.schedule
        )
    other = ScaleTransformer(config).to(transformer.dtype)
    other.load_state_dict(weights)
    return other.train(transformer.training)


def _resampled(table_KD: Float[Tensor, "k d"], old: ScaleSchedule, new: ScaleSchedule) -> Float[Tensor, "n d"]:
    """A row for each new scale, linear in the logarithm of the number of cells between the old ones around it."""
    known = [math.log(length) for length in old.lengths]
    rows = []
    for length in new.lengths:
        place = math.log(length)
        after = next((k for k, value in enumerate(known) if value >= place), len(known) - 1)
        before = max(after - 1, 0)
        span = known[after] - known[before]
        share = min((place - known[before]) / span, 1.0) if span > 0 else 1.0
        rows.append(table_KD[before].lerp(table_KD[after], share))
    return torch.stack(rows)
