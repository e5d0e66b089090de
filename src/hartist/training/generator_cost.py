"""What a step of generator training costs, counted on a network without storage"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hartist.config import TransformerConfig
from hartist.scales import ScaleSchedule
from hartist.text.encoder import TextContext
from hartist.training.config import GeneratorLossConfig
from hartist.training.cost import BACKWARD, forward_flops
from hartist.training.subsampling import MEAN_DROP, kept_count
from hartist.transformer.model import ScaleTransformer, TeacherForced


@functools.cache
def step_flops(
    config: TransformerConfig, schedule: ScaleSchedule, losses: GeneratorLossConfig, scales: int | None = None
) -> float:
    """Operations of forward and backward pass for one image that sees the first `scales` scales.

    The number of kept cells of the last scale is the mean one.
    """
    scales = scales or len(schedule)

    def run(network: nn.Module) -> None:
        assert isinstance(network, ScaleTransformer)
        output, _ = empty_pass(network, schedule, losses, 1, scales)
        if scales == len(schedule) and config.residual is not None and losses.residual > 0:
            codes_BmC = torch.empty(*output.last_scale_BmD.shape[:2], config.latent_channels)
            z_BmD = network.residual_condition(output.last_scale_BmD, codes_BmC)
            z_ND = z_BmD.flatten(0, 1).repeat(losses.diffusion_repeats, 1)
            x_NC = torch.empty(len(z_ND), config.latent_channels)
            network.residual_mlp(x_NC, torch.empty(len(z_ND), dtype=torch.long), z_ND)

    return (1 + BACKWARD) * forward_flops(lambda: ScaleTransformer(config), run)


def mean_kept(schedule: ScaleSchedule, losses: GeneratorLossConfig) -> int:
    """Cells of the last scale that training sees on average."""
    tokens = schedule.lengths[-1]
    if not losses.subsample_last_scale:
        return tokens
    return kept_count(tokens, MEAN_DROP if losses.drop_share is None else losses.drop_share)


def empty_pass(
    network: ScaleTransformer, schedule: ScaleSchedule, losses: GeneratorLossConfig, images: int, scales: int
) -> tuple[TeacherForced, Float[Tensor, "b t v"]]:
    """The teacher-forced pass over images without content, on the network's device; hidden states and logits."""
    network.use_schedule(schedule)
    with torch.device(network.word_embed.weight.device):
        condition = network.prepare(empty_condition(network.config, images))
        input_BLC = torch.zeros(images, sum(schedule.lengths[1:scales]), network.config.latent_channels)
        kept_Bm = torch.arange(mean_kept(schedule, losses)).expand(images, -1) if scales == len(schedule) else None
        output = network.forward_all(input_BLC, condition, kept_Bm)
        return output, network.logits(output.hidden_BTD, condition)


def empty_condition(config: TransformerConfig, images: int) -> TextContext | Tensor:
    """A condition of images without content, on the device that is the default."""
    if config.condition == "class":
        return torch.zeros(images, dtype=torch.long)
    S = config.context_tokens
    return TextContext(
        torch.zeros(images, S, config.context_dim),
        torch.ones(images, S, dtype=torch.bool),
        torch.arange(S).expand(images, -1),
    )
