"""Generator stage: cross-entropy on the tokens, residual diffusion on the last scale (paper sections 3.2, 3.3)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from hartist import config as configs
from hartist.config import TransformerConfig
from hartist.generation.checkpoint import LoadedModel, save_model
from hartist.generation.loop import generate_scales
from hartist.generation.noise import ImageNoise
from hartist.generation.sampling import SamplingSettings, sample_ids
from hartist.pixels import save_grid, to_uint8
from hartist.residual.loss import diffusion_loss
from hartist.residual.schedule import training_schedule
from hartist.text.encoder import TextContext, unconditional_context
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.tokenizer.quantizer import Quantizer
from hartist.training.config import GeneratorLossConfig, RunConfig
from hartist.training.loop import Part, StepLoss, batch_indices
from hartist.training.subsampling import drop_ratio, kept_count, kept_positions
from hartist.training.token_cache import TokenCache

REPAIR = SamplingSettings(top_k=600, top_p=0.96)
"""How the last scale's ids are sampled for the residual targets."""


class GeneratorStage:
    """A transformer over cached tokens and text states; the tokenizer is frozen."""

    def __init__(
        self,
        config: TransformerConfig,
        losses: GeneratorLossConfig,
        run: RunConfig,
        cache: TokenCache,
        validation: TokenCache,
        model: LoadedModel,
        data_key: str,
        prompts: Sequence[str] = (),
    ) -> None:
        """`model` has the frozen tokenizer and text encoder; its transformer is the one trained."""
        self.config, self.losses, self.run = config, losses, run
        self.cache, self.validation, self.data_key = cache, validation, data_key
        self.model, self.prompts = model, list(prompts)
        self.transformer = model.transformer

    @property
    def tokenizer(self) -> HybridTokenizer:
        return self.model.tokenizer

    @property
    def parts(self) -> list[Part]:
        return [Part("transformer", self.transformer, self.loss)]

    @property
    def identity(self) -> dict[str, Any]:
        settings = {"transformer": self.config, "losses": self.losses, "run": self.run}
        return {"data": self.data_key} | {
            name: json.loads(json.dumps(configs.to_dict(value))) for name, value in settings.items()
        }

    @property
    def gathered(self) -> dict[str, Tensor]:
        return {}

    def loss(self, step: int) -> StepLoss:
        rows = torch.tensor(batch_indices(len(self.cache.ids_NL), self.run.batch_size, step, self.run.seed))
        early = step < self.losses.coarse_until * self.run.steps
        share = self.losses.coarse_share if early else 0.0
        with torch.autocast("cpu", torch.bfloat16, enabled=self.run.bf16):
            return self.batch_loss(self.cache, rows, dropout=self.losses.condition_dropout, coarse_share=share)

    def batch_loss(
        self, cache: TokenCache, rows: Int[Tensor, " b"], *, dropout: float = 0.0, coarse_share: float = 0.0
    ) -> StepLoss:
        """Loss of some images, each with one of its captions at random."""
        schedule, transformer = self.transformer.schedule, self.transformer
        ids_BL = cache.ids_NL[rows].long()
        ids = ids_BL.split(schedule.lengths, 1)
        draw = torch.rand(len(rows))
        captions = cache.first_caption_N[rows] + (draw * cache.num_captions_N[rows]).long()
        context = drop_condition(cache.context(captions), dropout)
        scales = len(schedule)
        if bool(torch.rand(()) < coarse_share):
            scales -= self.losses.coarse_dropped
        full = scales == len(schedule)
        last_length = schedule.lengths[-1]
        kept_Bm = None
        if full and self.losses.subsample_last_scale:
            kept_Bm = kept_positions(len(rows), last_length, kept_count(last_length, drop_ratio()))

        quantizer = self.tokenizer.quantizer
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            input_BLC = quantizer.teacher_forcing_input(ids, schedule)[:, : sum(schedule.lengths[1:scales])]
        condition = transformer.prepare(context)
        output = transformer.forward_all(input_BLC, condition, kept_Bm)
        logits_BTV = transformer.logits(output.hidden_BTD, condition)

        last_ids_Bm, last_BmC = ids[-1], cache.last_scale_NmC[rows]
        if kept_Bm is not None:
            last_ids_Bm = last_ids_Bm.gather(1, kept_Bm)
            last_BmC = last_BmC.gather(1, kept_Bm[..., None].expand(-1, -1, last_BmC.shape[-1]))
        targets = [*ids[:-1], last_ids_Bm][:scales]
        target_BT = torch.cat(targets, 1)
        per_token_BT = F.cross_entropy(
            logits_BTV.transpose(1, 2), target_BT, reduction="none", label_smoothing=self.losses.label_smoothing
        )
        lengths = [ids_Bl.shape[1] for ids_Bl in targets]
        weight_T = torch.tensor([length**-self.losses.scale_weight_power for length in lengths for _ in range(length)])
        loss = (per_token_BT * weight_T).sum(1).mean() / weight_T.sum()
        logs = {"cross_entropy": per_token_BT.mean().item()} if full else {}
        start = 0
        for k, length in enumerate(lengths):
            logs[f"cross_entropy_{k}"] = per_token_BT[:, start : start + length].mean().item()
            start += length

        if full and self.config.residual is not None and self.losses.residual > 0:
            m = last_ids_Bm.shape[1]
            with torch.no_grad():
                uniform_Bm = torch.rand(len(rows), m, dtype=torch.float64)
                sampled_Bm = sample_ids(logits_BTV[:, -m:].detach(), REPAIR, len(schedule) - 1, uniform_Bm)
                code_BmC = quantizer.lookup(sampled_Bm)
            z_BmD = transformer.residual_condition(output.last_scale_BmD, code_BmC)
            residual = self._residual_loss(z_BmD, last_BmC - code_BmC)
            loss = loss + self.losses.residual * residual
            logs["residual"] = residual.item()
        return StepLoss(loss, {"loss" if full else "coarse_loss": loss.item(), **logs})

    def _residual_loss(self, z_BmD: Tensor, target_BmC: Tensor) -> Tensor:
        assert self.config.residual is not None
        repeats = self.losses.diffusion_repeats
        z_ND = z_BmD.flatten(0, 1).repeat(repeats, 1)
        x0_NC = target_BmC.flatten(0, 1).repeat(repeats, 1) / self.config.residual.target_scale
        schedule = training_schedule()
        t_N = torch.randint(len(schedule), (len(x0_NC),))
        noise_NC = torch.randn_like(x0_NC)
        mlp = self.transformer.residual_mlp
        losses = diffusion_loss(lambda x, t: mlp(x, t, z_ND), x0_NC, t_N, noise_NC, schedule)
        return losses.total_N.mean()

    def after_step(self, step: int) -> None:
        pass

    def pictures(self, directory: Path, step: int) -> dict[str, float]:
        """A grid of the fixed prompts, and the losses on held-out images."""
        if self.prompts and self.model.text_encoder is not None:
            rows = []
            for i in range(0, len(self.prompts), 8):
                prompts = self.prompts[i : i + 8]
                context = self.model.text_encoder.encode(prompts)
                scales = generate_scales(
                    self.transformer,
                    self.tokenizer.quantizer,
                    context,
                    unconditional_context(context),
                    self.model.settings,
                    ImageNoise(range(len(prompts))),
                )
                *_, result = scales
                images = self.tokenizer.decode_latent(result.f_hat_BChw)
                rows.append([to_uint8(image) for image in images])
            save_grid(directory / f"samples_{step:07d}.png", rows)
        torch.manual_seed(self.run.seed)
        logs: dict[str, list[float]] = {}
        for rows_B in torch.arange(len(self.validation.ids_NL)).split(64):
            for key, value in self.batch_loss(self.validation, rows_B).logs.items():
                logs.setdefault(f"validation_{key}", []).append(value)
        return {key: sum(values) / len(values) for key, values in logs.items()}

    def export(self, directory: Path) -> None:
        save_model(self.model, directory / "model", torch.bfloat16)


def drop_condition(context: TextContext, probability: float) -> TextContext:
    """Replace rows by the unconditional context, exactly as generation has it, with this probability."""
    dropped_B = torch.rand(len(context)) < probability
    empty = unconditional_context(context)
    return TextContext(
        torch.where(dropped_B[:, None, None], empty.states_BSC, context.states_BSC),
        torch.where(dropped_B[:, None], empty.mask_BS, context.mask_BS),
        torch.where(dropped_B[:, None], empty.position_ids_BS, context.position_ids_BS),
    )


def residual_scale(cache: TokenCache, quantizer: Quantizer) -> float:
    """A target scale for residual diffusion: it holds 99.9 % of the residuals within ±0.8, two digits."""
    last_length = cache.last_scale_NmC.shape[1]
    codes_NmC = quantizer.lookup(cache.ids_NL[:, -last_length:].long())
    residual = (cache.last_scale_NmC - codes_NmC).abs().flatten()
    rank = max(1, int(0.999 * len(residual)))
    return float(f"{residual.kthvalue(rank).values.item() / 0.8:.2g}")
