"""Pixels and tensors: 8-bit conversion and grids of pictures."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from hartist.files import write_bytes


def to_uint8(image: Float[Tensor, "*b 3 h w"]) -> UInt8[Tensor, "*b h w 3"]:
    """[−1, 1] → 0..255, rounded to nearest."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1)


def from_uint8(pixels: UInt8[Tensor, "*b h w 3"]) -> Float[Tensor, "*b 3 h w"]:
    """0..255 → [−1, 1]."""
    return pixels.movedim(-1, -3).float() / 127.5 - 1


def grid_image(rows: list[list[UInt8[Tensor, "h w 3"]]], gap: int = 4) -> Image.Image:
    """Rows of equally sized images, white between them."""
    h, w = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (w + gap) - gap, len(rows) * (h + gap) - gap), "white")
    for i, row in enumerate(rows):
        for j, pixels in enumerate(row):
            sheet.paste(Image.fromarray(pixels.cpu().numpy()), (j * (w + gap), i * (h + gap)))
    return sheet


def save_grid(path: Path, rows: list[list[UInt8[Tensor, "h w 3"]]]) -> None:
    """Write a grid as PNG, atomically."""
    write_bytes(path, png_bytes(grid_image(rows)))


def png_bytes(image: Image.Image) -> bytes:
    """Encode as PNG, without metadata."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
