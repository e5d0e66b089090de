"""From an encoded image to a square of RGB pixels: decoding, cropping, mirroring

The crop keeps the aspect: the largest square of the image, at its centre or anywhere, resized to what is asked.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

Crop = Literal["centre", "random"]
CROPS: tuple[str, ...] = get_args(Crop)


class BrokenImage(Exception):
    """The bytes are no image, or a damaged one; the message says why in a few words."""


def decode(source: bytes | Path) -> Image.Image:
    """An image file as RGB, upright as its EXIF tag says, what is transparent white.

    Raises BrokenImage for whatever is wrong with it.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            image: Image.Image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16"):  # convert() would cut 16 bits off at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                rgba = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise BrokenImage("does not exist") from error
    except UnidentifiedImageError as error:
        raise BrokenImage("not an image") from error
    except Exception as error:  # every format's decoder has exceptions of its own for damage
        raise BrokenImage(str(error).strip().split("\n")[0] or type(error).__name__) from error


def prepare(
    image: Image.Image,
    size: int,
    crop: Crop = "centre",
    flip: bool = False,
    generator: np.random.Generator | None = None,
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The largest square of an RGB image, `size` pixels wide: at the centre, or anywhere along the longer side.

    `flip` mirrors every other image. Both draws come from `generator`, which is needed for them alone.
    """
    side = min(image.size)
    place = 0.5
    if crop == "random":
        assert generator is not None
        place = generator.random()
    left, top = (image.width - side) * place, (image.height - side) * place
    square = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    if flip:
        assert generator is not None
        if generator.random() < 0.5:
            square = ImageOps.mirror(square)
    return np.array(square, dtype=np.uint8)
