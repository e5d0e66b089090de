"""PNG files that say how their image was made: one text chunk named "hartist", holding JSON."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from hartist import __version__
from hartist import config as configs
from hartist.errors import UserError
from hartist.generation.pipeline import Generated

CHUNK = "hartist"


def metadata(generated: Generated) -> dict[str, Any]:
    """What it takes to make the image again: prompts, seed, model, sampling settings, version."""
    return {
        "prompt": generated.prompt,
        "negative_prompt": generated.negative_prompt,
        "seed": generated.seed,
        "model": generated.model,
        "settings": configs.to_dict(generated.settings),
        "hartist": __version__,
    }


def encode_png(image: Image.Image, values: dict[str, Any] | None = None) -> bytes:
    """The bytes of a PNG file with `values` in its chunk. The same image and values give the same bytes."""
    info = PngImagePlugin.PngInfo()
    if values is not None:
        info.add_text(CHUNK, json.dumps(values))  # ASCII, which every reader of text chunks understands
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `metadata` wrote into a file. Raises UserError if it is no PNG or not one of Hartist's."""
    try:
        with Image.open(Path(path), formats=["PNG"]) as image:
            image.load()  # text chunks may follow the pixels
            text = image.info.get(CHUNK)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a PNG ({error}); give an image made by Hartist") from error
    try:
        values = json.loads(text) if isinstance(text, str) else None
    except json.JSONDecodeError:
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path} does not say how it was made; give an unedited image made by Hartist")
    return values
