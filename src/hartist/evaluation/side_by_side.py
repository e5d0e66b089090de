"""One picture by both paths of a tokenizer, and how near they come to it"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from hartist.evaluation.image_metrics import psnr
from hartist.pixels import from_uint8, to_uint8
from hartist.tokenizer.hybrid import HybridTokenizer


@dataclass(frozen=True)
class Reconstruction:
    """One picture by both paths; PSNR in dB."""

    original: UInt8[Tensor, "h w 3"]
    discrete: UInt8[Tensor, "h w 3"]
    hybrid: UInt8[Tensor, "h w 3"]
    discrete_psnr: float
    hybrid_psnr: float


def picture_size(tokenizer: HybridTokenizer) -> tuple[int, int]:
    """(height, width) in pixels of what a tokenizer takes and gives."""
    h, w = tokenizer.schedule.finest
    return h * tokenizer.config.downsampling, w * tokenizer.config.downsampling


def middle(square_HW3: UInt8[np.ndarray, "s s 3"], height: int, width: int) -> UInt8[Tensor, "{height} {width} 3"]:
    """The middle of a picture that is as large as the longer of these sides."""
    side = len(square_HW3)
    top, left = (side - height) // 2, (side - width) // 2
    return torch.from_numpy(np.ascontiguousarray(square_HW3[top : top + height, left : left + width]))


@torch.inference_mode()
def reconstruct(tokenizer: HybridTokenizer, picture: UInt8[Tensor, "h w 3"]) -> Reconstruction:
    """Encode one picture of the tokenizer's size, decode it by the discrete and by the hybrid path."""
    image = from_uint8(picture)[None]
    tokens = tokenizer.encode(image)
    discrete, hybrid = tokenizer.decode_discrete(tokens.ids), tokenizer.decode(tokens)
    return Reconstruction(
        picture,
        to_uint8(discrete)[0],
        to_uint8(hybrid)[0],
        psnr(discrete, image).item(),
        psnr(hybrid, image).item(),
    )
