"""The residual quantizer: latent ↔ token ids of every scale and residual tokens (paper section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hartist.config import TokenizerConfig
from hartist.scales import ScaleSchedule
from hartist.tokenizer.residual_loop import (
    Phi,
    ScaleStep,
    area_downsample,
    map_to_tokens,
    nearest_codes,
    residual_loop,
    tokens_to_map,
)


@dataclass(frozen=True)
class HybridTokens:
    """An image as HART sees it: discrete tokens on K scales, continuous ones on the finest grid."""

    ids: tuple[Int[Tensor, "b _l"], ...]
    """Token ids, one B×l_k tensor a scale."""
    last_scale_BlC: Float[Tensor, "b l c"]
    """What the last scale has to express: f_rest before the last discrete step."""
    residual_BlC: Float[Tensor, "b l c"]
    """Residual tokens: `last_scale` minus the code vectors of the last scale's ids."""
    schedule: ScaleSchedule


@dataclass(frozen=True)
class QuantizerTraining:
    """What the tokenizer's training pass yields."""

    f_hat_BChw: Float[Tensor, "b c h w"]
    """Decoder input, with the straight-through gradient to the encoder."""
    loss: Float[Tensor, ""]
    usage: float
    """Share of the codes hit at least once in the batch, on any scale (0 to 1)."""
    usage_per_scale: tuple[float, ...]
    """Distinct codes hit on each scale, as a share of the codebook."""
    hits_KV: Int[Tensor, "k v"]
    """How often each code was chosen on each scale."""


