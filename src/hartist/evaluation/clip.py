"""CLIP networks: pictures and texts as vectors that can be compared (Radford et al. 2021)

ViT-L/14 is OpenAI's, ViT-H/14 LAION's (OpenCLIP), both as the transformers library reads them, from a folder or from
the Hub's cache. A score is only worth comparing with those of the same network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from hartist.errors import UserError
from hartist.evaluation.features import FeatureNetwork
from hartist.evaluation.hub import load_image_processor, load_part, load_pretrained

CLIP_L14, CLIP_H14 = "CLIP ViT-L/14", "CLIP ViT-H/14"
FILES = ("config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors")
TEXTS = 64
"""At once."""


@dataclass(frozen=True)
class TextImageNetwork:
    """A network that compares pictures with texts, by what the rest of the package needs to know of it."""

    name: str
    """As reports name it."""
    images: FeatureNetwork
    """Unit vectors of pictures, as features that can be cached."""
    embed_texts: Callable[[Sequence[str]], Float[Tensor, "n e"]]
    """Unit vectors of texts."""


@dataclass(frozen=True)
class Release:
    """A published network, and what tells it from others."""

    name: str
    repository: str
    patch: int
    width: int
    """Of the vision transformer."""
    projection: int


RELEASES = {
    "clip-vit-l-14": Release(CLIP_L14, "openai/clip-vit-large-patch14", 14, 1024, 768),
    "clip-vit-h-14": Release(CLIP_H14, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", 14, 1280, 1024),
}


def load_clip(
    release: Release, device: torch.device | str = "cpu", source: str | Path | None = None
) -> TextImageNetwork:
    """A CLIP network from a folder, a repository's name, or the release's own repository.

    Raises UserError with the command that gets it if it is absent, or if `source` holds another network.
    """
    from transformers import AutoTokenizer, CLIPModel

    place = release.repository if source is None else source
    network = load_pretrained(CLIPModel, place, release.name, FILES)
    vision = network.config.vision_config
    found = (vision.patch_size, vision.hidden_size, network.config.projection_dim)
    if found != (release.patch, release.width, release.projection):
        raise UserError(f"{place} is not {release.name} (patch, width, projection {found}); give {release.repository}")
    processor = load_image_processor(place, release.name, FILES)
    tokenizer = load_part(AutoTokenizer, place, release.name, FILES)
    key = f"clip-{fingerprint(network)}"
    network = network.to(device)

    @torch.inference_mode()
    def embed_images(pixels_BHW3: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b e"]:
        pixels = [np.ascontiguousarray(picture) for picture in pixels_BHW3.cpu().numpy()]
        prepared = processor(images=pixels, return_tensors="pt", input_data_format="channels_last")
        pooled = network.vision_model(pixel_values=prepared["pixel_values"].to(device)).pooler_output
        return F.normalize(network.visual_projection(pooled), dim=1).cpu()

    @torch.inference_mode()
    def embed_texts(texts: Sequence[str]) -> Float[Tensor, "n e"]:
        """Texts beyond the network's length are cut at their end."""
        rows = []
        for start in range(0, len(texts), TEXTS):
            tokens = tokenizer(
                list(texts[start : start + TEXTS]),
                padding=True,
                truncation=True,
                max_length=network.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(device)
            pooled = network.text_model(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
            rows.append(F.normalize(network.text_projection(pooled), dim=1).cpu())
        return torch.cat(rows)

    return TextImageNetwork(release.name, FeatureNetwork(release.name, key, embed_images), embed_texts)


def fingerprint(network: Any) -> str:
    """Eight hexadecimal digits that change with the weights: of both projections, which no two networks share."""
    content = b"".join(
        layer.weight.cpu().numpy().tobytes() for layer in (network.visual_projection, network.text_projection)
    )
    return hashlib.sha256(content).hexdigest()[:8]
