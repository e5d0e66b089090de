"""FID's Inception network: Inception-v3 as TensorFlow released it in 2015, with two ways of resizing pictures to it

Szegedy et al. 2015, with the peculiarities of that release: averages without the padding, a maximum in the last
block's pooling branch, 1008 classes. The weights are those of the files that torch-fidelity and pytorch-fid fetch
(Apache-2.0), under the names they have there. torch-fidelity's own network can't be loaded where torchvision can't,
and reads its file as a pickle.

What a picture is resized by is part of the figure (Parmar et al. 2022):

    clean        bicubic with antialiasing, unrounded, as clean-fid: MJHQ-30K's figures
    tensorflow   TensorFlow 1's bilinear without antialiasing, as torch-fidelity and the ADM suite: ImageNet's
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hartist.checkpoint import build_empty, check_keys
from hartist.errors import UserError
from hartist.evaluation.features import FeatureNetwork, resize
from hartist.interop.pickled import read_pickled

SIDE = 299
NAMES = {"clean": "Inception (clean-fid resizing)", "tensorflow": "Inception (TensorFlow resizing)"}
SHA256 = "6726825d"
"""How the file's sha256 begins, which is also in its name."""
FILES = (f"weights-inception-2015-12-05-{SHA256}.pth", f"pt_inception-2015-12-05-{SHA256}.pth")
"""What torch-fidelity and pytorch-fid call it in the torch hub's folder: the same tensors."""
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILES[0]}"

Layer = tuple[int, int | tuple[int, int]]
"""Channels and kernel."""


class ConvNorm(nn.Module):
    """A convolution without bias, batch norm, ReLU."""

    def __init__(self, width: int, out: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True) -> None:
        super().__init__()
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (size[0] // 2, size[1] // 2) if pad and stride == 1 else 0
        self.conv = nn.Conv2d(width, out, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x_BCHW)), inplace=True)


class Mixed(nn.Module):
    """Branches side by side: chains of convolutions, and pooling last.

    A chain of several is numbered from 1; where it ends in two kernels (a list), their results go side by side.
    `stride` 2 halves the map: the chains' last convolutions and the pooling have it.
    """

    def __init__(
        self, width: int, chains: dict[str, list[Layer | list[Layer]]], pool: int, stride: int = 1, peak: bool = False
    ) -> None:
        """`pool`: channels of the convolution after pooling, 0 for none. `peak`: maxima, not means, at stride 1."""
        super().__init__()
        self.chains: list[list[list[str]]] = []
        self.stride, self.peak = stride, peak
        for chain, layers in chains.items():
            names: list[list[str]] = []
            channels = width
            for i, layer in enumerate(layers, start=1):
                parts = layer if isinstance(layer, list) else [layer]
                number = "" if len(layers) == 1 else f"_{i}"
                names.append([f"branch{chain}{number}{'ab'[j] if len(parts) > 1 else ''}" for j in range(len(parts))])
                for name, (out, kernel) in zip(names[-1], parts, strict=True):
                    setattr(self, name, ConvNorm(channels, out, kernel, stride if i == len(layers) else 1))
                channels = sum(out for out, _ in parts)
            self.chains.append(names)
        self.branch_pool = ConvNorm(width, pool, 1) if pool else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        found = []
        for chain in self.chains:
            x = x_BCHW
            for names in chain:
                x = torch.cat([getattr(self, name)(x) for name in names], 1)
            found.append(x)
        if self.stride == 2:
            pooled = F.max_pool2d(x_BCHW, 3, 2)
        elif self.peak:
            pooled = F.max_pool2d(x_BCHW, 3, 1, 1)
        else:
            pooled = F.avg_pool2d(x_BCHW, 3, 1, 1, count_include_pad=False)
        return torch.cat([*found, pooled if self.branch_pool is None else self.branch_pool(pooled)], 1)


def _a(width: int, pool: int) -> Mixed:
    return Mixed(width, {"1x1": [(64, 1)], "5x5": [(48, 1), (64, 5)], "3x3dbl": [(64, 1), (96, 3), (96, 3)]}, pool)


