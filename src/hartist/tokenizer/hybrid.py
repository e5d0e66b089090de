"""The hybrid tokenizer: pixels ↔ latent ↔ hybrid tokens (paper section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hartist.config import TokenizerConfig
from hartist.scales import ScaleSchedule
from hartist.tokenizer.autoencoder import Decoder, Encoder
from hartist.tokenizer.quantizer import HybridTokens, Quantizer


class HybridTokenizer(nn.Module):
    """Autoencoder around the residual quantizer. Images are B×3×H×W in [−1, 1]."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        kernel, channels = config.quant_conv_kernel, config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.quantizer = Quantizer(config)
        self.post_quant_conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.decoder = Decoder(config)

    @property
    def schedule(self) -> ScaleSchedule:
        return self.quantizer.schedule

    def encode_latent(self, image: Float[Tensor, "b 3 ih iw"]) -> Float[Tensor, "b c h w"]:
        """The continuous latent f = quant_conv(encoder(image)), float32."""
        dtype = self.quant_conv.weight.dtype
        return self.quant_conv(self.encoder(image.to(dtype))).float()

    def encode(self, image: Float[Tensor, "b 3 ih iw"], schedule: ScaleSchedule | None = None) -> HybridTokens:
        """Hybrid tokens of an image whose side is the finest grid times `config.downsampling`."""
        return self.quantizer.encode(self.encode_latent(image), schedule)

    def decode_latent(self, f_BChw: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 ih iw"]:
        """Image in [−1, 1] from f (hybrid) or f_hat (discrete): one decoder serves both."""
        dtype = self.post_quant_conv.weight.dtype
        return self.decoder(self.post_quant_conv(f_BChw.to(dtype))).float().clamp(-1, 1)

    def decode(self, tokens: HybridTokens) -> Float[Tensor, "b 3 ih iw"]:
        """The hybrid path: discrete and residual tokens."""
        return self.decode_latent(self.quantizer.dequantize_hybrid(tokens))

    def decode_discrete(
        self, ids: Sequence[Int[Tensor, "b _l"]], schedule: ScaleSchedule | None = None
    ) -> Float[Tensor, "b 3 ih iw"]:
        """The discrete path: token ids alone."""
        return self.decode_latent(self.quantizer.dequantize_discrete(ids, schedule))


def fast_layout(tokenizer: HybridTokenizer) -> HybridTokenizer:
    """Convolution weights with channels last, the layout CPU and GPU kernels are fastest in."""
    return tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
