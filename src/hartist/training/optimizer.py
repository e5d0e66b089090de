"""Learning-rate schedules, optimisers and the exponential moving average of the weights"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hartist.training.config import OptimizerConfig
from hartist.training.muon import Muon, hidden_matrices
from hartist.training.parallel import local


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The rate of one step: linear warm-up to the peak, then the schedule.

    cosine: down to `final_fraction` of the peak along half a cosine. constant: the peak. wsd (warm-up,
    stable, decay): the peak until the last fifth of the run, then a straight line down to `final_fraction`.
    """
    peak, floor = config.learning_rate, config.final_fraction
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    progress = min((step - config.warmup_steps) / max(steps - config.warmup_steps, 1), 1.0)
    if config.schedule == "constant":
        return peak
    if config.schedule == "wsd":
        return peak * (1 - (1 - floor) * max(progress - 0.8, 0) / 0.2)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW or Muon; weight decay on matrices and kernels only, not on biases, norms or tables of one row."""
    matrices = list(hidden_matrices(module)) if config.kind == "muon" else []
    others = [p for p in module.parameters() if p.requires_grad and not any(p is m for m in matrices)]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    rate, betas = config.learning_rate, config.betas
    if config.kind == "muon":
        return Muon(matrices, groups, lr=rate, weight_decay=config.weight_decay, betas=betas)
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)


def moment_names(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> tuple[str, ...]:
    """What the optimiser keeps of a parameter; all but `step` have the parameter's shape."""
    if isinstance(optimizer, Muon) and p in optimizer.matrices:
        return ("momentum_buffer",)
    return ("step", "exp_avg", "exp_avg_sq")


class ExponentialAverage:
    """float32 moving average of the trained parameters, with a warm-up so that it follows early training.

    Sharded like the weights: each rank averages its part.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: p.detach().float().clone() for name, p in _trained(module)}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        shadows, values = [], []
        for name, p in _trained(module):
            shadows.append(local(self.shadow[name]))
            values.append(local(p.detach()).float())
        torch._foreach_lerp_(shadows, values, 1 - decay)

    @contextlib.contextmanager
    def swapped_into(self, module: nn.Module) -> Iterator[None]:
        """`module` in evaluation mode with the averaged weights, for as long as the block runs."""
        previous: dict[str, Tensor] = {}
        training = module.training
        with torch.no_grad():
            for name, p in _trained(module):
                previous[name] = local(p).clone()
                local(p).copy_(local(self.shadow[name]))
        module.eval()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in _trained(module):
                    local(p).copy_(previous[name])
            module.train(training)


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]
