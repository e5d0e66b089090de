"""The residual diffusion MLP (paper section 3.2): noisy residual token + condition → noise and variance."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hartist.config import ResidualConfig
from hartist.layers import Linear, SinusoidalEmbedder, add_gated, scale_shift

LN_EPS = 1e-6


class ResidualMLPBlock(nn.Module):
    """h += gate · mlp(LN(h)·(1+scale)+shift), with (shift, scale, gate) = Linear(SiLU(y))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=LN_EPS)
        self.mlp = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))
        self.modulation = Linear(width, 3 * width)

    def forward(self, h_NW: Float[Tensor, "n w"], silu_y_NW: Float[Tensor, "n w"]) -> Float[Tensor, "n w"]:
        shift, scale, gate = self.modulation(silu_y_NW).chunk(3, -1)
        return add_gated(h_NW, gate, self.mlp(scale_shift(self.norm(h_NW), scale, shift)))


class FinalLayer(nn.Module):
    """LN without affine, (shift, scale) = Linear(SiLU(y)), linear to 2C: ε, then v."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.linear = Linear(width, 2 * channels)
        self.modulation = Linear(width, 2 * width)

    def forward(self, h_NW: Float[Tensor, "n w"], silu_y_NW: Float[Tensor, "n w"]) -> Float[Tensor, "n c2"]:
        shift, scale = self.modulation(silu_y_NW).chunk(2, -1)
        return self.linear(scale_shift(F.layer_norm(h_NW, h_NW.shape[-1:], eps=LN_EPS), scale, shift))


class ResidualMLP(nn.Module):
    """Predicts noise ε (C channels) and the variance interpolation v (C channels) for N residual tokens."""

    def __init__(self, config: ResidualConfig, channels: int, condition_width: int) -> None:
        super().__init__()
        width = config.width
        self.time_embed = SinusoidalEmbedder(width)
        self.condition_embed = Linear(condition_width, width)
        self.input_proj = Linear(channels, width)
        self.blocks = nn.ModuleList(ResidualMLPBlock(width) for _ in range(config.depth))
        self.final = FinalLayer(width, channels)

    def initialise(self) -> None:
        """Xavier for matrices, small time embedding, zero for every gate and for the output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for index in (0, 2):
            nn.init.normal_(self.time_embed.mlp[index].weight, std=0.02)  # type: ignore[arg-type]
        for block in self.blocks:
            nn.init.zeros_(block.modulation.weight)  # type: ignore[union-attr, arg-type]
        nn.init.zeros_(self.final.modulation.weight)
        nn.init.zeros_(self.final.linear.weight)

    def forward(
        self, x_NC: Float[Tensor, "n c"], t_N: Int[Tensor, " n"], z_ND: Float[Tensor, "n d"]
    ) -> Float[Tensor, "n c2"]:
        """`t_N` are original steps 0..999, `z_ND` the conditions of the rows."""
        return self.predict(x_NC, self.time_embed(t_N), self.condition_embed(z_ND))

    def predict(
        self, x_NC: Float[Tensor, "n c"], time: Float[Tensor, "_t w"], condition_NW: Float[Tensor, "n w"]
    ) -> Float[Tensor, "n c2"]:
        """The same with both embeddings given; `time` may be one row for all."""
        silu_y_NW = F.silu(time + condition_NW)
        h_NW = self.input_proj(x_NC)
        for block in self.blocks:
            h_NW = block(h_NW, silu_y_NW)
        return self.final(h_NW, silu_y_NW)
