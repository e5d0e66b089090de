"""From the art as it is shipped (WebP with transparency, SVG bodies) to square RGB images on a flat background."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageColor

from hartist.errors import UserError

# SVG is drawn this many times larger than wanted, then reduced by the same Lanczos filter that reduces the
# WebP art, so that the styles do not differ in sharpness by accident of the renderer.
SUPERSAMPLING = 2


WHITE = "#ffffff"


def flatten_square(image: Image.Image, size: int, background: str = WHITE) -> Image.Image:
    """Composite over a colour, pad to a centred square, resize to `size` × `size` RGB.

    Compositing comes first: resizing colour and alpha apart would bleed the colour of invisible pixels
    into the edges. Padding, not stretching, keeps the proportions of the few files that are not square.
    """
    rgba = image.convert("RGBA")
    side = max(rgba.size)
    canvas = Image.new("RGBA", (side, side), (*ImageColor.getrgb(background)[:3], 255))
    canvas.alpha_composite(rgba, ((side - rgba.width) // 2, (side - rgba.height) // 2))
    rgb = canvas.convert("RGB")
    return rgb if side == size else rgb.resize((size, size), Image.Resampling.LANCZOS)


def render_raster(data: bytes, size: int, background: str = WHITE) -> Image.Image:
    """Decode an image file held in memory to `size` × `size` RGB on a flat background."""
    with Image.open(io.BytesIO(data)) as image:
        return flatten_square(image, size, background)


def icon_svg(icons: Mapping[str, Any], name: str) -> str:
    """The SVG document of one icon of an Iconify set, its view box widened to a centred square.

    `icons` is the set's JSON: {"icons": {name: {"body": …, optional left, top, width, height}}, and the
    same four keys again as defaults}. Raises KeyError if the set has no such icon.
    """
    icon = icons["icons"][name]
    left, top, width, height = (
        float(icon.get(key, icons.get(key, default)))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    side = max(width, height)
    left, top = left - (side - width) / 2, top - (side - height) / 2
    box = f'width="{side:g}" height="{side:g}" viewBox="{left:g} {top:g} {side:g} {side:g}"'
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f"<svg {spaces} {box}>{icon['body']}</svg>"


def render_svg(svg: str, size: int, background: str = WHITE) -> Image.Image:
    """Draw a square SVG document as `size` × `size` RGB on a colour; raises UserError without resvg_py."""
    try:
        import resvg_py
    except ImportError as error:
        raise UserError(
            "resvg-py is needed to draw SVG emoji; install it with `pip install 'hartist[train]'`"
        ) from error
    side = size * SUPERSAMPLING
    # System fonts would make the result depend on the machine (and none of the icons holds text).
    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    return render_raster(bytes(png), size, background)
