"""A diffusion transformer on a hybrid tokenizer's latents and captions, to compare HART with

PixArt's transformer of `diffusers` (DiT with cross-attention to text and one shared adaLN) learns rectified flow, noise
levels drawn as for Stable Diffusion 3. Batches, captions, optimiser, moving average and checkpoints are those of
HART's own training: `DitStage` runs in its loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor, nn

from hartist.errors import UserError
from hartist.evaluation.bench.macs import Macs, count_macs
from hartist.files import write_bytes
from hartist.precision import autocast
from hartist.scales import ScaleSchedule
from hartist.text.encoder import TextContext, unconditional_context
from hartist.tokenizer.quantizer import Quantizer
from hartist.tokenizer.residual_loop import tokens_to_map
from hartist.training.batches import MicroBatch
from hartist.training.config import RunConfig
from hartist.training.cost import BACKWARD
from hartist.training.generator_stage import VALIDATION_BATCH, drop_condition
from hartist.training.loop import Part, StatelessStage, StepLoss
from hartist.training.token_shards import Cache, TokenCache, spread_rows

WEIGHTS = "dit.safetensors"
CONDITION_DROPOUT = 0.1


@dataclass(frozen=True)
class DitSize:
    heads: int
    depth: int
    head_dim: int = 64


class Dit(nn.Module):
    """Predicts the velocity, noise − latent, of latents that were divided by their standard deviation."""

    def __init__(self, size: DitSize, channels: int, side: int, text_dim: int) -> None:
        super().__init__()
        try:
            from diffusers import PixArtTransformer2DModel
        except ImportError as error:
            raise UserError("the diffusion transformer needs diffusers: pip install 'hartist[peers]'") from error
        self.net = PixArtTransformer2DModel(
            num_attention_heads=size.heads,
            attention_head_dim=size.head_dim,
            in_channels=channels,
            out_channels=channels,
            num_layers=size.depth,
            cross_attention_dim=size.heads * size.head_dim,
            sample_size=side,
            patch_size=1,
            interpolation_scale=1,
            use_additional_conditions=False,
            caption_channels=text_dim,
        )
        nn.init.zeros_(self.net.proj_out.weight)  # as DiT begins: with a velocity of 0
        nn.init.zeros_(self.net.proj_out.bias)
        self.deviation: Tensor
        self.register_buffer("deviation", torch.ones(()))

    def forward(
        self, x_BChw: Float[Tensor, "b c h w"], t_B: Float[Tensor, " b"], context: TextContext
    ) -> Float[Tensor, "b c h w"]:
        """`t_B`: from 0, the latent, to 1, noise."""
        output: Tensor = self.net(
            x_BChw,
            encoder_hidden_states=context.states_BSC,
            encoder_attention_mask=context.mask_BS.to(x_BChw.dtype),
            timestep=1000 * t_B,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output

    @torch.inference_mode()
    def sample(
        self, noise_BChw: Float[Tensor, "b c h w"], context: TextContext, steps: int, guidance: float
    ) -> Float[Tensor, "b c h w"]:
        """Latents from noise by Euler's method, with classifier-free guidance (1: none)."""
        x_BChw = noise_BChw
        other = unconditional_context(context)
        both = TextContext.cat([context, other]) if guidance != 1 else context
        times = torch.linspace(1, 0, steps + 1).tolist()
        for t, following in itertools.pairwise(times):
            inputs = torch.cat([x_BChw] * (len(both) // len(context)))
            velocity = self(inputs, torch.full((len(inputs),), t), both)
            if guidance != 1:
                own, unguided = velocity.chunk(2)
                velocity = unguided + guidance * (own - unguided)
            x_BChw = x_BChw + (following - t) * velocity
        return x_BChw * self.deviation

    def sampling_macs(self, channels: int, side: int, text: tuple[int, int], steps: int, guidance: float) -> Macs:
        """Of one picture's latent."""
        rows = 2 if guidance != 1 else 1
        tokens, dim = text
        context = TextContext(
            torch.zeros(rows, tokens, dim),
            torch.ones(rows, tokens, dtype=torch.bool),
            torch.zeros(rows, tokens, dtype=torch.long),
        )
        return count_macs(lambda: self(torch.zeros(rows, channels, side, side), torch.zeros(rows), context)) * steps


def latents(quantizer: Quantizer, schedule: ScaleSchedule, batch: TokenCache) -> Float[Tensor, "b c h w"]:
    """f of cached images: what all scales but the last have expressed, and what is left for the last."""
    ids = batch.ids_NL.long().split(schedule.lengths, 1)
    *_, step = quantizer.steps_from_ids(ids[:-1], schedule)
    return step.f_hat_BChw + tokens_to_map(batch.last_scale_NmC, schedule.finest)


class DitStage(StatelessStage):
    """Trains on what a generator trains on: a token cache."""

    def __init__(
        self, dit: Dit, quantizer: Quantizer, train: Cache, validation: Cache | None, run: RunConfig, data_key: str
    ) -> None:
        self.dit, self.quantizer, self.run, self.data_key = dit, quantizer.requires_grad_(False), run, data_key
        self.train, self.validation = train, validation
        self.schedule = quantizer.schedule
        some = latents(quantizer, self.schedule, train.rows(spread_rows(train, 512)))
        dit.deviation.fill_(some.std())
        context = train.rows(torch.zeros(1, dtype=torch.long)).drawn_context(torch.zeros(1))
        macs = dit.sampling_macs(*some.shape[1:3], (context.num_tokens, context.dim), 1, 1.0)
        self.step_flops = (1 + BACKWARD) * macs.flops * run.batch_size

    @property
    def parts(self) -> list[Part]:
        return [Part("dit", self.dit, self.loss)]

    @property
    def identity(self) -> dict[str, Any]:
        return {"data": self.data_key, "dit": dict(self.dit.net.config), "run": self.run.identity}

    def batch_at(self, step: int) -> tuple[int, int]:
        return self.run.batch_size, 0

    def flops(self, step: int) -> float:
        return self.step_flops

    def loss(self, micro: MicroBatch) -> StepLoss:
        batch = self.train.rows(torch.tensor(micro.rows(len(self.train))))
        return self.batch_loss(self.dit, batch, CONDITION_DROPOUT)

    def batch_loss(self, dit: Dit, batch: TokenCache, dropout: float) -> StepLoss:
        """Mean square error of the velocity, each image at one time and with one of its captions."""
        context = drop_condition(batch.drawn_context(torch.rand(len(batch))), dropout)
        with torch.no_grad():
            x0 = latents(self.quantizer, self.schedule, batch) / dit.deviation
            t_B = torch.randn(len(batch)).sigmoid()
            noise = torch.randn_like(x0)
            share = t_B[:, None, None, None]
        with autocast(x0.device, self.run.bf16):
            velocity = dit((1 - share) * x0 + share * noise, t_B, context).float()
        loss = (velocity - (noise - x0)).square().mean()
        return StepLoss(loss, {"loss": loss.item()})

    def pictures(self, networks: Mapping[str, nn.Module], directory: Path, step: int) -> dict[str, float]:
        """No pictures; the loss on held-out images."""
        dit = networks["dit"]
        assert isinstance(dit, Dit)
        if self.validation is None:
            return {}
        torch.manual_seed(self.run.seed)
        rows = spread_rows(self.validation, 512).split(VALIDATION_BATCH)
        losses = [self.batch_loss(dit, self.validation.rows(rows_B), 0.0).logs["loss"] for rows_B in rows]
        return {"validation_loss": sum(losses) / len(losses)}

    def export(self, networks: Mapping[str, nn.Module], directory: Path) -> None:
        state = {name: tensor.contiguous() for name, tensor in networks["dit"].state_dict().items()}
        write_bytes(directory / WEIGHTS, save(state))


def load_dit(run: Path, size: DitSize, channels: int, side: int, text_dim: int) -> Dit:
    """What a run has exported."""
    dit = Dit(size, channels, side, text_dim)
    dit.load_state_dict(load_file(run / WEIGHTS))
    return dit.eval().requires_grad_(False)


def image_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Noise that depends on each image's seed alone."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
