"""Diffusion models to compare with: their sizes, and what they take as input, for the classes of `diffusers`

The numbers are those of each model's public config.json; weights are random, as speed does not depend on them. Steps
are the published ones, text lengths those the models were trained with; text encoders are not part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hartist.errors import UserError

Make = Callable[..., Tensor]
"""Makes a tensor of the shape it is called with."""


@dataclass(frozen=True)
class Peer:
    """A latent diffusion model: a denoiser that runs for so many steps, and a decoder."""

    denoiser: str
    """The class in `diffusers`."""
    config: dict[str, Any]
    text: tuple[int, int]
    """Tokens and width of the text states."""
    steps: int
    decoder: str
    decoder_config: dict[str, Any]
    downsampling: int
    sizes_config: Callable[[int], dict[str, Any]]
    """What of the configuration depends on the picture's side in pixels."""

    @property
    def channels(self) -> int:
        return int(self.decoder_config["latent_channels"])


def _kl(channels: int, **more: Any) -> dict[str, Any]:
    """The autoencoder of Stable Diffusion, SDXL (which PixArt-Σ uses too) and SD3."""
    return {
        "latent_channels": channels,
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        **more,
    }


_DC_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
_DC = {
    "latent_channels": 32,
    "encoder_block_types": _DC_BLOCKS,
    "decoder_block_types": _DC_BLOCKS,
    "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "upsample_block_type": "interpolate",
    "downsample_block_type": "conv",
}
"""The deep-compression autoencoder of Sana, 32 px a cell."""


def _sana(heads: int, layers: int, cross_heads: int, cross_head_dim: int) -> Peer:
    return Peer(
        denoiser="SanaTransformer2DModel",
        config={
            "num_attention_heads": heads,
            "attention_head_dim": 32,
            "num_layers": layers,
            "num_cross_attention_heads": cross_heads,
            "cross_attention_head_dim": cross_head_dim,
            "cross_attention_dim": cross_heads * cross_head_dim,
            "caption_channels": 2304,
            "mlp_ratio": 2.5,
        },
        text=(300, 2304),
        steps=20,
        decoder="AutoencoderDC",
        decoder_config=_DC,
        downsampling=32,
        sizes_config=lambda pixels: {"sample_size": pixels // 32},
    )


PEERS: dict[str, Peer] = {
    "PixArt-Σ": Peer(
        denoiser="PixArtTransformer2DModel",
        config={
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "num_layers": 28,
            "cross_attention_dim": 1152,
            "caption_channels": 4096,
            "use_additional_conditions": False,
        },
        text=(300, 4096),
        steps=20,
        decoder="AutoencoderKL",
        decoder_config=_kl(4),
        downsampling=8,
        sizes_config=lambda pixels: {"sample_size": pixels // 8, "interpolation_scale": max(1, pixels // 512)},
    ),
    "SDXL": Peer(
        denoiser="UNet2DConditionModel",
        config={
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "use_linear_projection": True,
        },
        text=(77, 2048),
        steps=20,
        decoder="AutoencoderKL",
        decoder_config=_kl(4),
        downsampling=8,
        sizes_config=lambda pixels: {"sample_size": pixels // 8},
    ),
    "SD3-medium": Peer(
        denoiser="SD3Transformer2DModel",
        config={
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        text=(154, 4096),  # 77 of CLIP, 77 of T5
        steps=28,
        decoder="AutoencoderKL",
        decoder_config=_kl(16, use_quant_conv=False, use_post_quant_conv=False),
        downsampling=8,
        sizes_config=lambda pixels: {"sample_size": pixels // 8},
    ),
    "Sana-0.6B": _sana(heads=36, layers=28, cross_heads=16, cross_head_dim=72),
    "Sana-1.6B": _sana(heads=70, layers=20, cross_heads=20, cross_head_dim=112),
}


def tiny(peer: Peer) -> Peer:
    """The same classes at sizes that run in a moment, for 64 px."""
    small = {
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 16,
        "caption_projection_dim": 16,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "pos_embed_max_size": 8,
        "block_out_channels": (32, 64, 64),
        "transformer_layers_per_block": (1, 1, 1),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    }
    config = {name: small.get(name, value) for name, value in peer.config.items()}
    if peer.denoiser == "UNet2DConditionModel":
        config["attention_head_dim"] = (2, 2, 2)
    if peer.decoder == "AutoencoderKL":
        decoder = {**peer.decoder_config, "block_out_channels": (32,) * 4, "layers_per_block": 1}
    else:
        sides = ("encoder", "decoder")
        decoder = {**peer.decoder_config, **{f"{side}_block_out_channels": (32,) * 6 for side in sides}}
        decoder |= {f"{side}_layers_per_block": (1,) * 6 for side in sides}
    return replace(peer, config=config, decoder_config=decoder, text=(8, 16), steps=4)


def build(peer: Peer, pixels: int) -> tuple[nn.Module, nn.Module]:
    """Denoiser and decoder on the meta device. Raises UserError if `diffusers` is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError("the peers need diffusers: pip install 'hartist[peers]'") from error
    with torch.device("meta"):
        denoiser = getattr(diffusers, peer.denoiser)(**peer.config, **peer.sizes_config(pixels))
        decoder = getattr(diffusers, peer.decoder)(**peer.decoder_config)
    return denoiser.requires_grad_(False).eval(), decoder.requires_grad_(False).eval()


def denoise_inputs(peer: Peer, rows: int, make: Make) -> dict[str, Any]:
    """What the denoiser takes beside the latent, as keywords."""
    tokens, width = peer.text
    inputs: dict[str, Any] = {"encoder_hidden_states": make(rows, tokens, width), "return_dict": False}
    if peer.denoiser == "UNet2DConditionModel":
        pooled = peer.config["projection_class_embeddings_input_dim"] - 6 * peer.config["addition_time_embed_dim"]
        inputs["added_cond_kwargs"] = {"text_embeds": make(rows, pooled), "time_ids": make(rows, 6)}
    elif peer.denoiser == "SD3Transformer2DModel":
        inputs["pooled_projections"] = make(rows, peer.config["pooled_projection_dim"])
    elif peer.denoiser == "PixArtTransformer2DModel":
        inputs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return inputs


def predict(peer: Peer, denoiser: nn.Module, x_RChw: Tensor, t_R: Tensor, inputs: dict[str, Any]) -> Tensor:
    """One pass of the denoiser: noise or velocity, without the variance that PixArt-Σ predicts beside it."""
    name = "sample" if peer.denoiser == "UNet2DConditionModel" else "hidden_states"
    output_RChw: Tensor = denoiser(**{name: x_RChw}, timestep=t_R, **inputs)[0]
    return output_RChw[:, : x_RChw.shape[1]]


def decode(decoder: nn.Module, x_BChw: Tensor) -> Tensor:
    image_B3hw: Tensor = decoder.decode(x_BChw, return_dict=False)[0]  # type: ignore[operator]
    return image_B3hw
