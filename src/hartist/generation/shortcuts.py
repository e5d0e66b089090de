"""What fast mode leaves out: guidance where it is off, keys of the middle scales, cells of the last scale

Exact mode leaves out nothing. Every shortcut is a sampling setting, so that a picture says how it was made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hartist.errors import UserError
from hartist.generation.guidance import guidance_strength
from hartist.generation.sampling import SamplingSettings
from hartist.scales import ScaleSchedule
from hartist.transformer.cache import Spans

FAST: dict[str, Any] = {"unguided_scales": 2, "attended_scales": 1, "last_scale_share": 0.75, "diffusion_steps": 4}
"""The recommended blend, as changes to a model's settings; docs/benchmarks.md has what each costs and saves."""


def is_fast(settings: SamplingSettings) -> bool:
    """Whether these settings take the shortcuts of the recommended blend, with any number of diffusion steps."""
    return all(getattr(settings, name) == value for name, value in FAST.items() if name != "diffusion_steps")


def guidance_strengths(settings: SamplingSettings, scales: int, *, hold_last: bool) -> tuple[float, ...]:
    """t_k of the logits of every scale: VAR's growing one, or the user's own; 0 where guidance is off.

    Raises UserError if the user's has another number of scales.
    """
    own = settings.guidance_by_scale
    if own is not None:
        strengths = [settings.guidance * share for share in own]
        if len(own) != scales:
            raise UserError(f"guidance by scale has {len(own)} numbers; the model has {scales} scales")
    else:
        strengths = [guidance_strength(settings.guidance, k, scales, hold_last=hold_last) for k in range(scales)]
    off = max(0, scales - settings.unguided_scales)
    return (*strengths[:off], *[0.0] * (scales - off))


@dataclass(frozen=True)
class GuidancePlan:
    """How strongly a generation is guided, and so for how many scales the other branch is computed."""

    strengths: tuple[float, ...]
    """t_k of every scale's logits."""
    residual: float
    """t of the residual tokens; 0 if there are none, or no guidance for them."""
    guided_scales: int
    """The other branch runs up to the last scale that it guides: later scales read the keys of earlier ones."""


def plan_guidance(settings: SamplingSettings, scales: int, *, has_residual: bool) -> GuidancePlan:
    """The guidance of a model with so many scales. Raises UserError as `guidance_strengths` does."""
    strengths = guidance_strengths(settings, scales, hold_last=has_residual)
    guided_scales = max((k + 1 for k, t in enumerate(strengths) if t), default=0)
    residual = 0.0
    if has_residual and settings.residual and settings.guidance > 0:
        residual = strengths[-1]
        if settings.residual_guidance is not None:
            residual = guidance_strength(settings.residual_guidance, scales - 1, scales, hold_last=True)
        if residual == 1.0:  # means "off", as released
            residual = 0.0
        if residual:
            guided_scales = scales
    return GuidancePlan(strengths, residual, guided_scales)


def attended_spans(schedule: ScaleSchedule, prefix_tokens: int, k: int, attended_scales: int | None) -> Spans | None:
    """Which cached keys scale k reads, as (start, end): context, the coarse half of the scales, and the
    `attended_scales` before k. None: all (paper appendix: attention to the scales between is near zero).
    """
    if attended_scales is None or k == 0:
        return None
    early = max(1, len(schedule) // 2)
    lengths = (prefix_tokens, *schedule.lengths[1:])
    ends = [sum(lengths[: i + 1]) for i in range(k)]
    first_recent = max(k - attended_scales, 0)
    if first_recent <= early:
        return None
    return ((0, ends[early - 1]), (ends[first_recent - 1], ends[k - 1]))


def cells_to_compute(f_hat_BChw: Float[Tensor, "b c h w"], share: float) -> Int[Tensor, "b m"]:
    """The cells of the last scale where the picture so far has most detail, in row order.

    Detail is the distance of a cell's latent from the mean of its 3×3 neighbours: what the last scale adds is largest
    there.
    """
    mean_BChw = F.avg_pool2d(f_hat_BChw, 3, 1, 1, count_include_pad=False)
    detail_Bl = (f_hat_BChw - mean_BChw).square().sum(1).flatten(1)
    cells = detail_Bl.shape[1]
    return detail_Bl.topk(max(1, math.ceil(share * cells)), dim=1).indices.sort(1).values
