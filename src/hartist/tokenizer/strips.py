"""Decoding in strips of rows: the decoder's arithmetic with two maps of full size alive instead of five

At 1024 px one map of the published decoder's last level is 640 MiB in float32. Convolutions read one row beyond a
strip, so that nothing is approximate; group norm's statistics are taken over the whole map first. Inference only:
blocks overwrite their input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hartist.memory import give_back_memory
from hartist.tokenizer.autoencoder import Decoder, Level, ResidualBlock, Upsample
from hartist.tokenizer.hybrid import HybridTokenizer

ROWS = 32
MIN_CELLS = 384 * 384
"""Smaller maps are decoded whole."""


@torch.inference_mode()
def decode_in_strips(decoder: Decoder, x: Float[Tensor, "b c h w"], rows: int = ROWS) -> Float[Tensor, "b 3 ih iw"]:
    """What `decoder(x)` computes, up to rounding, in strips of so many rows where maps are large."""
    x = decoder.mid(decoder.conv_in(x))
    for level in reversed(decoder.up):
        assert isinstance(level, Level)
        for i, block in enumerate(level.block):
            assert isinstance(block, ResidualBlock)
            x = block(x) if _small(x) else _residual_block(block, x, rows)
            if len(level.attn):
                x = level.attn[i](x)
        if isinstance(level.upsample, Upsample):
            x = level.upsample(x) if _small(x, 4) else _upsample(level.upsample, x, rows)
    x = _norm_conv(decoder.norm_out, decoder.conv_out, x, rows)
    return F.pixel_shuffle(x, decoder.stem) if decoder.stem > 1 else x


def _small(x: Tensor, growth: int = 1) -> bool:
    return growth * x.shape[-2] * x.shape[-1] < MIN_CELLS


def _residual_block(block: ResidualBlock, x: Tensor, rows: int) -> Tensor:
    y = _norm_conv(block.norm1, block.conv1, x, rows)
    if isinstance(block.nin_shortcut, nn.Conv2d):
        x = block.nin_shortcut(x)
    return _norm_conv(block.norm2, block.conv2, y, rows, onto=x)


def _norm_conv(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor, rows: int, onto: Tensor | None = None) -> Tensor:
    """conv(silu(norm(x))), added to `onto` in place if that is given."""
    gain_BC11, shift_BC11 = _normalisation(norm, x, rows)

    def activate(strip: Tensor) -> Tensor:
        return F.silu(torch.addcmul(shift_BC11, strip.float(), gain_BC11), inplace=True).to(x.dtype)

    out = onto
    if out is None:
        shape = (len(x), conv.out_channels, *x.shape[-2:])
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))
    for start in range(0, x.shape[-2], rows):
        end = min(start + rows, x.shape[-2])
        y = _conv_rows(conv, activate(x[..., max(start - 1, 0) : end + 1, :]), start > 0, end < x.shape[-2])
        if onto is None:
            out[..., start:end, :] = y
        else:
            out[..., start:end, :] += y
    return out


def _normalisation(norm: nn.GroupNorm, x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """norm(x) as x·gain + shift, statistics in float32: those of the strips, combined."""
    counts, means, variances = [], [], []
    for strip in x.split(rows, -2):
        mean_BG, variance_BG = _moments(norm, strip.contiguous(memory_format=_memory_format(x)))
        counts.append(strip.shape[-2] / x.shape[-2])
        means.append(mean_BG)
        variances.append(variance_BG)
    share_S11 = x.new_tensor(counts, dtype=torch.float32)[:, None, None]
    mean_SBG, variance_SBG = torch.stack(means), torch.stack(variances)
    mean_BG = (share_S11 * mean_SBG).sum(0)
    variance_BG = (share_S11 * (variance_SBG + (mean_SBG - mean_BG).square())).sum(0)
    each = norm.num_channels // norm.num_groups
    scale_BC = (variance_BG + norm.eps).rsqrt().repeat_interleave(each, 1)
    gain_BC = norm.weight.float() * scale_BC
    shift_BC = norm.bias.float() - mean_BG.repeat_interleave(each, 1) * gain_BC
    return gain_BC[..., None, None], shift_BC[..., None, None]


def _moments(norm: nn.GroupNorm, strip: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a strip's groups, B×G, in float32."""
    if strip.device.type != "cpu":
        groups = strip.float().unflatten(1, (norm.num_groups, -1))
        variance_BG, mean_BG = torch.var_mean(groups, dim=(2, 3, 4), correction=0)
        return mean_BG, variance_BG
    # PyTorch's kernel for group norm finds them ten times as fast on a CPU; with float32 weights it keeps them so.
    B, C, h, w = strip.shape
    exact = torch.promote_types(strip.dtype, torch.float32)
    one_C, zero_C = torch.ones(C, dtype=exact), torch.zeros(C, dtype=exact)
    _, mean_BG, scale_BG = torch.native_group_norm(strip, one_C, zero_C, B, C, h * w, norm.num_groups, norm.eps)
    return mean_BG.float(), (scale_BG.square().reciprocal() - norm.eps).float()


def _upsample(upsample: Upsample, x: Tensor, rows: int) -> Tensor:
    shape = (len(x), upsample.conv.out_channels, 2 * x.shape[-2], 2 * x.shape[-1])
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))
    half = max(rows // 2, 1)
    for start in range(0, x.shape[-2], half):
        end = min(start + half, x.shape[-2])
        strip = F.interpolate(x[..., max(start - 1, 0) : end + 1, :], scale_factor=2.0, mode="nearest")
        above, below = start > 0, end < x.shape[-2]
        strip = strip[..., int(above) : strip.shape[-2] - int(below), :]  # one fine row of each neighbour
        out[..., 2 * start : 2 * end, :] = _conv_rows(upsample.conv, strip, above, below)
    return out


def _conv_rows(conv: nn.Conv2d, strip: Tensor, above: bool, below: bool) -> Tensor:
    """A 3×3 convolution of a strip with its neighbours' rows; zeros where there is no neighbour."""
    strip = F.pad(strip, (0, 0, int(not above), int(not below)))
    return F.conv2d(strip, conv.weight, conv.bias, padding=(0, 1))


def _memory_format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def decode_latent_in_strips(tokenizer: HybridTokenizer, f_BChw: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 ih iw"]:
    """`tokenizer.decode_latent(f)`, large maps in strips."""
    x = tokenizer.post_quant_conv(f_BChw.to(tokenizer.post_quant_conv.weight.dtype))
    if not _small(x, tokenizer.config.downsampling**2):
        give_back_memory()
    return decode_in_strips(tokenizer.decoder, x).float().clamp(-1, 1)
