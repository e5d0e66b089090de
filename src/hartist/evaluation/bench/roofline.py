"""The roofline: how fast this machine multiplies matrices, and the share of that which a generation reaches"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hartist.config import TransformerConfig
from hartist.evaluation.bench.macs import Work
from hartist.evaluation.bench.timing import Timing
from hartist.generation.devices import now

SQUARES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384)}
OTHER_SQUARES = (2048, 4096)
"""Sides of the square matrices that are tried, by kind of device."""
SECONDS = 0.2
"""How long each shape is multiplied again and again."""
SLOW = 2.0
"""Seconds of a single product from which larger squares are left out."""


@dataclass(frozen=True)
class Product:
    """A matrix product and how fast it ran at best."""

    name: str
    rows: int
    inner: int
    columns: int
    flops_per_second: float


@dataclass(frozen=True)
class MachinePeak:
    """What was measured of this machine in one dtype."""

    dtype: str
    squares: tuple[Product, ...]
    layers: tuple[Product, ...]
    """The linear layers of a block, at the rows of the last scale."""

    @property
    def flops_per_second(self) -> float:
        """The fastest product of all: what is called the peak."""
        return max(product.flops_per_second for product in (*self.squares, *self.layers))

    @property
    def layers_flops_per_second(self) -> float:
        """All linear layers of a block one after the other."""
        work = [product.rows * product.inner * product.columns for product in self.layers]
        seconds = [w / product.flops_per_second for w, product in zip(work, self.layers, strict=True)]
        return sum(work) / sum(seconds)


@dataclass(frozen=True)
class Share:
    """A part of the generation against the peak."""

    part: str
    seconds: float
    tera_macs: float
    flops_per_second: float
    share: float
    """Of the peak, 0 to 1."""
    lost_seconds: float
    """More than the part would take at the peak."""
    loss: float
    """Part of all lost seconds, 0 to 1."""


def measure_peak(config: TransformerConfig, rows: int, dtype: torch.dtype, device: torch.device) -> MachinePeak:
    """Multiply squares, and the linear layers of a block with `rows` tokens."""
    squares: list[Product] = []
    for side in SQUARES.get(device.type, OTHER_SQUARES):
        if squares and 2 * side**3 / squares[-1].flops_per_second > SLOW:
            break
        squares.append(measure_product(f"{side}²", side, side, side, dtype, device, SECONDS))
    D, hidden = config.width, config.mlp_hidden
    shapes = [("qkv", D, 3 * D), ("proj", D, D)]
    shapes += [("gate", D, hidden), ("up", D, hidden)] if config.mlp == "swiglu" else [("fc1", D, hidden)]
    shapes += [("down" if config.mlp == "swiglu" else "fc2", hidden, D)]
    layers = [measure_product(name, rows, a, b, dtype, device, SECONDS) for name, a, b in shapes]
    return MachinePeak(str(dtype).removeprefix("torch."), tuple(squares), tuple(layers))


def measure_product(
    name: str, rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device, seconds: float
) -> Product:
    """The best of many runs of rows×inner times the transpose of columns×inner, as a linear layer has it."""
    x = torch.ones(rows, inner, dtype=dtype, device=device)
    weight = torch.ones(columns, inner, dtype=dtype, device=device)
    best = float("inf")
    with torch.inference_mode():
        F.linear(x, weight)
        end = now(device) + seconds
        while True:
            start = now(device)
            F.linear(x, weight)
            after = now(device)
            best = min(best, after - start)
            if after >= end:
                return Product(name, rows, inner, columns, 2.0 * rows * inner * columns / best)


def shares(timing: Timing, work: Work, peak: float, names: Sequence[str]) -> list[Share]:
    """Every part, then the whole. `names` are those of the scales; `peak` is in FLOP/s.

    What is neither a scale, residual tokens nor the decoder is called "between": encoding, copies, the loop.
    """
    parts = [
        (name, seconds.median, macs.total)
        for name, seconds, macs in zip(names, timing.scales, work.scales, strict=True)
    ]
    parts += [("residual", timing.residual.median, work.residual.total)]
    parts += [("decoder", timing.decode.median, work.decode.total)]
    whole = timing.total.median
    parts += [("between", max(0.0, whole - sum(seconds for _, seconds, _ in parts)), 0.0)]
    lost_in_all = whole - work.total.flops / peak
    found = []
    for name, seconds, macs in [*parts, ("whole", whole, work.total.total)]:
        rate = 2 * macs / seconds if seconds else 0.0
        lost = seconds - 2 * macs / peak
        found.append(Share(name, seconds, macs / 1e12, rate, rate / peak, lost, lost / lost_in_all))
    return found
