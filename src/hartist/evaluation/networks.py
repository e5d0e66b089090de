"""The networks behind metrics, by the names that the command line and results know them by

lite0, lite2            EfficientNet-Lite: small, packaged, good for distances on any machine; never called FID
inception               FID's network, pictures resized as clean-fid does (MJHQ-30K's figures)
inception-tensorflow    the same, resized as TensorFlow 1 did (ImageNet's figures: torch-fidelity, the ADM suite)
clip-vit-l-14, …h-14    CLIP: pictures beside texts
alignment               the heads that `hartist evaluate align` trains: pictures beside texts; never called CLIP
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from hartist.errors import UserError, quoted
from hartist.evaluation.alignment import Alignment, load_alignment
from hartist.evaluation.clip import RELEASES, TextImageNetwork, load_clip
from hartist.evaluation.features import LITE0, LITE2, FeatureNetwork, load_feature_network
from hartist.evaluation.inception import NAMES, load_inception
from hartist.generation.loading import find_model
from hartist.text.encoder import TextEncoder
from hartist.text.loading import load_text_encoder

NETWORKS = {
    "lite0": LITE0,
    "lite2": LITE2,
    "inception": NAMES["clean"],
    "inception-tensorflow": NAMES["tensorflow"],
}
"""Networks of pictures alone, and how reports name them."""
ALIGNMENT = "alignment heads"
TEXT_IMAGE_NETWORKS = {name: release.name for name, release in RELEASES.items()} | {"alignment": ALIGNMENT}


def load_network(name: str, device: torch.device | str = "cpu", weights: Path | None = None) -> FeatureNetwork:
    """A network of pictures; `weights` is Inception's file, by default looked for in the torch hub's folder.

    Raises UserError with the command that gets it if it is absent or not the known one, or for an unknown name.
    """
    if name not in NETWORKS:
        raise UserError(f"no network {quoted(name)} of pictures; there are {', '.join(NETWORKS)}")
    if name == "inception":
        return load_inception(device, weights, "clean")
    if name == "inception-tensorflow":
        return load_inception(device, weights, "tensorflow")
    return load_feature_network(NETWORKS[name], device)


def load_text_image(
    name: str, device: torch.device | str = "cpu", source: str | Path | None = None, cache: Path | None = None
) -> TextImageNetwork:
    """A network that compares pictures with texts.

    `source`: for CLIP a folder or a repository's name instead of its own; for the alignment heads the folder that
    `hartist evaluate align` wrote. `cache`: where the heads' text vectors are kept.
    Raises UserError with the command that gets it if it is absent or another one, or for an unknown name.
    """
    if name in RELEASES:
        return load_clip(RELEASES[name], device, source)
    if name != "alignment":
        raise UserError(f"no network {quoted(name)} of pictures and texts; there are {', '.join(TEXT_IMAGE_NETWORKS)}")
    if source is None:
        raise UserError("the alignment heads' folder is missing; train them with hartist evaluate align, and give it")
    encoder: TextEncoder = load_text_encoder(find_model(None) / "text_encoder")
    return compare_by_heads(load_alignment(Path(source), load_feature_network(LITE2, device), encoder, cache))


def compare_by_heads(alignment: Alignment) -> TextImageNetwork:
    """The alignment heads behind the interface of CLIP networks."""
    state = hashlib.sha256()
    for key, tensor in sorted(alignment.heads.state_dict().items()):
        state.update(key.encode() + tensor.float().cpu().numpy().tobytes())

    def embed_images(pixels_BHW3: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b e"]:
        return alignment.embed_images(alignment.network.compute(pixels_BHW3))

    def embed_texts(texts: Sequence[str]) -> Float[Tensor, "n e"]:
        return alignment.embed_texts(texts, progress=False)

    key = f"alignment-{state.hexdigest()[:8]}"
    return TextImageNetwork(ALIGNMENT, FeatureNetwork(ALIGNMENT, key, embed_images), embed_texts)
