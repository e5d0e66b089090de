"""Generator stage: cross-entropy on the tokens, residual diffusion on the last scale (paper sections 3.2, 3.3)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from hartist import config as configs
from hartist.errors import UserError
from hartist.files import clear_temporaries
from hartist.generation.checkpoint import LoadedModel, save_model
from hartist.generation.sampling import SamplingSettings, sample_ids
from hartist.precision import autocast
from hartist.residual.loss import diffusion_loss
from hartist.residual.schedule import training_schedule
from hartist.scales import ScaleSchedule
from hartist.text.encoder import TextContext, unconditional_context
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.tokenizer.quantizer import Quantizer
from hartist.training.batches import MicroBatch
from hartist.training.config import GeneratorLossConfig, RunConfig
from hartist.training.generator_cost import step_flops
from hartist.training.generator_pictures import draw_samples
from hartist.training.loop import Part, StatelessStage, StepLoss
from hartist.training.lora import merged
from hartist.training.parallel import World
from hartist.training.subsampling import drop_ratio, kept_count, kept_positions
from hartist.training.token_shards import Cache, TokenCache, spread_rows
from hartist.transformer.block_causal import keep_out_of_compiled_blocks
from hartist.transformer.model import ScaleTransformer

REPAIR = SamplingSettings(top_k=600, top_p=0.96)
"""How the last scale's ids are sampled for the residual targets."""
VALIDATION_BATCH = 32
VALIDATION_IMAGES = 512


@dataclass(frozen=True)
class TrainingPhase:
    """A part of the run at one resolution, with its data."""

    first_step: int
    batch_size: int
    schedule: ScaleSchedule
    scales: int
    """How many of the schedule's scales are trained."""
    cache: Cache
    validation: Cache | None = None


