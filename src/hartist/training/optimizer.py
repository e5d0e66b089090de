"""Learning-rate schedule, AdamW groups and the exponential moving average of the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hartist.training.config import OptimizerConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Linear warm-up to the peak, then a cosine down to `final_fraction` of it at the last step."""
    peak = config.learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    progress = min((step - config.warmup_steps) / max(steps - config.warmup_steps, 1), 1.0)
    floor = config.final_fraction
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices and kernels only, not on biases, norms or tables of one row."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


class ExponentialAverage:
    """float32 moving average of a module's parameters, with a warm-up so that it follows early training."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: p.detach().float().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        shadows, values = [], []
        for name, p in module.named_parameters():
            shadows.append(self.shadow[name])
            values.append(p.detach().float())
        torch._foreach_lerp_(shadows, values, 1 - decay)

    @torch.no_grad()
    def swap_into(self, module: nn.Module) -> dict[str, Tensor]:
        """Put the averaged weights into `module`; returns the weights that were there."""
        previous = {}
        for name, p in module.named_parameters():
            previous[name] = p.detach().clone()
            p.copy_(self.shadow[name])
        return previous


@torch.no_grad()
def restore(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Undo `swap_into`."""
    for name, p in module.named_parameters():
        p.copy_(weights[name])
