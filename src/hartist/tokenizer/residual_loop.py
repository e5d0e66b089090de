"""THE residual loop: how token maps of K scales add up to a latent (paper section 3.1; VAR algorithms 1 and 2).

Encoding, teacher forcing and generation all run this one loop; they differ only in who chooses the
vectors of a scale. All arithmetic is float32, whatever the networks around it use.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hartist.scales import ScaleSchedule


@dataclass(frozen=True)
class Phi:
    """The φ convolutions: φ(x) = (1−r)·x + r·conv(x). r = 0 (no weights) is the identity."""

    weights: Sequence[Float[Tensor, "c c 3 3"]]
    biases: Sequence[Float[Tensor, " c"]]
    ratio: float
    count: int

    def __call__(self, x_BChw: Float[Tensor, "b c h w"], k: int, schedule: ScaleSchedule) -> Tensor:
        if not self.weights:
            return x_BChw
        i = phi_index(k, len(schedule), self.count)
        conv_BChw = _steady_conv(x_BChw, self.weights[i].float(), self.biases[i].float())
        return (1 - self.ratio) * x_BChw + self.ratio * conv_BChw


def _steady_conv(x_BChw: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3×3 convolution whose result for an image does not depend on the batch it is in.

    For a single image CPU kernels may choose another order of summation, so it is given twice.
    """
    if len(x_BChw) > 1 or x_BChw.device.type != "cpu" or torch.is_grad_enabled():
        return F.conv2d(x_BChw, weight, bias, padding=1)
    return F.conv2d(torch.cat([x_BChw, x_BChw]), weight, bias, padding=1)[:1]


def phi_index(k: int, num_scales: int, num_phi: int) -> int:
    """Which of `num_phi` convolutions serves scale k: the tick nearest to k/(K−1), the first on a tie.

    The ticks are float64, as ties are decided by their rounding (K = 5: 0 1 2 2 3).
    """
    margin = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    ticks = np.linspace(margin, 1 - margin, num_phi)
    fraction = k / (num_scales - 1) if num_scales > 1 else 0.0
    return int(np.argmin(np.abs(ticks - fraction)))


@dataclass(frozen=True)
class ScaleStep:
    """One turn of the loop: scale k added `update` to f_hat."""

    k: int
    update_BChw: Float[Tensor, "b c h w"]
    f_hat_BChw: Float[Tensor, "b c h w"]


def area_downsample(x_BChw: Float[Tensor, "b c h w"], grid: tuple[int, int]) -> Float[Tensor, "b c p q"]:
    """Adaptive average pooling with overlapping integer windows; the finest grid passes unchanged."""
    if tuple(x_BChw.shape[-2:]) == grid:
        return x_BChw
    return F.interpolate(x_BChw, size=grid, mode="area")


def map_to_tokens(x_BChw: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l c"]:
    """Cells in row order."""
    return x_BChw.flatten(2).transpose(1, 2)


def tokens_to_map(x_BlC: Float[Tensor, "b l c"], grid: tuple[int, int]) -> Float[Tensor, "b c h w"]:
    return x_BlC.transpose(1, 2).unflatten(2, grid)


def upsample(x_BChw: Float[Tensor, "b c p q"], grid: tuple[int, int]) -> Float[Tensor, "b c h w"]:
    """Bicubic, align_corners=False, without antialiasing; the finest grid passes unchanged."""
    if tuple(x_BChw.shape[-2:]) == grid:
        return x_BChw
    return F.interpolate(x_BChw, size=grid, mode="bicubic")


def residual_loop(
    choose: Callable[[int, Float[Tensor, "b c h w"]], Float[Tensor, "b l c"]],
    f_hat_BChw: Float[Tensor, "b c h w"],
    schedule: ScaleSchedule,
    phi: Phi,
    *,
    phi_at_last_scale: bool,
) -> Generator[ScaleStep, Tensor | None, None]:
    """Add scale after scale to `f_hat_BChw` (zeros at the start), yielding after each.

    `choose(k, f_hat)` returns the vectors of scale k, cells in row order: the nearest codes of what
    is left (encoding), the codes of known ids (teacher forcing), or what the transformer samples.
    VAR and tokenizer training apply φ at the last scale too; HART's hybrid tokens do not. An f_hat that is
    sent in takes the place of the loop's own: fewer images, when some are no longer wanted.
    """
    for k, grid in enumerate(schedule.grids):
        vectors_BlC = choose(k, f_hat_BChw)
        update_BChw = upsample(tokens_to_map(vectors_BlC.float(), grid), schedule.finest)
        if phi_at_last_scale or not schedule.is_last(k):
            update_BChw = phi(update_BChw, k, schedule)
        f_hat_BChw = f_hat_BChw + update_BChw
        sent = yield ScaleStep(k, update_BChw, f_hat_BChw)
        f_hat_BChw = f_hat_BChw if sent is None else sent


def nearest_codes(z_BlC: Float[Tensor, "b l c"], codebook_VC: Float[Tensor, "v c"]) -> Int[Tensor, "b l"]:
    """Ids of the codes nearest in L2, first on a tie."""
    z_NC = z_BlC.reshape(-1, z_BlC.shape[-1])
    distance_NV = z_NC.square().sum(1, keepdim=True) + codebook_VC.square().sum(1)
    distance_NV = torch.addmm(distance_NV, z_NC, codebook_VC.T, alpha=-2)
    return distance_NV.argmin(1).view(z_BlC.shape[:2])
