"""Transformer blocks: norms, feed-forward layers, modulation (paper section 3.2; VAR for class models)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hartist.config import TransformerConfig
from hartist.layers import Linear, add_gated, scale_shift, steady_linear
from hartist.transformer import pieces
from hartist.transformer.attention import Attention, Heads
from hartist.transformer.block_causal import Runs
from hartist.transformer.cache import KVCache, Spans
from hartist.transformer.positions import Rope


class RMSNorm(nn.Module):
    """x / rms(x) · weight; the statistics are float32."""

    def __init__(self, width: int, eps: float, scale: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((width,), scale))

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class PlainLayerNorm(nn.Module):
    """LayerNorm without affine parameters."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)


def make_norm(config: TransformerConfig) -> nn.Module:
    """The norm in front of attention, feed-forward and head: RMSNorm (text) or plain LayerNorm (VAR)."""
    return RMSNorm(config.width, config.norm_eps) if config.norm == "rms" else PlainLayerNorm(config.norm_eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), no biases."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate = Linear(config.width, config.mlp_hidden, bias=False)
        self.up = Linear(config.width, config.mlp_hidden, bias=False)
        self.down = Linear(config.mlp_hidden, config.width, bias=False)

    def forward(self, x_BlD: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        if torch.is_grad_enabled():
            return self.down(F.silu(self.gate(x_BlD)) * self.up(x_BlD))
        # In place: the widest activations of all, and fresh memory costs a CPU more than the arithmetic.
        return self.down(F.silu(self.gate(x_BlD), inplace=True).mul_(self.up(x_BlD)))


class GeluMLP(nn.Module):
    """fc2(gelu(fc1(x))) with the tanh approximation."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.width, config.mlp_hidden)
        self.fc2 = Linear(config.mlp_hidden, config.width)

    def forward(self, x_BlD: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return self.fc2(F.gelu(self.fc1(x_BlD), approximate="tanh"))


class Modulation(nn.Module):
    """The six vectors γ1 γ2 s1 s2 b1 b2 of one block, from the pooled condition.

    table: learned 6×D plus the condition itself. adaln: Linear(SiLU(condition)). shared_adaln:
    learned 6×D plus one Linear(SiLU(condition)) for all blocks, computed by the model.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.kind, self.width = config.modulation, config.width
        if self.kind == "adaln":
            self.linear = Linear(config.width, 6 * config.width)
        else:
            self.table = nn.Parameter(torch.empty(6, config.width))
            nn.init.normal_(self.table, std=config.width**-0.5)

    def forward(self, condition: Float[Tensor, "b _w"]) -> Float[Tensor, "b 6 d"]:
        """`condition` is B×D; with shared_adaln, the shared projection of it, B×6D."""
        if self.kind == "adaln":
            return self.linear(F.silu(condition)).view(-1, 6, self.width)
        if self.kind == "shared_adaln":
            return self.table + condition.view(-1, 6, self.width)
        return self.table + condition[:, None]


class Block(nn.Module):
    """x += γ1·attn(norm(x)·(1+s1)+b1); x += γ2·mlp(norm(x)·(1+s2)+b2); one norm weight serves both."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = make_norm(config)
        self.attn = Attention(config)
        self.mlp = SwiGLU(config) if config.mlp == "swiglu" else GeluMLP(config)
        self.modulation = Modulation(config) if config.modulation != "none" else None

    def forward(
        self,
        x_BlD: Float[Tensor, "b l d"],
        modulation_B6D: Float[Tensor, "b 6 d"] | None,
        rope: Rope | None,
        *,
        runs: Runs | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        keep: bool = True,
        spans: Spans | None = None,
    ) -> Float[Tensor, "b l d"]:
        heads = pieces.before(self, x_BlD, modulation_B6D, rope)
        y_BNlE = self.attn(heads, runs=runs, cache=cache, layer=layer, keep=keep, spans=spans)
        return pieces.after(self, x_BlD, y_BNlE, modulation_B6D)

    def before(
        self, x_BlD: Float[Tensor, "b l d"], modulation_B6D: Float[Tensor, "b 6 d"] | None, rope: Rope | None
    ) -> Heads:
        """What tokens bring to attention."""
        return self.attn.project(self.modulated(x_BlD, modulation_B6D, 0), rope)

    def after(
        self,
        x_BlD: Float[Tensor, "b l d"],
        y_BNlE: Float[Tensor, "b n l e"],
        modulation_B6D: Float[Tensor, "b 6 d"] | None,
    ) -> Float[Tensor, "b l d"]:
        """What becomes of them with what attention found, and with the feed-forward layers."""
        x_BlD = self.add(x_BlD, self.attn.merge(y_BNlE), modulation_B6D, 0)
        return self.add(x_BlD, self.mlp(self.modulated(x_BlD, modulation_B6D, 1)), modulation_B6D, 1)

    def modulated(
        self, x_BlD: Float[Tensor, "b l d"], modulation_B6D: Float[Tensor, "b 6 d"] | None, part: int
    ) -> Float[Tensor, "b l d"]:
        """What attention (part 0) or the feed-forward layers (part 1) see of x: norm(x)·(1+s)+b."""
        y_BlD = self.norm(x_BlD)
        if modulation_B6D is None:
            return y_BlD
        return scale_shift(y_BlD, modulation_B6D[:, None, 2 + part], modulation_B6D[:, None, 4 + part])

    def add(
        self,
        x_BlD: Float[Tensor, "b l d"],
        y_BlD: Float[Tensor, "b l d"],
        modulation_B6D: Float[Tensor, "b 6 d"] | None,
        part: int,
    ) -> Float[Tensor, "b l d"]:
        """x + γ·y, with y what that part made."""
        return x_BlD + y_BlD if modulation_B6D is None else add_gated(x_BlD, modulation_B6D[:, None, part], y_BlD)


class Head(nn.Module):
    """norm(h)·(1+s)+b, then linear to the vocabulary; always float32."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = make_norm(config)
        self.modulation = Linear(config.width, 2 * config.width)
        self.linear = Linear(config.width, config.vocab_size)

    def forward(self, hidden_BlD: Float[Tensor, "b l d"], condition_BD: Float[Tensor, "b d"]) -> Float[Tensor, "b l v"]:
        s_BD, b_BD = self.modulation(F.silu(condition_BD)).float().chunk(2, -1)
        y_BlD = scale_shift(self.norm(hidden_BlD.float()), s_BD[:, None], b_BD[:, None])
        kind = y_BlD.device.type
        with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
            bias = self.linear.bias.float() if self.linear.bias is not None else None
            return steady_linear(y_BlD, self.linear.weight.float(), bias)
