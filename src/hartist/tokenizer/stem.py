"""A tokenizer carried to twice the resolution: 2×2 pixels at its edges where there was one

What goes in is their average, what comes out is drawn as 2×2 equal pixels. So latents and tokens of a picture are at
first those of the same picture at half the size, and a generator of the tokens stays as good as it was; training then
teaches the decoder what lies between the pixels. (Not in the paper, whose tokenizer sees every size at 16 px a cell.)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hartist.tokenizer.hybrid import HybridTokenizer


@torch.no_grad()
def double_stem(tokenizer: HybridTokenizer) -> HybridTokenizer:
    """The same tokenizer for pictures of twice the side; its own weights are left alone."""
    stem = tokenizer.config.stem
    weights = dict(tokenizer.state_dict())
    conv_in, conv_out = weights["encoder.conv_in.weight"], weights["decoder.conv_out.weight"]
    # pixels of a cell stand behind each colour, row by row
    weights["encoder.conv_in.weight"] = _double(conv_in.unflatten(1, (3, stem, stem)), 2).flatten(1, 3) / 4
    weights["decoder.conv_out.weight"] = _double(conv_out.unflatten(0, (3, stem, stem)), 1).flatten(0, 2)
    weights["decoder.conv_out.bias"] = _double(weights["decoder.conv_out.bias"].view(3, stem, stem), 1).flatten()
    doubled = HybridTokenizer(replace(tokenizer.config, stem=2 * stem)).to(conv_in.dtype)
    doubled.load_state_dict(weights)
    return doubled.train(tokenizer.training)


def _double(x: Tensor, dim: int) -> Tensor:
    """Each entry twice along `dim` and along the next one."""
    return x.repeat_interleave(2, dim).repeat_interleave(2, dim + 1)
