"""From logits to token ids: temperature, top-k, top-p, smoothing (as in VAR). Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hartist.errors import UserError

RELEASED_TOP_K = (600, 300)
"""Before scale 7 (0-based) and from there on."""

CHUNK = 512
"""Cells sampled at a time."""


@dataclass(frozen=True)
class SamplingSettings:
    """How an image is drawn from the model. Raises UserError for values outside their range."""

    guidance: float = 4.5
    top_k: int | None = None
    """0 keeps all codes; None is the released rule, 600 before scale 7 and 300 from there on."""
    top_p: float = 0.0
    """0 keeps all codes."""
    temperature: float = 1.0
    """0 is greedy."""
    smoothing: bool = False
    """Mix code vectors softly by Gumbel-softmax instead of taking one (the authors' demo setting)."""
    residual: bool = True
    """Add residual tokens; without them the picture is the discrete path."""
    diffusion_steps: int | None = None
    """Denoising steps of the residual tokens; None is the model's own number."""

    residual_guidance: float | None = None
    """Guidance of the residual tokens alone; None uses `guidance`, as released, 0 switches it off."""
    residual_temperature: float = 1.0
    """Scale of the noise added between denoising steps; 0 adds none."""

    guidance_by_scale: tuple[float, ...] | None = None
    """Shares of `guidance`, one a scale, coarse to fine; None grows linearly from 0 to 1, as in VAR."""
    unguided_scales: int = 0
    """So many of the last scales have no guidance, and cost half."""
    attended_scales: int | None = None
    """A scale attends to the context, the coarse half of all scales, and so many scales before it; None: to all."""
    last_scale_share: float = 1.0
    """Share of the last scale's cells that are computed, those with most detail; the others add nothing."""

    def __post_init__(self) -> None:
        if not 0 <= self.guidance <= 100:
            raise UserError(f"guidance {self.guidance} is outside 0..100; the usual value is 4.5")
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"top-k {self.top_k} is negative; use 0 to keep all codes")
        if not 0 <= self.top_p <= 1:
            raise UserError(f"top-p {self.top_p} is outside 0..1; use 0 to keep all codes")
        if not 0 <= self.temperature <= 100:
            raise UserError(f"temperature {self.temperature} is outside 0..100; 1 is the model as trained")
        if self.residual_guidance is not None and not 0 <= self.residual_guidance <= 100:
            raise UserError(f"residual guidance {self.residual_guidance} is outside 0..100; 0 switches it off")
        if not 0 <= self.residual_temperature <= 10:
            raise UserError(
                f"residual temperature {self.residual_temperature} is outside 0..10; 1 is the model as trained"
            )
        if self.diffusion_steps is not None and not 1 <= self.diffusion_steps <= 1000:
            raise UserError(f"{self.diffusion_steps} diffusion steps; choose between 1 and 1000")
        if self.guidance_by_scale is not None and not all(0 <= share <= 10 for share in self.guidance_by_scale):
            raise UserError(f"guidance by scale {self.guidance_by_scale} is outside 0..10; 1 is the whole guidance")
        if not 0 <= self.unguided_scales <= 1000:
            raise UserError(f"{self.unguided_scales} unguided scales; choose 0 or more")
        if self.attended_scales is not None and self.attended_scales < 1:
            raise UserError(f"{self.attended_scales} attended scales; 1 is the one before alone")
        if not 0 < self.last_scale_share <= 1:
            raise UserError(f"last-scale share {self.last_scale_share} is outside 0..1; 1 computes all cells")

    def top_k_at(self, k: int) -> int:
        return RELEASED_TOP_K[k >= 7] if self.top_k is None else self.top_k


def keep_top_k(logits_BlV: Float[Tensor, "b l v"], top_k: int) -> Float[Tensor, "b l v"]:
    """−∞ below the k-th largest logit; ties with it stay. 0 keeps everything."""
    if top_k <= 0 or top_k >= logits_BlV.shape[-1]:
        return logits_BlV
    threshold = logits_BlV.topk(top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    return logits_BlV.masked_fill(logits_BlV < threshold, -torch.inf)


def keep_top_p(logits_BlV: Float[Tensor, "b l v"], top_p: float) -> Float[Tensor, "b l v"]:
    """−∞ for the least likely codes that together have at most 1 − p; the likeliest always stays."""
    if top_p <= 0:
        return logits_BlV
    ascending, order = logits_BlV.sort(dim=-1)
    remove = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    remove[..., -1] = False
    return logits_BlV.masked_fill(remove.scatter(-1, order, remove), -torch.inf)


def sample_ids(
    logits_BlV: Float[Tensor, "b l v"], settings: SamplingSettings, k: int, uniform_Bl: Float[Tensor, "b l"]
) -> Int[Tensor, "b l"]:
    """Token ids of scale k by inverse CDF of one uniform number a cell, codes in order of likelihood.

    In that order rounding of the logits moves only boundaries between unlikely codes, which makes the
    choice robust; the probabilities are summed in float64. Cells go in chunks, so that the last scale
    at 1024 px (4096 cells of 4096 codes) needs little memory beside its logits.
    """
    if settings.temperature == 0:
        return logits_BlV.argmax(-1)
    chunks = zip(logits_BlV.split(CHUNK, 1), uniform_Bl.split(CHUNK, 1), strict=True)
    return torch.cat([_sample_cells(logits, settings, k, uniform) for logits, uniform in chunks], 1)


def _sample_cells(logits_BlV: Tensor, settings: SamplingSettings, k: int, uniform_Bl: Tensor) -> Tensor:
    kept = keep_top_p(keep_top_k(logits_BlV / settings.temperature, settings.top_k_at(k)), settings.top_p)
    # Only what is kept has to be in order; ties with the k-th largest can make it more than k.
    count = int((kept > -torch.inf).sum(-1).max())
    descending, order = kept.topk(count, dim=-1, sorted=True)
    cumulative = descending.double().softmax(-1).cumsum(-1)
    rank_Bl1 = torch.searchsorted(cumulative, uniform_Bl[..., None].double() * cumulative[..., -1:], right=True)
    # a uniform number just below 1 may land on a code that was removed
    last_kept = (descending > -torch.inf).sum(-1, keepdim=True) - 1
    return order.gather(-1, torch.minimum(rank_Bl1, last_kept))[..., 0]


def smooth_vectors(
    logits_BlV: Float[Tensor, "b l v"], fraction: float, gumbel_BlV: Float[Tensor, "b l v"], codebook_VC: Tensor
) -> Float[Tensor, "b l c"]:
    """Gumbel-softmax of logits·(1 + k/(K−1)) with τ = max(0.27·(1 − 0.95·k/(K−1)), 0.005), times the codebook."""
    tau = max(0.27 * (1 - 0.95 * fraction), 0.005)
    weights_BlV = ((logits_BlV * (1 + fraction) + gumbel_BlV) / tau).softmax(-1)
    return weights_BlV @ codebook_VC.float()
