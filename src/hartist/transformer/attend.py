"""softmax(q·kᵀ·scale)·v: PyTorch's own attention as the reference, and a blocked form for bfloat16 on CPU."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hartist.transformer import block_causal
from hartist.transformer.block_causal import Runs
from hartist.transformer.cache import Parts

BLOCK_BYTES = 10 * 2**20
"""Scores of one block of queries: what stays in a server's last-level cache between the two products."""
STRIDE = 8
MIN_QUERIES = 32


def attend(
    q_BNlE: Float[Tensor, "b n l e"],
    keys: Parts,
    values: Parts,
    scale: float,
    runs: Runs | None = None,
) -> Float[Tensor, "b n l e"]:
    """Attention of every query to all keys; with `runs`, block-causal."""
    l = q_BNlE.shape[2]
    inference = not torch.is_grad_enabled()
    half_on_cpu = q_BNlE.device.type == "cpu" and q_BNlE.dtype == torch.bfloat16
    if runs is None and inference and half_on_cpu and l >= MIN_QUERIES and not multiplies_tiles():
        return blocked_attention(q_BNlE, keys, values, scale)
    k_BNtE, v_BNtE = (parts[0] if len(parts) == 1 else torch.cat(parts, 2) for parts in (keys, values))
    if runs is not None:
        return block_causal.block_causal_attention(q_BNlE, k_BNtE, v_BNtE, scale, runs)
    if l == 1 and inference:
        # A single query takes another kernel on CPU, which sums in an order that depends on the batch.
        q_BNlE = q_BNlE.expand(-1, -1, 2, -1)
    y_BNlE = F.scaled_dot_product_attention(q_BNlE, k_BNtE, v_BNtE, scale=scale)
    return y_BNlE[:, :, :l]


@functools.cache
def multiplies_tiles() -> bool:
    """Whether this CPU multiplies tiles of bfloat16 (AMX), and PyTorch's fused attention with it."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def blocked_attention(
    q_BNlE: Float[Tensor, "b n l e"],
    keys: Parts,
    values: Parts,
    scale: float,
) -> Float[Tensor, "b n l e"]:
    """A few heads, or a block of one head's queries, at a time: two large products, with one pass of exp between them.

    In bfloat16 this runs 2.5 times as fast as the fused kernel, whose products are small, on a CPU with AVX-512 (1.2
    times for 36 queries); with AMX it takes longer (benchmarks/attention.py). Scores are rounded to bfloat16 on the
    way, which alone would cost accuracy where they are large. So the first product subtracts from every score, as one
    more term of its sum, the query's largest score among every `STRIDE`th key: what is rounded is the distance to about
    the maximum, small wherever the weight is not. That key's own weight is 1, so no sum vanishes; should a key that was
    not looked at stand so far above that exp overflows, the block is done again with the true maximum and a softmax.
    Sums of weights are one more column of the second product.
    """
    B, N, l, E = q_BNlE.shape
    lengths = [part.shape[2] for part in keys]
    t = sum(lengths)
    heads, block = _blocks(N, l, t * q_BNlE.element_size())
    y_BNlE = q_BNlE.new_empty(B, l, N, E).transpose(1, 2)  # as the output layer reads it
    # One more term and one more column; two, because bfloat16 products take pairs.
    q_HlF = q_BNlE.new_zeros(heads, l, E + 2)
    k_HFt = q_BNlE.new_ones(heads, E + 2, t)
    v_HtF = q_BNlE.new_ones(heads, t, E + 2)
    buffer_Hit = q_BNlE.new_empty(heads, block, t)
    for b in range(B):
        for n in range(0, N, heads):
            own = slice(n, n + heads)
            torch.mul(q_BNlE[b, own], scale, out=q_HlF[..., :E])
            for k_HEp, part in zip(k_HFt[:, :E].split(lengths, 2), keys, strict=True):
                k_HEp.copy_(part[b, own].mT)
            for v_HpE, part in zip(v_HtF[..., :E].split(lengths, 1), values, strict=True):
                v_HpE.copy_(part[b, own])
            q_HlF[..., E] = -torch.bmm(q_HlF[..., :E], k_HFt[:, :E, ::STRIDE]).amax(-1)
            for start in range(0, l, block):
                q_HiF = q_HlF[:, start : start + block]
                weights_Hit = buffer_Hit[:, : q_HiF.shape[1]]
                y_HiF = torch.bmm(torch.bmm(q_HiF, k_HFt, out=weights_Hit).exp_(), v_HtF)
                if not math.isfinite(y_HiF[..., E].amax()):
                    q_HiF[..., E] = -torch.bmm(q_HiF[..., :E], k_HFt[:, :E]).amax(-1)
                    y_HiF = torch.bmm(torch.bmm(q_HiF, k_HFt, out=weights_Hit).softmax(-1), v_HtF)
                torch.div(y_HiF[..., :E], y_HiF[..., E:-1], out=y_BNlE[b, own, start : start + block])
    return y_BNlE


def _blocks(heads: int, queries: int, row_bytes: int) -> tuple[int, int]:
    """How many heads, and how many of their queries, at a time; several heads divide evenly and have all queries."""
    fitting = BLOCK_BYTES // (queries * row_bytes)
    if fitting > 1:
        return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= fitting), queries
    most = max(64, BLOCK_BYTES // row_bytes)
    return 1, min(queries, -(-queries // -(-queries // most) // 64) * 64)  # equal blocks, in steps of 64 queries
