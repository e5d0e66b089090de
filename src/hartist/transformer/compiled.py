"""Compiled blocks for generation: what comes before attention in one piece, what comes after it in another

Attention and the cache stay outside: lengths change from scale to scale, and attention is one call anyway. All blocks
share the two pieces, and so do all scales.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from hartist.errors import UserError
from hartist.transformer.attend import attend
from hartist.transformer.attention import Heads
from hartist.transformer.blocks import Block
from hartist.transformer.cache import KVCache, Spans
from hartist.transformer.model import ScaleTransformer
from hartist.transformer.positions import Rope


def compile_blocks(model: ScaleTransformer) -> ScaleTransformer:
    """Have PyTorch compile the blocks, and the residual MLP, when they are first used: for inference only.

    Results are those of the plain blocks within rounding. Raises UserError where there is no C++ compiler.
    """
    if model.word_embed.weight.device.type == "cpu":
        _require_compiler()
    before = torch.compile(_before_attention, dynamic=True)
    after = torch.compile(_after_attention, dynamic=True)
    for block in model.blocks:
        assert isinstance(block, Block)
        block.forward = functools.partial(_forward, block, before, after)  # type: ignore[method-assign]
    if model.config.residual is not None:
        model.residual_mlp.predict = torch.compile(model.residual_mlp.predict, dynamic=True)  # type: ignore[method-assign]
    return model


def _require_compiler() -> None:
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(name) is None:
        raise UserError(f"compiling needs a C++ compiler, and there is no {name}; install one, or leave --compile out")


def _before_attention(block: Block, x_BlD: Tensor, modulation_B6D: Tensor | None, rope: Rope | None) -> Heads:
    return block.attn.project(block.modulated(x_BlD, modulation_B6D, 0), rope)


def _after_attention(block: Block, x_BlD: Tensor, y_BNlE: Tensor, modulation_B6D: Tensor | None) -> Tensor:
    x_BlD = block.add(x_BlD, block.attn.merge(y_BNlE), modulation_B6D, 0)
    return block.add(x_BlD, block.mlp(block.modulated(x_BlD, modulation_B6D, 1)), modulation_B6D, 1)


def _forward(
    block: Block,
    before: Callable[..., Heads],
    after: Callable[..., Tensor],
    x_BlD: Float[Tensor, "b l d"],
    modulation_B6D: Float[Tensor, "b 6 d"] | None,
    rope: Rope | None,
    *,
    cache: KVCache,
    layer: int = 0,
    keep: bool = True,
    spans: Spans | None = None,
) -> Float[Tensor, "b l d"]:
    """`Block.forward` of one scale."""
    q_BNlE, k_BNlE, v_BNlE = before(block, x_BlD, modulation_B6D, rope)
    k_BNtE, v_BNtE = cache.join(layer, k_BNlE, v_BNlE, keep=keep, spans=spans)
    return after(block, x_BlD, attend(q_BNlE, k_BNtE, v_BNtE, block.attn.scale), modulation_B6D)
