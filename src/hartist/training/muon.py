"""Muon: momentum whose update is made orthogonal, for the matrices and kernels between a network's edges

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/), with the step size of Liu et al. 2025
(arXiv:2502.16982), which makes it as long as AdamW's, so that both share a learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.conv import _ConvNd

from hartist.precision import computes_bf16

EDGES = ("encoder.conv_in", "decoder.conv_out", "head.linear", "final.linear")
"""Layers at pixels, logits and noise: their rows mean something by themselves, so AdamW keeps them."""

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Newton–Schulz polynomial that brings singular values near 1 in five rounds, in bfloat16."""

TOGETHER = 2**23
"""How many numbers are made orthogonal in one go, if that is more than one matrix."""


def hidden_matrices(module: nn.Module) -> Iterator[nn.Parameter]:
    """The trained weights of linear layers and convolutions, without those at the edges (and without tables)."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | _ConvNd) and not name.endswith(EDGES):
            weight = layer.get_parameter("weight")
            if weight.requires_grad:
                yield weight


def orthogonalise(update_PMN: Float[Tensor, "p m n"], rounds: int = 5) -> Float[Tensor, "p m n"]:
    """The nearest (semi-)orthogonal matrices, roughly: singular values between 0.7 and 1.2.

    In bfloat16 where that pays.
    """
    a, b, c = QUINTIC
    tall = update_PMN.shape[1] > update_PMN.shape[2]
    x = update_PMN.mT if tall else update_PMN
    x = x.bfloat16() if computes_bf16(x.device) else x.float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(rounds):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for `matrices`, AdamW for the other groups, with one learning rate."""

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        momentum: float = 0.95,
    ) -> None:
        """`others`: parameter groups as AdamW takes them."""
        super().__init__([{"params": matrices, "weight_decay": weight_decay}, *others], {"lr": lr})
        self.momentum = momentum
        self.matrices = frozenset(matrices)
        # The same groups and the same state: who sets a rate or saves moments sees one optimiser.
        self._adamw = torch.optim.AdamW(self.param_groups[1:], lr=lr, betas=betas, fused=True)
        self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of all parameters that have a gradient; a closure is not supported."""
        assert closure is None
        group = self.param_groups[0]
        rate, decay = group["lr"], group["weight_decay"]
        for parameters in _alike([p for p in group["params"] if p.grad is not None]):
            updates = []
            for p in parameters:
                assert p.grad is not None
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["momentum_buffer"].lerp_(p.grad, 1 - self.momentum)
                updates.append(p.grad.lerp(state["momentum_buffer"], self.momentum))
            for p, direction in zip(parameters, _directions(updates), strict=True):
                p.mul_(1 - rate * decay).sub_(direction, alpha=rate)
        self._adamw.step()


def _alike(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one shape, as many as are small enough to be made orthogonal in one go.

    Small products side by side use a machine better.
    """
    by_shape: dict[torch.Size, list[nn.Parameter]] = {}
    for p in parameters:
        by_shape.setdefault(p.shape, []).append(p)
    for shape, same in by_shape.items():
        count = max(1, TOGETHER // shape.numel())
        for start in range(0, len(same), count):
            yield same[start : start + count]


def _directions(updates: list[Tensor]) -> list[Tensor]:
    """The steps for matrices or kernels (as out × everything else), about as long as AdamW's: RMS 0.2."""
    # A sharded matrix is orthogonalised whole, by every rank.
    wholes = [update.full_tensor() if isinstance(update, DTensor) else update for update in updates]
    shape = wholes[0].shape
    matrices_PMN = orthogonalise(torch.stack([whole.reshape(len(whole), -1) for whole in wholes]))
    directions_PMN = matrices_PMN.float() * (0.2 * max(matrices_PMN.shape[1:]) ** 0.5)
    directions = [matrix_MN.reshape(shape) for matrix_MN in directions_PMN]
    return [
        distribute_tensor(direction, update.device_mesh, update.placements, src_data_rank=None)
        if isinstance(update, DTensor)
        else direction
        for direction, update in zip(directions, updates, strict=True)
    ]
