"""Block-causal attention without a mask: the queries of a scale meet the keys up to its end, and no others

Large matrix products with a softmax between them. On a CPU in bfloat16, forward and backward pass together take
about a third of the time of the fused kernel with a mask (benchmarks/attention.py), which computes what the mask
then throws away. The weights are kept for the backward pass: B·N·(about half of L²) numbers a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

SMALL = 128
"""Leading scales of so few tokens together are done in one product, with a mask."""


def prefix_attention(
    q_BNtE: Float[Tensor, "b n t e"],
    k_BNtE: Float[Tensor, "b n t e"],
    v_BNtE: Float[Tensor, "b n t e"],
    scale: float,
    lengths: tuple[int, ...],
) -> Float[Tensor, "b n t e"]:
    """softmax(q·kᵀ·scale)·v where a query sees its own run of `lengths` and those before it."""
    q, k, v = (x.flatten(0, 1).contiguous() for x in (q_BNtE * scale, k_BNtE, v_BNtE))
    return _Prefix.apply(q, k, v, lengths).view(q_BNtE.shape)


def _runs(lengths: tuple[int, ...]) -> list[tuple[int, int, tuple[int, ...]]]:
    """Queries from start to end that are done together; the lengths of the runs they consist of, if several."""
    together = 0
    while together < len(lengths) and sum(lengths[: together + 1]) <= SMALL:
        together += 1
    first = sum(lengths[:together])
    runs = [(0, first, lengths[:together])] if together else []
    for length in lengths[together:]:
        runs.append((first, first + length, ()))
        first += length
    return runs


def _weights(q_NiE: Tensor, k_NjE: Tensor, inner: tuple[int, ...]) -> Tensor:
    """softmax(q·kᵀ), N×i×j.

    The largest score of a query is found first and subtracted inside a second product, as one more term of the
    sum: so what is rounded to bfloat16 is the distance to it, small wherever the weight is not.
    """
    scores_Nij = torch.bmm(q_NiE, k_NjE.mT)
    hidden_ij = None
    if len(inner) > 1:
        level_i = torch.repeat_interleave(torch.tensor(inner))
        hidden_ij = level_i[:, None] < level_i[None, :]
        scores_Nij = scores_Nij.masked_fill_(hidden_ij, -torch.inf)
    top_Ni1 = scores_Nij.amax(-1, keepdim=True)
    zero = torch.zeros_like(top_Ni1)  # bfloat16 products take pairs
    ones_Nj2 = k_NjE.new_ones(*k_NjE.shape[:2], 2)
    torch.bmm(torch.cat([q_NiE, -top_Ni1, zero], -1), torch.cat([k_NjE, ones_Nj2], -1).mT, out=scores_Nij)
    if hidden_ij is not None:
        scores_Nij = scores_Nij.masked_fill_(hidden_ij, -torch.inf)
    return scores_Nij.softmax(-1)


class _Prefix(torch.autograd.Function):
    """All heads of all images side by side; q is scaled already."""

    @staticmethod
    def forward(ctx: Any, q_NTE: Tensor, k_NTE: Tensor, v_NTE: Tensor, lengths: tuple[int, ...]) -> Tensor:
        y_NTE = torch.empty_like(q_NTE)
        kept = []
        for start, end, inner in _runs(lengths):
            weights_Nij = _weights(q_NTE[:, start:end], k_NTE[:, :end], inner)
            y_NTE[:, start:end] = torch.bmm(weights_Nij, v_NTE[:, :end])
            kept.append(weights_Nij)
        ctx.save_for_backward(q_NTE, k_NTE, v_NTE, y_NTE, *kept)
        ctx.lengths = lengths
        return y_NTE

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_NTE, k_NTE, v_NTE, y_NTE, *kept = ctx.saved_tensors
        g_NTE = gradients[0].contiguous()
        dq_NTE, dk_NTE, dv_NTE = torch.empty_like(q_NTE), torch.zeros_like(k_NTE), torch.zeros_like(v_NTE)
        # Of a softmax's gradient, what all scores of a query share: Σ weight · gradient = y · g.
        accurate = torch.promote_types(g_NTE.dtype, torch.float32)
        shared_NT1 = (g_NTE.to(accurate) * y_NTE).sum(-1, keepdim=True).to(g_NTE.dtype)
        for (start, end, _), weights_Nij in zip(_runs(ctx.lengths), kept, strict=True):
            g_NiE = g_NTE[:, start:end]
            dv_NTE[:, :end].baddbmm_(weights_Nij.mT, g_NiE)
            ds_Nij = torch.bmm(g_NiE, v_NTE[:, :end].mT).sub_(shared_NT1[:, start:end]).mul_(weights_Nij)
            dq_NTE[:, start:end] = torch.bmm(ds_Nij, k_NTE[:, :end])
            dk_NTE[:, :end].baddbmm_(ds_Nij.mT, q_NTE[:, start:end])
        return dq_NTE, dk_NTE, dv_NTE, None
