"""Reading the pictures that are compared: generated ones as they are, real ones in the generated ones' size

Features depend on the size that a picture had before its network's own resizing, so both sets must come in one. Real
pictures of one size are brought to that of the generated ones, the largest square in their middle; those of mixed
sizes only if that is asked for, because cropping some more than others changes what they show.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from hartist.data.folder import read_image
from hartist.data.transform import BrokenImage, decode
from hartist.errors import UserError


def read_generated(paths: Sequence[Path], size: tuple[int, int]) -> Iterator[UInt8[Tensor, "h w 3"]]:
    """The pictures as they are. Raises UserError if one is broken or not of `size` (height, width)."""
    for path in paths:
        try:
            pixels = torch.from_numpy(np.array(decode(path)))
        except BrokenImage as error:
            raise UserError(
                f"{path} cannot be read as an image ({error}); remove it and run the command again"
            ) from error
        if tuple(pixels.shape[:2]) != size:
            height, width = pixels.shape[:2]
            raise UserError(f"{path} is {height}×{width}, the model's pictures are {size[0]}×{size[1]}; remove it")
        yield pixels


def read_real(paths: Sequence[Path], size: tuple[int, int]) -> Iterator[UInt8[Tensor, "h w 3"]]:
    """The pictures in `size`, the middle of each. Raises UserError for a broken one."""
    height, width = size
    side = max(size)
    top, left = (side - height) // 2, (side - width) // 2
    for path in paths:
        yield torch.from_numpy(read_image(path, side))[top : top + height, left : left + width]


def check_sizes(paths: Sequence[Path]) -> tuple[int, int]:
    """(height, width) of real pictures, of their headers. Raises UserError if they differ or one can't be read."""
    first: tuple[Path, tuple[int, int]] | None = None
    for path in paths:
        try:
            with Image.open(path) as image:
                size = image.height, image.width
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist") from error
        except Exception as error:  # every format's reader has exceptions of its own for damage
            raise UserError(f"{path} cannot be read as an image; replace or remove it") from error
        first = first or (path, size)
        if size != first[1]:
            raise UserError(
                f"the real pictures are of mixed sizes: {first[0].name} is {first[1][0]}×{first[1][1]}, {path.name} "
                f"{size[0]}×{size[1]}; make them alike, or have their middle cut out with --crop"
            )
    if first is None:
        raise UserError("there are no real pictures to compare with")
    return first[1]
