"""Multiply–accumulate operations (MACs) of a generation, counted by PyTorch's FLOP counter

Networks are built without storage, so nothing is computed and the largest take seconds. What is counted is the model
as its equations have it, by the plain path: a faster path that saves some of that work reaches more of the peak.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from hartist.config import TokenizerConfig, TransformerConfig
from hartist.generation.sampling import SamplingSettings
from hartist.generation.shortcuts import attended_spans, plan_guidance
from hartist.scales import ScaleSchedule
from hartist.text.encoder import TextContext
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.transformer.model import ScaleTransformer

ATTENTION = ("bmm", "baddbmm", "attention")
"""Names of operators that multiply queries, keys and values; layers with weights run as mm, addmm and convolution."""


@dataclass(frozen=True)
class Macs:
    """Multiply–accumulate operations: half the FLOPs."""

    total: float = 0.0
    attention: float = 0.0
    """The products of queries with keys and of weights with values, within the total."""

    def __add__(self, other: Macs) -> Macs:
        return Macs(self.total + other.total, self.attention + other.attention)

    def __mul__(self, times: float | int) -> Macs:
        return Macs(self.total * times, self.attention * times)

    @property
    def flops(self) -> float:
        return 2 * self.total


@dataclass(frozen=True)
class Work:
    """MACs of one batch of images, part by part."""

    scales: tuple[Macs, ...]
    """Prefix and scale 1, scale 2, …, head included; of both branches where they are guided."""
    shared_prefix: Macs
    """The unconditional branch's prefix: run once for a model, so no part of the scales."""
    residual: Macs
    decode: Macs

    @property
    def transformer(self) -> Macs:
        """All scales of one batch."""
        return sum(self.scales, Macs())

    @property
    def total(self) -> Macs:
        """Everything a batch takes once the unconditional prefix is there."""
        return self.transformer + self.residual + self.decode


def count_macs(run: Callable[[], Any]) -> Macs:
    """MACs of whatever `run` computes: matrix products and convolutions; element by element is free.

    On the meta device nothing is computed, and attention runs as two products that are counted. On a CPU its fused
    kernel counts as well. What compiled or custom kernels do is not seen.
    """
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=fused) as counter:
        run()
    flops = {str(op): float(count) for op, count in counter.get_flop_counts().get("Global", {}).items()}
    attention = sum(count for op, count in flops.items() if _is_attention(op))
    return Macs(sum(flops.values()) / 2, attention / 2)


def _is_attention(op: str) -> bool:
    name = op.split(".", 1)[-1]
    return name in ATTENTION or "attention" in name


def _sdpa_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def generation_work(
    tokenizer: TokenizerConfig,
    transformer: TransformerConfig,
    schedule: ScaleSchedule | None = None,
    *,
    settings: SamplingSettings | None = None,
    batch: int = 1,
) -> Work:
    """MACs of one batch with these sampling settings: guidance doubles what it covers, shortcuts leave work out.

    Bicubic upsampling, φ and sampling are left out: below a thousandth.
    """
    work = _image_work(tokenizer, transformer, schedule or transformer.schedule, settings or SamplingSettings())
    scales = tuple(macs * batch for macs in work.scales)
    return Work(scales, work.shared_prefix, work.residual * batch, work.decode * batch)


@functools.cache
def _image_work(
    tokenizer: TokenizerConfig, transformer: TransformerConfig, schedule: ScaleSchedule, settings: SamplingSettings
) -> Work:
    """Of one image. Seconds for the largest models, hence kept."""
    with torch.device("meta"):
        network = ScaleTransformer(transformer)
        network.use_schedule(schedule)
        decoder = HybridTokenizer(tokenizer)
        f_hat_1Chw = torch.empty(1, tokenizer.latent_channels, *schedule.finest)
        decode = count_macs(lambda: decoder.decode_latent(f_hat_1Chw))
        cells = max(1, math.ceil(settings.last_scale_share * schedule.lengths[-1]))
        plan = plan_guidance(settings, len(network.schedule), has_residual=network.config.residual is not None)
        branch = _branch_work(network, settings, cells)
        residual = _residual_work(network, settings, cells) * (1 + (plan.residual > 0))
    scales = [branch[0]]  # the other branch's prefix is shared
    scales += [branch[k] * (1 + (k < plan.guided_scales)) for k in range(1, len(schedule))]
    return Work(tuple(scales), branch[0] if plan.guided_scales else Macs(), residual, decode)


def _branch_work(network: ScaleTransformer, settings: SamplingSettings, cells: int) -> list[Macs]:
    """MACs of every scale for one image and one branch; the condition's projection goes with the first."""
    config, schedule = network.config, network.schedule
    condition, cache = network.prepare(_empty_condition(config)), network.new_cache(1)
    counted = []
    for k in range(len(schedule)):
        input_1lC = torch.empty(1, schedule.lengths[k], config.latent_channels) if k else None
        kept_1m = torch.arange(cells)[None] if k and schedule.is_last(k) and settings.last_scale_share < 1 else None
        spans = attended_spans(schedule, config.prefix_tokens, k, settings.attended_scales)
        forward = functools.partial(network.forward_scale, k, input_1lC, condition, cache, spans=spans, kept_Bm=kept_1m)
        counted.append(count_macs(lambda: network.logits(forward(), condition)))  # noqa: B023 (called at once)
    counted[0] += count_macs(lambda: network.prepare(_empty_condition(config)))
    return counted


def _residual_work(network: ScaleTransformer, settings: SamplingSettings, cells: int) -> Macs:
    """MACs of the residual tokens of one image and one branch."""
    config, C = network.config.residual, network.config.latent_channels
    if config is None or not settings.residual:
        return Macs()
    hidden_1lD = torch.empty(1, cells, network.config.width)

    def prepare() -> Tensor:
        z_1lD = network.residual_condition(hidden_1lD, torch.empty(1, cells, C))
        return network.residual_mlp.condition_embed(z_1lD.flatten(0, 1))

    time_1W, condition_NW = torch.empty(1, config.width), prepare()
    step = count_macs(lambda: network.residual_mlp.predict(torch.empty(cells, C), time_1W, condition_NW))
    return count_macs(prepare) + step * (settings.diffusion_steps or config.steps)


def _empty_condition(config: TransformerConfig) -> TextContext | Tensor:
    if config.condition == "class":
        return torch.zeros(1, dtype=torch.long)
    S = config.context_tokens
    return TextContext(torch.empty(1, S, config.context_dim), torch.ones(1, S, dtype=torch.bool), torch.arange(S)[None])
