"""Initial weights of the transformer for training: VAR's, with near-zero gates."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from hartist.transformer.blocks import Block, GeluMLP, SwiGLU

if TYPE_CHECKING:
    from hartist.transformer.model import ScaleTransformer

STD = 0.02
GATE = 1e-5
MODULATION = 0.5
HEAD = 0.02


@torch.no_grad()
def initialise_weights(model: ScaleTransformer) -> None:
    """Truncated normal; block outputs divided by √(2·depth); the head starts almost uniform."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
    width, depth = model.config.width, model.config.depth
    if model.config.positions == "absolute":
        nn.init.trunc_normal_(model.start_position, std=math.sqrt(1 / width / 3))
        nn.init.trunc_normal_(model.position_embed, std=math.sqrt(1 / width / 3))
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attn.proj.weight.div_(math.sqrt(2 * depth))
        down = block.mlp.down if isinstance(block.mlp, SwiGLU) else block.mlp.fc2
        assert isinstance(block.mlp, SwiGLU | GeluMLP)
        down.weight.div_(math.sqrt(2 * depth))
        if block.modulation is None:
            continue
        if block.modulation.kind == "adaln":
            block.modulation.linear.weight[: 2 * width].mul_(GATE)
            block.modulation.linear.weight[2 * width :].mul_(MODULATION)
        else:
            nn.init.normal_(block.modulation.table, std=width**-0.5)
    model.head.modulation.weight.mul_(MODULATION)
    model.head.linear.weight.mul_(HEAD)
    if model.config.residual is not None:
        model.residual_mlp.initialise()
