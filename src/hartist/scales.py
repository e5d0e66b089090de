"""The scale schedule: the sides of the K token grids, coarse to fine (paper section 2.1, `patch_nums`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hartist.errors import UserError

Side = int | tuple[int, int]

SIDES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
SIDES_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)


@dataclass(frozen=True)
class ScaleSchedule:
    """K token grids of (height, width) cells; the last one is the latent's own grid.

    Raises UserError for an empty schedule, a side below 1 or a grid larger than the last one.
    """

    grids: tuple[tuple[int, int], ...]

    @classmethod
    def from_sides(cls, sides: Sequence[Side | Sequence[int]]) -> ScaleSchedule:
        """Build from sides as configs write them: an integer is a square grid, a pair is (height, width)."""
        grids = []
        for side in sides:
            pair = (side, side) if isinstance(side, int) else tuple(side)
            if len(pair) != 2 or any(not isinstance(n, int) or n < 1 for n in pair):
                raise UserError(f"scale {side!r} in the schedule is not a side ≥ 1 or a (height, width) pair")
            grids.append((int(pair[0]), int(pair[1])))
        if not grids:
            raise UserError("the scale schedule is empty; it needs at least one side")
        if any(h > grids[-1][0] or w > grids[-1][1] for h, w in grids):
            raise UserError(f"the schedule {list(sides)} is not coarse to fine: its last scale must be the largest")
        return cls(tuple(grids))

    def __len__(self) -> int:
        return len(self.grids)

    @property
    def finest(self) -> tuple[int, int]:
        """The latent grid (h, w)."""
        return self.grids[-1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every scale, l_k = h_k · w_k."""
        return tuple(h * w for h, w in self.grids)

    @property
    def num_tokens(self) -> int:
        """Image tokens of all scales, L."""
        return sum(self.lengths)

    def fraction(self, k: int) -> float:
        """k/(K−1): how far along the schedule scale k is; 0 when there is a single scale."""
        return k / (len(self) - 1) if len(self) > 1 else 0.0

    def is_last(self, k: int) -> bool:
        return k == len(self) - 1
