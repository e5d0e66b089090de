"""Compiled blocks for generation: what comes before attention in one piece, what comes after it in another

Attention and the cache stay outside: lengths change from scale to scale, and attention is one call anyway. All blocks
share the two pieces, and so do all scales.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys

import torch

from hartist.errors import UserError
from hartist.transformer.blocks import Block
from hartist.transformer.model import ScaleTransformer


def refuse_both(*, int8: bool, compile: bool) -> None:
    """Raises UserError if products are to be in eight bits and compiled too."""
    if int8 and compile:
        raise UserError("products in eight bits can't be compiled; leave --int8 or --compile out")


def compile_blocks(model: ScaleTransformer) -> ScaleTransformer:
    """Have PyTorch compile the blocks, and the residual MLP, when they are first used: for inference only.

    Results are those of the plain blocks within rounding. Raises UserError where there is no C++ compiler.
    """
    if model.word_embed.weight.device.type == "cpu":
        _require_compiler()
    before, after = torch.compile(Block.before, dynamic=True), torch.compile(Block.after, dynamic=True)
    for block in model.blocks:
        assert isinstance(block, Block)
        block.before = functools.partial(before, block)  # type: ignore[method-assign]
        block.after = functools.partial(after, block)  # type: ignore[method-assign]
    if model.config.residual is not None:
        model.residual_mlp.predict = torch.compile(model.residual_mlp.predict, dynamic=True)  # type: ignore[method-assign]
    return model


def _require_compiler() -> None:
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(name) is None:
        raise UserError(f"compiling needs a C++ compiler, and there is no {name}; install one, or leave --compile out")
