"""A long run of tokens through a block's linear layers in pieces: for inference on a CPU, whose memory is slow

Each token goes its own way but for attention. Pieces keep what a block makes along the way (the widest activations of
all) in the last-level cache, and small enough for the allocator to hand out the same memory again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from hartist.transformer.attention import Heads
from hartist.transformer.positions import Rope

if TYPE_CHECKING:
    from hartist.transformer.blocks import Block

TOKENS = 1024
"""In a piece at most. Matrix products of so many rows run as fast as those of more."""


def before(
    block: Block, x_BlD: Float[Tensor, "b l d"], modulation_B6D: Float[Tensor, "b 6 d"] | None, rope: Rope | None
) -> Heads:
    """`Block.before`."""
    if _whole(x_BlD):
        return block.before(x_BlD, modulation_B6D, rope)
    (B, l), wholes = x_BlD.shape[:2], None
    for rows, tokens in cut(B, l):
        modulation = modulation_B6D[rows] if modulation_B6D is not None else None
        part = rope.part(rows, tokens) if rope is not None else None
        heads = block.before(x_BlD[rows, tokens], modulation, part)
        wholes = wholes or tuple(head.new_empty(B, head.shape[1], l, head.shape[3]) for head in heads)
        for whole, head in zip(wholes, heads, strict=True):
            whole[rows, :, tokens] = head
    assert wholes is not None
    return wholes[0], wholes[1], wholes[2]


def after(
    block: Block,
    x_BlD: Float[Tensor, "b l d"],
    y_BNlE: Float[Tensor, "b n l e"],
    modulation_B6D: Float[Tensor, "b 6 d"] | None,
) -> Float[Tensor, "b l d"]:
    """`Block.after`."""
    if _whole(x_BlD):
        return block.after(x_BlD, y_BNlE, modulation_B6D)
    whole_BlD = torch.empty_like(x_BlD)
    for rows, tokens in cut(*x_BlD.shape[:2]):
        modulation = modulation_B6D[rows] if modulation_B6D is not None else None
        whole_BlD[rows, tokens] = block.after(x_BlD[rows, tokens], y_BNlE[rows, :, tokens], modulation)
    return whole_BlD


def cut(batch: int, length: int, most: int | None = None) -> Iterator[tuple[slice, slice]]:
    """Rows and tokens of pieces of about equal size: several whole rows, or parts of one, of `most` tokens at most."""
    most = most or TOKENS
    rows = max(1, most // length)
    step = -(-length // -(-length // most))
    for row in range(0, batch, rows):
        for start in range(0, length, step):
            yield slice(row, row + rows), slice(start, start + step)


def _whole(x_BlD: Tensor) -> bool:
    """Whether there is nothing to gain, or a gradient to take."""
    return x_BlD.shape[0] * x_BlD.shape[1] <= TOKENS or x_BlD.device.type != "cpu" or torch.is_grad_enabled()
