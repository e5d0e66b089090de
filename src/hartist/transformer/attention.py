"""Self-attention of the transformer: one implementation for training, caching, text and class models."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hartist.config import TransformerConfig
from hartist.layers import Linear, steady_linear
from hartist.transformer.attend import attend
from hartist.transformer.block_causal import Runs
from hartist.transformer.cache import KVCache, Parts, Spans
from hartist.transformer.positions import Rope, apply_rope

MAX_LOG_SCALE = math.log(100)

Heads = tuple[Float[Tensor, "b n l e"], Float[Tensor, "b n l e"], Float[Tensor, "b n l e"]]
"""Queries, keys and values of every head."""


class Attention(nn.Module):
    """q and v have a bias, k has none. Scale ¼/√E, or the l2-norm variant with a learned scale a head.

    `project`, the module itself and `merge`, one after another, are a block's attention: what is before and after the
    mixing of tokens takes each for itself, so it can be done in pieces.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.head_dim = config.heads, config.head_dim
        self.qkv: nn.Module = Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width)
        self.scale = 1.0 if config.l2_norm else config.attention_scale / math.sqrt(self.head_dim)
        self.log_scale = nn.Parameter(torch.full((1, self.heads, 1, 1), math.log(4))) if config.l2_norm else None

    def forward(
        self,
        heads: Heads,
        *,
        runs: Runs | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        keep: bool = True,
        spans: Spans | None = None,
    ) -> Float[Tensor, "b n l e"]:
        """Attend within these tokens and to what `cache` holds, or these spans of it; with `runs`, block-causally."""
        q_BNlE, k_BNlE, v_BNlE = heads
        keys: Parts = (k_BNlE,)
        values: Parts = (v_BNlE,)
        if cache is not None:
            keys, values = cache.join(layer, k_BNlE, v_BNlE, keep=keep, spans=spans)
        return attend(q_BNlE, keys, values, self.scale, runs)

    def project(self, x_BlD: Float[Tensor, "b l d"], rope: Rope | None) -> Heads:
        """Queries, keys and values of x, rotated to its positions."""
        B, l = x_BlD.shape[:2]
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        if isinstance(self.qkv, Linear):
            qkv_Bl3D = steady_linear(x_BlD, self.qkv.weight, bias)
        else:  # a layer with an adapter
            qkv_Bl3D = self.qkv(x_BlD) + bias
        qkv_Bl3NE = qkv_Bl3D.view(B, l, 3, self.heads, self.head_dim)
        q_BNlE, k_BNlE, v_BNlE = qkv_Bl3NE.permute(2, 0, 3, 1, 4).unbind(0)
        if self.log_scale is not None:
            q_BNlE = F.normalize(q_BNlE, dim=-1) * self.log_scale.clamp(max=MAX_LOG_SCALE).exp()
            k_BNlE = F.normalize(k_BNlE, dim=-1)
        if rope is not None:
            q_BNlE, k_BNlE = apply_rope(q_BNlE, rope), apply_rope(k_BNlE, rope)
        return q_BNlE, k_BNlE, v_BNlE

    def merge(self, y_BNlE: Float[Tensor, "b n l e"]) -> Float[Tensor, "b l d"]:
        """The heads' outputs side by side, through the output layer."""
        return self.proj(y_BNlE.transpose(1, 2).flatten(2))
