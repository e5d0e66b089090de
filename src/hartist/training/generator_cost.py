"""What a step of generator training costs, counted on a network without storage"""

from __future__ import annotations

import functools

import torch
from torch import nn

from hartist.config import TransformerConfig
from hartist.scales import ScaleSchedule
from hartist.text.encoder import TextContext
from hartist.training.config import GeneratorLossConfig
from hartist.training.cost import BACKWARD, forward_flops
from hartist.training.subsampling import MEAN_DROP, kept_count
from hartist.transformer.model import ScaleTransformer


@functools.cache
def step_flops(
    config: TransformerConfig, schedule: ScaleSchedule, losses: GeneratorLossConfig, scales: int | None = None
) -> float:
    """Operations of forward and backward pass for one image that sees the first `scales` scales.

    The number of kept cells of the last scale is the mean one.
    """
    scales = scales or len(schedule)
    full = scales == len(schedule)
    kept = schedule.lengths[-1]
    if losses.subsample_last_scale:
        kept = kept_count(kept, MEAN_DROP if losses.drop_share is None else losses.drop_share)

    def run(network: nn.Module) -> None:
        assert isinstance(network, ScaleTransformer)
        network.use_schedule(schedule)
        condition = network.prepare(empty_condition(config))
        tokens = sum(schedule.lengths[1:scales])
        kept_Bm = torch.empty(1, kept, dtype=torch.long) if full else None
        output = network.forward_all(torch.empty(1, tokens, config.latent_channels), condition, kept_Bm)
        network.logits(output.hidden_BTD, condition)
        if full and config.residual is not None and losses.residual > 0:
            z_BmD = network.residual_condition(output.last_scale_BmD, torch.empty(1, kept, config.latent_channels))
            z_ND = z_BmD.flatten(0, 1).repeat(losses.diffusion_repeats, 1)
            x_NC = torch.empty(len(z_ND), config.latent_channels)
            network.residual_mlp(x_NC, torch.empty(len(z_ND), dtype=torch.long), z_ND)

    return (1 + BACKWARD) * forward_flops(lambda: ScaleTransformer(config), run)


def empty_condition(config: TransformerConfig) -> TextContext | torch.Tensor:
    """A condition of one image without content, on the device that is the default."""
    if config.condition == "class":
        return torch.zeros(1, dtype=torch.long)
    S = config.context_tokens
    return TextContext(
        torch.zeros(1, S, config.context_dim),
        torch.ones(1, S, dtype=torch.bool),
        torch.arange(S)[None],
    )
