"""Pictures that visitors send, encoded and decoded again on a worker; the files are opened here and nowhere else"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from hartist.data.transform import BrokenImage, decode, prepare
from hartist.errors import UserError
from hartist.evaluation.side_by_side import middle, picture_size, reconstruct
from hartist.pixels import png_bytes
from hartist.serving.tasks import Event, Failed, Reconstructed, ReconstructTask
from hartist.tokenizer.hybrid import HybridTokenizer

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 32_000_000
"""Decoded this is 100 MB, and several times that where there is transparency."""


def reconstruct_pictures(
    tokenizer: HybridTokenizer,
    tasks: Sequence[ReconstructTask],
    cancelled: Callable[[], set[str]],
    emit: Callable[[Event], None],
) -> None:
    """One after the other; a file that is no picture fails alone. `cancelled` is asked before each."""
    device = tokenizer.quantizer.codebook.device
    for task in tasks:
        if task.id in cancelled():
            continue
        try:
            result = reconstruct(tokenizer, read_upload(task.picture, *picture_size(tokenizer)).to(device))
        except UserError as error:
            emit(Failed(task.id, str(error)))
            continue
        emit(
            Reconstructed(
                task.id,
                _png(result.hybrid),
                original=_png(result.original),
                discrete=_png(result.discrete),
                discrete_psnr=result.discrete_psnr,
                hybrid_psnr=result.hybrid_psnr,
            )
        )


def read_upload(data: bytes, height: int, width: int) -> UInt8[Tensor, "{height} {width} 3"]:
    """A PNG, JPEG or WebP file as RGB on white, the middle of it, resized.

    Size and format are checked before a pixel is decoded. Raises UserError for what is none of these, broken or larger
    than MAX_PIXELS.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            pixels = file.width * file.height
        if pixels <= MAX_PIXELS:
            return middle(prepare(decode(data), max(height, width)), height, width)
    except UnidentifiedImageError as error:
        raise UserError("this file is no PNG, JPEG or WebP picture; choose another one") from error
    except (BrokenImage, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError("this picture is damaged or too large; choose another one") from error
    raise UserError(f"this picture has {pixels / 1e6:.0f} megapixels; choose one with at most {MAX_PIXELS // 10**6}")


def _png(pixels: UInt8[Tensor, "h w 3"]) -> bytes:
    return png_bytes(Image.fromarray(pixels.cpu().numpy()))