class GeneratorStage(StatelessStage):
    """A transformer over cached tokens and conditions; the tokenizer is frozen."""

    def __init__(
        self,
        losses: GeneratorLossConfig,
        run: RunConfig,
        phases: Sequence[TrainingPhase],
        model: LoadedModel,
        data_key: str,
        *,
        prompts: Sequence[str] = (),
        world: World | None = None,
    ) -> None:
        """`model` has the frozen tokenizer and text encoder; its transformer is the one trained.

        Each phase's first step must be later than the one before's; the first is 0.
        """
        self.losses, self.run, self.phases, self.data_key = losses, run, list(phases), data_key
        self.world = world or World()
        self.device = self.world.device
        self.prompts = list(prompts)
        self.transformer = model.transformer.to(self.device)
        self.transformer.activation_checkpointing = run.activation_checkpointing
        if run.compile:
            keep_out_of_compiled_blocks()
            for block in self.transformer.blocks:
                block.compile(dynamic=True)  # the number of kept cells changes from step to step
        self.quantizer = model.tokenizer.quantizer.to(self.device)
        self.model = model

    @property
    def tokenizer(self) -> HybridTokenizer:
        return self.model.tokenizer

    @property
    def parts(self) -> list[Part]:
        # The modulations are needed before the blocks run, so they are units of their own, inside those of the blocks.
        units: list[nn.Module] = []
        for block in self.transformer.blocks:
            units += [m for m in (block.modulation, block) if isinstance(m, nn.Module)]
        return [Part("transformer", self.transformer, self.loss, units=units)]

    @property
    def identity(self) -> dict[str, Any]:
        phases = [
            [p.first_step, p.batch_size, p.scales, [list(grid) for grid in p.schedule.grids]] for p in self.phases
        ]
        return {
            "data": self.data_key,
            "transformer": configs.to_json(self.transformer.config),
            "losses": configs.to_json(self.losses),
            "run": self.run.identity,
            "phases": phases,
        }

    def phase_at(self, step: int) -> TrainingPhase:
        return [phase for phase in self.phases if phase.first_step <= step][-1]

    def batch_at(self, step: int) -> tuple[int, int]:
        phase = self.phase_at(step)
        return phase.batch_size, phase.first_step

    def flops(self, step: int) -> float:
        """With the mean number of kept cells, of a full or a coarse step."""
        phase = self.phase_at(step)
        scales = self._scales(MicroBatch(step, 0, 1, 1, self.run.seed), phase)
        return step_flops(self.transformer.config, phase.schedule, self.losses, scales) * phase.batch_size

    def _scales(self, micro: MicroBatch, phase: TrainingPhase) -> int:
        """How many scales the step sees: one draw for its whole batch."""
        early = micro.step < self.losses.coarse_until * self.run.steps
        coarse = bool(torch.rand((), generator=micro.generator(stream=2)) < self.losses.coarse_share)
        return max(1, phase.scales - self.losses.coarse_dropped) if early and coarse else phase.scales

    def loss(self, micro: MicroBatch) -> StepLoss:
        phase = self.phase_at(micro.step)
        self.transformer.use_schedule(phase.schedule)
        batch = phase.cache.rows(torch.tensor(micro.rows(len(phase.cache))))
        kept = None
        scales = self._scales(micro, phase)
        if scales == len(phase.schedule) and self.losses.subsample_last_scale:
            share = self.losses.drop_share
            ratio = drop_ratio(micro.generator(stream=9)) if share is None else share
            kept = kept_count(phase.schedule.lengths[-1], ratio)
        with autocast(self.device, self.run.bf16):
            return self.batch_loss(
                self.transformer, batch, scales=scales, kept=kept, dropout=self.losses.condition_dropout
            )

    def batch_loss(
        self,
        transformer: ScaleTransformer,
        batch: TokenCache,
        *,
        scales: int,
        kept: int | None = None,
        dropout: float = 0.0,
    ) -> StepLoss:
        """Loss of some images, each with one of its captions at random, on the first `scales` scales.

        `kept` is how many cells of the last scale are seen (None: all).
        """
        schedule, device = transformer.schedule, self.device
        ids = batch.ids_NL.long().to(device).split(schedule.lengths, 1)
        rows, full = len(batch), scales == len(schedule)
        condition = transformer.prepare(self.condition(batch, dropout))
        kept_Bm = kept_positions(rows, schedule.lengths[-1], kept).to(device) if full and kept is not None else None
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            input_BLC = self.quantizer.teacher_forcing_input(ids, schedule)[:, : sum(schedule.lengths[1:scales])]
        output = transformer.forward_all(input_BLC, condition, kept_Bm)
        logits_BTV = transformer.logits(output.hidden_BTD, condition)

        last_ids_Bm, last_BmC = ids[-1], batch.last_scale_NmC.to(device)
        if kept_Bm is not None:
            last_ids_Bm = last_ids_Bm.gather(1, kept_Bm)
            last_BmC = last_BmC.gather(1, kept_Bm[..., None].expand(-1, -1, last_BmC.shape[-1]))
        targets = [*ids[:-1], last_ids_Bm][:scales]
        loss, logs = self._cross_entropy(logits_BTV, targets)
        if full:
            logs["cross_entropy"] = logs.pop("mean")
        else:
            del logs["mean"]
        if full and transformer.config.residual is not None and self.losses.residual > 0:
            m = last_ids_Bm.shape[1]
            with torch.no_grad():
                uniform_Bm = torch.rand(rows, m, dtype=torch.float64).to(device)
                sampled_Bm = sample_ids(logits_BTV[:, -m:].detach(), REPAIR, len(schedule) - 1, uniform_Bm)
                code_BmC = self.quantizer.lookup(sampled_Bm)
            z_BmD = transformer.residual_condition(output.last_scale_BmD, code_BmC)
            residual = self._residual_loss(transformer, z_BmD, last_BmC - code_BmC)
            loss = loss + self.losses.residual * residual
            logs["residual"] = residual.item()
        return StepLoss(loss, {"loss" if full else "coarse_loss": loss.item(), **logs})

    def _cross_entropy(self, logits_BTV: Tensor, targets: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        """The weighted loss; the plain mean, of all tokens and scale by scale."""
        smoothing = self.losses.label_smoothing
        target_BT = torch.cat(targets, 1)
        per_token_BT = F.cross_entropy(
            logits_BTV.flatten(0, 1), target_BT.flatten(), reduction="none", label_smoothing=smoothing
        ).view(target_BT.shape)
        lengths = [ids_Bl.shape[1] for ids_Bl in targets]
        weights = [length**-self.losses.scale_weight_power for length in lengths for _ in range(length)]
        weight_T = torch.tensor(weights, device=per_token_BT.device)
        loss = (per_token_BT * weight_T).sum(1).mean() / weight_T.sum()
        by_scale = [part.mean() for part in per_token_BT.detach().split(lengths, 1)]
        figures = torch.stack([per_token_BT.detach().mean(), *by_scale]).tolist()  # one wait for the device
        return loss, {"mean": figures[0], **{f"cross_entropy_{k}": x for k, x in enumerate(figures[1:])}}

    def condition(self, batch: TokenCache, dropout: float) -> TextContext | Int[Tensor, " b"]:
        """A caption (or the class) of every image; some replaced by the unconditional one."""
        draw_N = torch.rand(len(batch))
        config = self.transformer.config
        if config.condition == "class":
            dropped_N = torch.rand(len(batch)) < dropout
            if batch.label_N is None:
                raise UserError("a class-conditional generator needs the images' classes, and the data has none")
            return torch.where(dropped_N, config.num_classes, batch.label_N).to(self.device)
        return drop_condition(batch.drawn_context(draw_N), dropout).to(self.device)

    def _residual_loss(self, transformer: ScaleTransformer, z_BmD: Tensor, target_BmC: Tensor) -> Tensor:
        config = transformer.config.residual
        assert config is not None
        repeats = self.losses.diffusion_repeats
        z_ND = z_BmD.flatten(0, 1).repeat(repeats, 1)
        x0_NC = target_BmC.flatten(0, 1).repeat(repeats, 1) / config.target_scale
        schedule = training_schedule()
        t_N = torch.randint(len(schedule), (len(x0_NC),)).to(self.device)
        noise_NC = torch.randn(x0_NC.shape).to(self.device)
        mlp = transformer.residual_mlp
        losses = diffusion_loss(lambda x, t: mlp(x, t, z_ND), x0_NC, t_N, noise_NC, schedule)
        return losses.total_N.mean()

    def pictures(self, networks: Mapping[str, nn.Module], directory: Path, step: int) -> dict[str, float]:
        """A grid of the fixed prompts, and the losses on held-out images."""
        transformer = networks["transformer"]
        assert isinstance(transformer, ScaleTransformer)
        transformer = merged(transformer)
        phase = self.phase_at(max(step - 1, 0))
        transformer.use_schedule(phase.schedule)
        model = replace(self.model, transformer=transformer)
        draw_samples(model, self.prompts, directory / f"samples_{step:07d}.png", phase.scales)
        torch.manual_seed(self.run.seed)
        logs: dict[str, list[float]] = {}
        if phase.validation is None:
            return {}
        # Evenly from all held-out images: they may be sorted by subject.
        for rows_B in spread_rows(phase.validation, VALIDATION_IMAGES).split(VALIDATION_BATCH):
            batch = phase.validation.rows(rows_B)
            for key, value in self.batch_loss(transformer, batch, scales=phase.scales).logs.items():
                logs.setdefault(f"validation_{key}", []).append(value)
        return {key: sum(values) / len(values) for key, values in logs.items()}

    def export(self, networks: Mapping[str, nn.Module], directory: Path) -> None:
        transformer = networks["transformer"]
        assert isinstance(transformer, ScaleTransformer)
        clear_temporaries(directory / "model")
        save_model(replace(self.model, transformer=merged(transformer)), directory / "model", torch.bfloat16)


def drop_condition(context: TextContext, probability: float) -> TextContext:
    """Replace rows by the unconditional context, exactly as generation has it, with this probability."""
    dropped_B = torch.rand(len(context)) < probability
    empty = unconditional_context(context)
    return TextContext(
        torch.where(dropped_B[:, None, None], empty.states_BSC, context.states_BSC),
        torch.where(dropped_B[:, None], empty.mask_BS, context.mask_BS),
        torch.where(dropped_B[:, None], empty.position_ids_BS, context.position_ids_BS),
    )


def residual_scale(cache: Cache, quantizer: Quantizer, last_length: int, images: int = 1024) -> float:
    """A target scale for residual diffusion: it holds 99.9 % of the residuals within ±0.8, two digits."""
    batch = cache.rows(spread_rows(cache, images))
    codes_NmC = quantizer.lookup(batch.ids_NL[:, -last_length:].long())
    residual = (batch.last_scale_NmC - codes_NmC).abs().flatten()
    rank = max(1, int(0.999 * len(residual)))
    return float(f"{residual.kthvalue(rank).values.item() / 0.8:.2g}")
