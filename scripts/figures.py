"""Draw the README's pictures with the bundled model: python scripts/figures.py [DATASET]

DATASET is the folder that `hartist data emoji` wrote; without it the reconstruction picture stays as it is.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from hartist import Pipeline
from hartist.commands.reconstruct import reconstruct
from hartist.data.folder import load_captioned_folder, read_image
from hartist.generation.pipeline import make_requests
from hartist.generation.png import encode_png
from hartist.pixels import grid_image, png_bytes

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
SEED = 7
PROMPTS = [
    "red apple, 3d",
    "grinning face, flat",
    "sunflower, flat",
    "auto rickshaw, flat",
    "cherry blossom, 3d",
    "penguin, noto",
    "red heart, 3d",
    "pizza, flat",
    "watermelon, noto",
    "snowman, 3d",
    "frog, flat",
    "jack-o-lantern, noto",
]
COLUMNS = 6
CELL, CAPTION = 192, 30
STEP = 128
"""Side of the pictures that show a scale."""


def captioned(images: list[Image.Image], captions: list[str]) -> Image.Image:
    """Pictures in rows with their captions underneath."""
    rows = -(-len(images) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (CELL + 8), rows * (CELL + CAPTION + 8)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(i, COLUMNS)
        x, y = column * (CELL + 8) + 4, row * (CELL + CAPTION + 8)
        sheet.paste(image.resize((CELL, CELL), Image.Resampling.LANCZOS), (x, y))
        text = "\n".join(textwrap.wrap(caption, 36)[:2])
        draw.multiline_text((x + CELL // 2, y + CELL + 2), text, fill="#444", font=font, anchor="ma", align="center")
    return sheet


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    pipe = Pipeline.from_pretrained(device="cpu")
    made = list(pipe.generate(make_requests(PROMPTS, 1, SEED), save_scales=True))
    (IMAGES / "samples.png").write_bytes(encode_png(captioned([item.image for item in made], PROMPTS)))
    small = [[image.resize((STEP, STEP), Image.Resampling.LANCZOS) for image in item.scale_images] for item in made[:3]]
    strips = [[torch.from_numpy(np.array(image)) for image in row] for row in small]
    (IMAGES / "scales.png").write_bytes(encode_png(grid_image(strips)))
    if len(sys.argv) > 1:
        size = pipe.image_size[0]
        items = load_captioned_folder(Path(sys.argv[1]), "validation")
        held_out = [item for item in items if item.extra["style"] == "3d"]
        rows = []
        for item in held_out[5::40][:3] + held_out[25::40][:3]:
            result = reconstruct(pipe.tokenizer, torch.from_numpy(read_image(item.path, size)))
            rows.append([result.original, result.discrete, result.hybrid])
        pairs = [rows[i] + rows[i + 1] for i in range(0, len(rows) - 1, 2)]
        (IMAGES / "reconstruction.png").write_bytes(png_bytes(grid_image(pairs)))


if __name__ == "__main__":
    main()