def _c(middle: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    double: list[Layer | list[Layer]] = [(middle, 1), (middle, column), (middle, row), (middle, column), (192, row)]
    return Mixed(
        768, {"1x1": [(192, 1)], "7x7": [(middle, 1), (middle, row), (192, column)], "7x7dbl": double}, pool=192
    )


def _e(width: int, peak: bool) -> Mixed:
    ends: list[Layer] = [(384, (1, 3)), (384, (3, 1))]
    return Mixed(
        width, {"1x1": [(320, 1)], "3x3": [(384, 1), ends], "3x3dbl": [(448, 1), (384, 3), ends]}, 192, peak=peak
    )


class Inception(nn.Module):
    """Pictures of 299×299 in [−1, 1] → 2048 pooled features; `fc` makes logits of them."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = Mixed(288, {"3x3": [(384, 3)], "3x3dbl": [(64, 1), (96, 3), (96, 3)]}, 0, stride=2)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _c(128), _c(160), _c(160), _c(192)
        chains: dict[str, list[Layer | list[Layer]]] = {
            "3x3": [(192, 1), (320, 3)],
            "7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)],
        }
        self.Mixed_7a = Mixed(768, chains, 0, stride=2)
        self.Mixed_7b, self.Mixed_7c = _e(1280, peak=False), _e(2048, peak=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x_B3HW: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 2048"]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x_B3HW)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))


def fold_norms(network: Inception) -> None:
    """Each batch norm goes into its convolution: the same features, sooner."""
    for module in network.modules():
        if isinstance(module, ConvNorm):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()  # type: ignore[assignment]


def resize_like_tensorflow(pixels_BHW3: UInt8[Tensor, "b h w 3"], side: int) -> Float[Tensor, "b 3 {side} {side}"]:
    """TensorFlow 1's bilinear resizing without aligned corners: pixel i is taken at i·(from/to), still 0..255."""
    x = pixels_BHW3.movedim(-1, 1).float()
    for dim in (2, 3):
        size = x.shape[dim]
        at_s = torch.arange(side, device=x.device) * torch.tensor(size / side, device=x.device)
        low_s = at_s.long()
        low, high = (x.index_select(dim, index) for index in (low_s, (low_s + 1).clamp(max=size - 1)))
        x = low + (high - low) * (at_s - low_s).view([-1 if d == dim else 1 for d in range(4)])
    return x


def find_inception() -> Path:
    """The weights in the torch hub's folder; UserError with the command that gets them."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"FID's Inception network is not here; run: curl -L --create-dirs -o {folder / FILES[0]} {URL} "
        "(or measure with lite0, whose distances are no FID)"
    )


def load_inception(
    device: torch.device | str = "cpu",
    weights: Path | None = None,
    resizing: Literal["clean", "tensorflow"] = "clean",
) -> FeatureNetwork:
    """FID's network: 2048 pooled features and the 1008 logits without their bias, from which the Inception Score is.

    `weights` is the file, by default where torch-fidelity or pytorch-fid would have put it. Raises UserError if it is
    absent, or not FID's network.
    """
    path = weights if weights is not None else find_inception()
    if not path.is_file():
        raise UserError(f"{path} does not exist; get it with: curl -L --create-dirs -o {path} {URL}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(SHA256):
        raise UserError(
            f"{path} is not FID's Inception network (sha256 {found[:8]}…, not {SHA256}…); get it from {URL}"
        )
    tensors = {key: tensor.float() for key, tensor in read_pickled(path).items() if "num_batches" not in key}
    network = build_empty(Inception, str(path))
    expected = {key: tensor for key, tensor in network.state_dict().items() if "num_batches" not in key}
    check_keys(expected, tensors, str(path))
    network.load_state_dict(tensors, strict=False, assign=True)
    fold_norms(network.eval().requires_grad_(False))
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    shrink = resize if resizing == "clean" else resize_like_tensorflow

    @torch.inference_mode()
    def compute(pixels_BHW3: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b 2048"]:
        x_B3HW = (shrink(pixels_BHW3.to(device), SIDE) - 128) / 128
        return network(x_B3HW.contiguous(memory_format=torch.channels_last)).cpu()

    @torch.inference_mode()
    def logits(features_BD: Float[Tensor, "b 2048"]) -> Float[Tensor, "b 1008"]:
        return (features_BD.to(device) @ network.fc.weight.T).cpu()

    return FeatureNetwork(NAMES[resizing], f"inception-{SHA256}-{resizing}", compute, logits)
