"""LPIPS: a perceptual distance with learned channel weights, where VGG-16's ImageNet weights are at hand"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hartist.checkpoint import read_safetensors
from hartist.errors import UserError
from hartist.interop.pickled import read_pickled
from hartist.training.vgg import block_features

LINEAR_FILE = "lpips/weights/v0.1/vgg.pth"
"""The learned weights inside the `lpips` package (BSD-2-Clause)."""
TRUNK_FILE = "vgg16-397923af.pth"
"""Under which name torchvision keeps VGG-16 in the torch hub's folder."""
CONVS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Numbers of the convolutions in `features`, by block: judged are relu1_2, 2_2, 3_3, 4_3 and 5_3."""
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""From [−1, 1] to what the trunk was trained on; LPIPS v0.1 rounds ImageNet's mean and deviation so."""


class LpipsLoss(nn.Module):
    """Σ over blocks of the mean over cells of Σ_c w_c (a_c − b_c)² (Zhang et al. 2018, section 3.1); frozen.

    `trunk` has torchvision's keys `features.N.{weight,bias}`, `linear` the package's `linN.model.1.weight`.
    Raises UserError naming `where` if a tensor is missing or doesn't fit.
    """

    def __init__(self, trunk: Mapping[str, Tensor], linear: Mapping[str, Tensor], where: str) -> None:
        super().__init__()

        def take(tensors: Mapping[str, Tensor], key: str, *shape: int) -> Tensor:
            tensor = tensors.get(key)
            if tensor is None or tensor.shape[1:] != shape[1:] or tensor.shape[0] != (shape[0] or tensor.shape[0]):
                found = "is not there" if tensor is None else f"is {list(tensor.shape)}"
                raise UserError(f"{where}: {key!r} {found}; give torchvision's VGG-16 without BatchNorm")
            return tensor.float()

        self.convs = nn.ModuleList()
        width = 3
        for block, numbers in enumerate(CONVS):
            for number in numbers:
                weight = take(trunk, f"features.{number}.weight", 0, width, 3, 3)
                conv = nn.Conv2d(width, len(weight), 3, padding=1)
                width = len(weight)
                conv.load_state_dict({"weight": weight, "bias": take(trunk, f"features.{number}.bias", width)})
                self.convs.append(conv)
            weights = take(linear, f"lin{block}.model.1.weight", 1, width, 1, 1)
            self.register_buffer(f"weights_{block}", weights.clone())
        self.requires_grad_(False)

    def features(self, image: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _c _h _w"]]:
        """Unit-normalised features of images in [−1, 1]."""
        shift, scale = (image.new_tensor(values).view(1, 3, 1, 1) for values in (SHIFT, SCALE))
        return list(block_features((image - shift) / scale, self.convs, map(len, CONVS)))

    def distances(self, image: Float[Tensor, "b 3 h w"], target: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
        """Of each pair of images in [−1, 1]; gradients reach the first alone."""
        with torch.no_grad():
            wanted = self.features(target)
        blocks = [
            ((a - b).square() * self.get_buffer(f"weights_{block}")).sum(1).mean((1, 2))
            for block, (a, b) in enumerate(zip(self.features(image), wanted, strict=True))
        ]
        return torch.stack(blocks).sum(0)

    def forward(self, image: Float[Tensor, "b 3 h w"], target: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
        return self.distances(image, target).mean()


def find_linear() -> Path:
    """Where the `lpips` package keeps its learned weights; UserError with the remedy if it isn't installed."""
    try:
        path = Path(str(metadata.distribution("lpips").locate_file(LINEAR_FILE)))
    except metadata.PackageNotFoundError:
        path = Path()
    if not path.is_file():
        raise UserError(
            "LPIPS needs the package lpips for its learned weights: pip install --no-deps lpips==0.1.4 "
            "(or use the perceptual loss hed-vgg)"
        )
    return path


def load_lpips(trunk: Path | None = None) -> LpipsLoss:
    """LPIPS with the trunk in a file (.pth or .safetensors), by default where torchvision would have put it.

    Raises UserError with the remedy if the trunk or the package `lpips` is absent, or the trunk another network.
    """
    linear = find_linear()
    path = trunk if trunk is not None else Path(torch.hub.get_dir()) / "checkpoints" / TRUNK_FILE
    if not path.is_file():
        raise UserError(
            f"LPIPS needs torchvision's VGG-16 ({TRUNK_FILE}), and {path} does not exist; "
            "give the path of a copy (or use the perceptual loss hed-vgg)"
        )
    tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_pickled(path)
    return LpipsLoss(tensors, read_pickled(linear), str(path))