class Quantizer(nn.Module):
    """Codebook (V×C) and φ convolutions; the arithmetic lives in `residual_loop`."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.schedule = config.schedule
        self.ratio = abs(config.phi_ratio)
        self.count = config.phi_count
        self.beta = config.beta
        self.codebook = nn.Parameter(torch.empty(config.vocab_size, config.latent_channels))
        channels = config.latent_channels
        has_phi = self.ratio > 1e-6
        self.phi = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in range(self.count if has_phi else 0)
        )
        nn.init.uniform_(self.codebook, -1 / config.vocab_size, 1 / config.vocab_size)

    @property
    def phi_function(self) -> Phi:
        weights = [conv.weight for conv in self.phi]
        biases = [conv.bias for conv in self.phi]
        return Phi(weights, biases, self.ratio, self.count)  # type: ignore[arg-type]

    def lookup(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape c"]:
        """Code vectors of ids, float32."""
        return F.embedding(ids, self.codebook).float()

    def empty_latent(self, batch: int, schedule: ScaleSchedule | None = None) -> Float[Tensor, "b c h w"]:
        """f_hat before the first scale."""
        h, w = (schedule or self.schedule).finest
        return torch.zeros(batch, self.codebook.shape[1], h, w, device=self.codebook.device)

    def encode(self, f_BChw: Float[Tensor, "b c h w"], schedule: ScaleSchedule | None = None) -> HybridTokens:
        """Hybrid encode: ids of every scale and the residual tokens; φ is not applied at the last scale."""
        schedule = schedule or self.schedule
        rest_BChw = f_BChw.float()
        codebook_VC = self.codebook.float()
        ids: list[Tensor] = []

        def choose(k: int, _: Tensor) -> Tensor:
            ids.append(nearest_codes(map_to_tokens(area_downsample(rest_BChw, schedule.grids[k])), codebook_VC))
            return self.lookup(ids[-1])

        last_BChw = rest_BChw
        start = torch.zeros_like(rest_BChw)
        for step in residual_loop(choose, start, schedule, self.phi_function, phi_at_last_scale=False):
            last_BChw = rest_BChw
            rest_BChw = rest_BChw - step.update_BChw
        last_BlC = map_to_tokens(last_BChw)
        return HybridTokens(tuple(ids), last_BlC, last_BlC - self.lookup(ids[-1]), schedule)

    def steps_from_ids(
        self,
        ids: Sequence[Int[Tensor, "b _l"]],
        schedule: ScaleSchedule | None = None,
        *,
        phi_at_last_scale: bool = True,
    ) -> Iterator[ScaleStep]:
        """The loop over known ids, scale by scale; may stop early if fewer scales are given."""
        if not ids:
            return
        schedule = schedule or self.schedule
        start = self.empty_latent(ids[0].shape[0], schedule)
        loop = residual_loop(
            lambda k, _: self.lookup(ids[k]), start, schedule, self.phi_function, phi_at_last_scale=phi_at_last_scale
        )
        for _ in ids:
            yield next(loop)

    def dequantize_discrete(
        self, ids: Sequence[Int[Tensor, "b _l"]], schedule: ScaleSchedule | None = None
    ) -> Float[Tensor, "b c h w"]:
        """f_hat of the discrete path: φ on every scale, as tokenizer training has it."""
        *_, step = self.steps_from_ids(ids, schedule)
        return step.f_hat_BChw

    def dequantize_hybrid(self, tokens: HybridTokens) -> Float[Tensor, "b c h w"]:
        """f_hat plus residual tokens: f itself, up to rounding."""
        schedule = tokens.schedule
        *_, step = self.steps_from_ids(tokens.ids, schedule, phi_at_last_scale=False)
        return step.f_hat_BChw + tokens_to_map(tokens.residual_BlC, schedule.finest)

    def teacher_forcing_input(
        self, ids: Sequence[Int[Tensor, "b _l"]], schedule: ScaleSchedule | None = None
    ) -> Float[Tensor, "b l c"]:
        """The transformer's inputs for scales 2..K: f_hat so far, area-downsampled (B×(L−l_1)×C)."""
        schedule = schedule or self.schedule
        inputs = [
            map_to_tokens(area_downsample(step.f_hat_BChw, schedule.grids[step.k + 1]))
            for step in self.steps_from_ids(ids[: len(schedule) - 1], schedule)
        ]
        return torch.cat(inputs, 1) if inputs else self.empty_latent(ids[0].shape[0]).flatten(2)[:, :, :0].mT

    def training_pass(
        self,
        f_BChw: Float[Tensor, "b c h w"],
        *,
        add_residual: bool,
        schedule: ScaleSchedule | None = None,
    ) -> QuantizerTraining:
        """The tokenizer's training pass: φ on every scale, commitment and codebook loss, straight-through.

        `add_residual` is the coin flip of the paper: true lets the decoder see f itself.
        """
        schedule = schedule or self.schedule
        f_BChw = f_BChw.float()
        target_BChw = f_BChw.detach()
        rest_BChw = target_BChw
        codebook_VC = self.codebook.detach().float()
        hits: list[Tensor] = []

        def choose(k: int, _: Tensor) -> Tensor:
            z_BlC = map_to_tokens(area_downsample(rest_BChw, schedule.grids[k]))
            ids = nearest_codes(z_BlC, codebook_VC)
            hits.append(ids.flatten().bincount(minlength=len(codebook_VC)))
            return self.lookup(ids)

        loss = f_BChw.new_zeros(())
        start = torch.zeros_like(target_BChw)
        f_hat_BChw = start
        for step in residual_loop(choose, start, schedule, self.phi_function, phi_at_last_scale=True):
            f_hat_BChw = step.f_hat_BChw
            rest_BChw = rest_BChw - step.update_BChw.detach()
            loss = loss + self.beta * F.mse_loss(f_BChw, f_hat_BChw.detach())
            loss = loss + F.mse_loss(f_hat_BChw, target_BChw)
        f_hat_BChw = f_hat_BChw.detach()
        if add_residual:
            f_hat_BChw = f_hat_BChw + rest_BChw
        hits_KV = torch.stack(hits)
        return QuantizerTraining(
            f_hat_BChw=f_BChw + (f_hat_BChw - target_BChw),
            loss=loss / len(schedule),
            usage=(hits_KV.sum(0) > 0).float().mean().item(),
            usage_per_scale=tuple((hits_KV > 0).float().mean(1).tolist()),
            hits_KV=hits_KV,
        )
