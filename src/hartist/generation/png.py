"""Picture files that say how their image was made, and that a machine made it

A PNG has a text chunk named "hartist" with the settings as JSON. Every file carries an XMP packet with the IPTC's
digital source type, which search engines, social networks and photo software read; in JPEG and WebP, which have no
text chunks, the settings are in it too.
"""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import escape, unescape

from PIL import Image, PngImagePlugin

from hartist import __version__
from hartist import config as configs
from hartist.errors import UserError
from hartist.generation.pipeline import Generated

CHUNK = "hartist"
FORMATS = ("PNG", "JPEG", "WEBP")
XMP_CHUNK = "XML:com.adobe.xmp"
JPEG_LIMIT = 65_000
"""Bytes of XMP that fit into a JPEG's segment."""

DIGITAL_SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for what a trained model made (Photo Metadata Standard, Digital Source Type)."""
XMP = """\
<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    xmlns:hartist="urn:hartist:">
   <xmp:CreatorTool>Hartist {version}</xmp:CreatorTool>
   <Iptc4xmpExt:DigitalSourceType>{source}</Iptc4xmpExt:DigitalSourceType>{settings}
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""
SETTINGS = re.compile("<hartist:settings>(.*?)</hartist:settings>", re.DOTALL)


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
    """A generated picture as a PNG file, with `values` in its chunk. The same image and values give the same bytes."""
    info = PngImagePlugin.PngInfo()
    if values is not None:
        info.add_text(CHUNK, json.dumps(values))  # ASCII, which every reader of text chunks understands
    info.add_itxt(XMP_CHUNK, xmp())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def convert_png(png: bytes, kind: Literal["jpeg", "webp"], quality: int) -> bytes:
    """One of Hartist's PNGs in another format, which tells the same.

    A JPEG leaves out settings that don't fit: of prompts of more than five thousand emoji or the like.
    """
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        image.load()  # text chunks may follow the pixels
        packet = xmp(image.info.get(CHUNK)).encode("utf-8")
        if kind == "jpeg" and len(packet) > JPEG_LIMIT:
            packet = xmp().encode("utf-8")
        image.convert("RGB").save(buffer, kind.upper(), quality=quality, xmp=packet)
    return buffer.getvalue()


def xmp(settings: str | None = None) -> str:
    """The XMP packet of a generated picture; `settings` is JSON in ASCII."""
    element = "" if settings is None else f"\n   <hartist:settings>{escape(settings)}</hartist:settings>"
    return XMP.format(version=__version__, source=DIGITAL_SOURCE, settings=element)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `metadata` wrote into a PNG, JPEG or WebP file. Raises UserError if it is not one of Hartist's."""
    try:
        with Image.open(Path(path), formats=FORMATS) as image:
            image.load()
            text = _settings(image)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a picture ({error}); give an image made by Hartist") from error
    try:
        values = json.loads(text) if isinstance(text, str) else None
    except json.JSONDecodeError:
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path} does not say how it was made; give an unedited image made by Hartist")
    return values


def _settings(image: Image.Image) -> Any:
    packet = image.info.get("xmp")
    if CHUNK in image.info or not isinstance(packet, bytes):
        return image.info.get(CHUNK)
    found = SETTINGS.search(packet.decode("utf-8", "replace"))
    return unescape(found[1]) if found else None
