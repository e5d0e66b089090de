"""Randomness of generation: one generator per image, so that an image depends on its seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Noise(Protocol):
    """Where the scale loop gets its random numbers; every call draws anew."""

    def uniform(self, tokens: int) -> Float[Tensor, "b {tokens}"]:
        """In [0, 1), for choosing token ids."""
        ...

    def gumbel(self, tokens: int, codes: int) -> Float[Tensor, "b {tokens} {codes}"]:
        """For soft mixing of code vectors."""
        ...

    def normal(self, tokens: int, channels: int) -> Float[Tensor, "_n {channels}"]:
        """For diffusion: rows are (image, cell)."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these images alone, in this order."""
        ...


class ImageNoise:
    """One CPU generator per image, whatever the device: the same seed gives the same numbers everywhere."""

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        # 64-bit seeds wrap, as users type any integer
        self.generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
        self.device = device

    def uniform(self, tokens: int) -> Tensor:
        drawn = [torch.rand(tokens, generator=g, dtype=torch.float64) for g in self.generators]
        return torch.stack(drawn).to(self.device)

    def gumbel(self, tokens: int, codes: int) -> Tensor:
        drawn = [torch.empty(tokens, codes).exponential_(generator=g) for g in self.generators]
        return -torch.stack(drawn).to(self.device).log()

    def normal(self, tokens: int, channels: int) -> Tensor:
        drawn = [torch.randn(tokens, channels, generator=g) for g in self.generators]
        return torch.cat(drawn).to(self.device)

    def select(self, rows: Sequence[int]) -> None:
        self.generators = [self.generators[row] for row in rows]
