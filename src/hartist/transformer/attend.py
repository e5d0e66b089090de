"""softmax(q·kᵀ·scale)·v: PyTorch's own attention as the reference, and a blocked form for bfloat16 on CPU."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hartist.transformer import block_causal
from hartist.transformer.block_causal import Runs

BLOCK_BYTES = 4 * 2**20
"""Scores of one block of queries: what stays in a server core's last-level cache between the two products."""
MIN_QUERIES = 256


def attend(
    q_BNlE: Float[Tensor, "b n l e"],
    k_BNtE: Float[Tensor, "b n t e"],
    v_BNtE: Float[Tensor, "b n t e"],
    scale: float,
    runs: Runs | None = None,
) -> Float[Tensor, "b n l e"]:
    """Attention of every query to all keys; with `runs`, block-causal."""
    if runs is not None:
        return block_causal.block_causal_attention(q_BNlE, k_BNtE, v_BNtE, scale, runs)
    l = q_BNlE.shape[2]
    inference = not torch.is_grad_enabled()
    half_on_cpu = q_BNlE.device.type == "cpu" and q_BNlE.dtype == torch.bfloat16
    if inference and half_on_cpu and l >= MIN_QUERIES and not multiplies_tiles():
        return blocked_attention(q_BNlE, k_BNtE, v_BNtE, scale)
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
    k_BNtE: Float[Tensor, "b n t e"],
    v_BNtE: Float[Tensor, "b n t e"],
    scale: float,
) -> Float[Tensor, "b n l e"]:
    """Head by head, block of queries by block: large matrix products and a softmax between them.

    In bfloat16 this runs about 1.5 times as fast as the fused kernel, whose products are small, on a CPU with AVX-512;
    with AMX it takes 2.7 times as long (benchmarks/attention.py).
    Scores are rounded to bfloat16 between the steps, which alone would cost accuracy where they are
    large. So a first product finds each query's maximum, and a second one subtracts it inside, as one
    more term of the sum: what is then rounded is the distance to the maximum, small wherever the
    weight is not.
    """
    B, N, l, E = q_BNlE.shape
    t = k_BNtE.shape[2]
    block = max(64, BLOCK_BYTES // (2 * t) // 64 * 64)
    y_BNlE = torch.empty_like(q_BNlE, memory_format=torch.contiguous_format)
    # Two more columns: the maximum's, and a zero because bfloat16 products take pairs.
    q_lF = q_BNlE.new_zeros(l, E + 2)
    k_Ft = k_BNtE.new_ones(E + 2, t)
    for b in range(B):
        for n in range(N):
            torch.mul(q_BNlE[b, n], scale, out=q_lF[:, :E])
            k_Ft[:E] = k_BNtE[b, n].T
            for start in range(0, l, block):
                q_iF = q_lF[start : start + block]
                q_iF[:, E] = -torch.mm(q_iF[:, :E], k_Ft[:E]).amax(-1)
                weights_it = torch.mm(q_iF, k_Ft).softmax(-1)
                torch.mm(weights_it, v_BNtE[b, n], out=y_BNlE[b, n, start : start + block])
    return y_BNlE
