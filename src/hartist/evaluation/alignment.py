"""The alignment network: do a picture and a text agree? Two small heads on frozen image features and text states

    picture → EfficientNet-Lite2, 1280 features ─► head ─► unit vector ┐
                                                                       ├─► inner product
    prompt  → MiniLM, mean of the token states  ─► head ─► unit vector ┘

trained with the symmetric InfoNCE loss on captioned pictures. It is a measuring device for generators, and a device
must not know by heart what it measures. So it trains on the training split without the families (the same thing
in any style, gender or skin tone) that occur in the validation split. What is left out serves to measure:

    unseen_concept   families that neither generator nor heads have seen
    unseen_pair      families the generator knows in other styles; the heads don't know them
    train            pictures that the generator trained on, of these same families: unknown to the heads as well

All kinds of prompts are thus measured by one device that has seen none of them, and the figures of the kinds can be
compared. Heads trained on everything would find each real picture because they remember it, and would measure how
much a generated one looks like that very picture. The price is that the device errs on unseen things. Therefore the
same figure is always reported for real pictures of the same prompts: it is the ceiling, and shows the error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hartist.checkpoint import assign_weights, build_empty, read_component_config, read_weights, save_component
from hartist.config import from_dict
from hartist.errors import UserError
from hartist.evaluation.feature_cache import FeatureCache, cached_rows, digest
from hartist.evaluation.features import FeatureNetwork
from hartist.text.encoder import TextEncoder

KIND = "alignment"
DROPOUT = 0.5
"""As much as this is what makes the heads fit for things they have not seen; with little they learn by heart."""


@dataclass(frozen=True)
class AlignmentConfig:
    """The heads' sizes, and what they were trained on."""

    image_dim: int = 1280
    text_dim: int = 384
    hidden: int = 512
    width: int = 256
    """Of the vectors that are compared."""
    image_network: str = ""
    """`FeatureNetwork.key`."""
    text_encoder: str = ""
    """`TextEncoder.fingerprint()`."""
    image_size: int = 256
    """Pixels along a side of the training pictures; pictures of another size are measured less well."""
    data: str = ""
    """Changes with any picture or caption that was trained on."""
    families: tuple[str, ...] = ()
    """What the heads have seen, and must not be measured on."""


class AlignmentHeads(nn.Module):
    """Two small heads into one space of unit vectors, and how sharply similarities are read."""

    def __init__(self, config: AlignmentConfig) -> None:
        super().__init__()
        self.image = _head(config.image_dim, config)
        self.text = _head(config.text_dim, config)
        self.log_scale = nn.Parameter(torch.tensor(math.log(20.0)))

    def embed_images(self, features_ND: Float[Tensor, "n d"]) -> Float[Tensor, "n e"]:
        return F.normalize(self.image(features_ND), dim=1)

    def embed_texts(self, vectors_MT: Float[Tensor, "m t"]) -> Float[Tensor, "m e"]:
        return F.normalize(self.text(vectors_MT), dim=1)


def _head(dim: int, config: AlignmentConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Dropout(DROPOUT),
        nn.Linear(dim, config.hidden),
        nn.GELU(),
        nn.Dropout(DROPOUT),
        nn.Linear(config.hidden, config.width),
    )


@dataclass(frozen=True)
class Alignment:
    """Heads with the networks in front of them."""

    heads: AlignmentHeads
    config: AlignmentConfig
    network: FeatureNetwork
    encoder: TextEncoder
    cache: Path | None = None
    """Folder of the features of real pictures and of texts."""

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], *, progress: bool = True) -> Float[Tensor, "n e"]:
        return self.heads.embed_texts(text_vectors(self.encoder, texts, self.cache, progress=progress))

    @torch.inference_mode()
    def embed_images(self, features_ND: Float[Tensor, "n d"]) -> Float[Tensor, "n e"]:
        """Vectors of pictures, from their features by `network`."""
        return self.heads.embed_images(features_ND)


def text_vectors(
    encoder: TextEncoder, texts: Sequence[str], cache: Path | None = None, *, progress: bool = True
) -> Float[Tensor, "n t"]:
    """Mean of the encoder's states over each text's tokens; `cache` is a folder."""
    encode = getattr(encoder, "encode_many", encoder.encode)  # in batches where the encoder offers it

    def compute(batch: list[str]) -> Float[Tensor, "b t"]:
        context = encode(batch)
        mask_BS1 = context.mask_BS[..., None]
        return ((context.states_BSC * mask_BS1).sum(1) / mask_BS1.sum(1)).cpu()

    return cached_rows(
        texts,
        lambda text: digest(text.encode()),
        compute,
        FeatureCache(cache, f"text-{encoder.fingerprint()[:16]}"),
        total=len(texts),
        batch_size=64,
        description="captions",
        progress=progress,
    )


def save_alignment(heads: AlignmentHeads, config: AlignmentConfig, directory: Path) -> None:
    """Write config.json and model.safetensors, each atomically."""
    save_component(directory, KIND, config, heads.state_dict())


def load_alignment(
    directory: Path, network: FeatureNetwork, encoder: TextEncoder, cache: Path | None = None
) -> Alignment:
    """Heads, checked to have been trained on this feature network and this text encoder.

    Raises UserError for a missing, damaged or foreign directory, or for other networks.
    """
    where = str(directory / "config.json")
    config = from_dict(AlignmentConfig, read_component_config(directory, KIND), where)
    for name, trained, given in (
        ("image network", config.image_network, network.key),
        ("text encoder", config.text_encoder, encoder.fingerprint()),
    ):
        if trained != given:
            raise UserError(f"{where}: trained on another {name} than is installed; run `hartist evaluate align` again")
    heads = build_empty(lambda: AlignmentHeads(config), where)
    assign_weights(heads, read_weights(directory, torch.float32), str(directory))
    return Alignment(heads, config, network, encoder, cache)
