"""Positions: 1-D RoPE for text, 2-D RoPE for image cells (paper section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hartist.scales import ScaleSchedule

ROPE_BASE = 10000.0


@dataclass(frozen=True)
class Rope:
    """Rotary tables of a run of tokens: cos and sin, B×1×l×E, to be shared by all heads and layers."""

    cos_B1lE: Float[Tensor, "b 1 l e"]
    sin_B1lE: Float[Tensor, "b 1 l e"]

    def to(self, dtype: torch.dtype) -> Rope:
        return Rope(self.cos_B1lE.to(dtype), self.sin_B1lE.to(dtype))

    @staticmethod
    def cat(ropes: list[Rope]) -> Rope:
        return Rope(torch.cat([r.cos_B1lE for r in ropes], 2), torch.cat([r.sin_B1lE for r in ropes], 2))

    def part(self, rows: slice, tokens: slice) -> Rope:
        """The tables of these rows' tokens."""
        return Rope(self.cos_B1lE[rows, :, tokens], self.sin_B1lE[rows, :, tokens])

    def select(self, positions_Bm: Int[Tensor, "b m"]) -> Rope:
        """The tables of some tokens, different ones in every row."""
        index = positions_Bm[:, None, :, None].expand(-1, -1, -1, self.cos_B1lE.shape[-1])
        return Rope(self.cos_B1lE.gather(2, index), self.sin_B1lE.gather(2, index))


def rope_text(position_ids_BS: Int[Tensor, "b s"], head_dim: int) -> Rope:
    """Ordinary 1-D RoPE: E/2 frequencies 10000^(−2m/E), laid out twice."""
    m = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids_BS.device)
    angle_BSF = position_ids_BS.float()[..., None] * (1.0 / ROPE_BASE ** (m / head_dim))
    return _tables(torch.cat([angle_BSF, angle_BSF], -1))


def cell_coordinates(schedule: ScaleSchedule, k: int, device: torch.device | str = "cpu") -> Float[Tensor, "l 2"]:
    """Row and column of every cell of scale k in units of the finest grid's cells."""
    (h, w), (h_finest, w_finest) = schedule.grids[k], schedule.finest
    rows = torch.arange(h, device=device) / h * h_finest
    columns = torch.arange(w, device=device) / w * w_finest
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)


def rope_image(
    coordinates_l2: Float[Tensor, "l 2"],
    offset_B: Int[Tensor, " b"],
    head_dim: int,
    form: Literal["released", "axial"],
) -> Rope:
    """2-D RoPE: E/4 frequencies 10000^(−4m/E) an axis; the text's last position id offsets both axes.

    "released" lays the angles out as [axis 0, axis 0, axis 1, axis 1]; the half-split rotation then
    pairs an axis-0 with an axis-1 angle, which is no rotation, but is what the weights were trained
    with. "axial" lays them out as [axis 0, axis 1, axis 0, axis 1]: each pair turns by one angle.
    """
    m = torch.arange(0, head_dim, 4, dtype=torch.float32, device=coordinates_l2.device)
    frequency_F = 1.0 / ROPE_BASE ** (m / head_dim)
    position_Bl2 = coordinates_l2[None] + offset_B.float()[:, None, None]
    row_BlF, column_BlF = (position_Bl2[..., axis, None] * frequency_F for axis in (0, 1))
    if form == "released":
        return _tables(torch.cat([row_BlF, row_BlF, column_BlF, column_BlF], -1))
    return _tables(torch.cat([row_BlF, column_BlF, row_BlF, column_BlF], -1))


def _tables(angle_BlE: Float[Tensor, "b l e"]) -> Rope:
    return Rope(angle_BlE.cos()[:, None], angle_BlE.sin()[:, None])


def apply_rope(x_BNlE: Float[Tensor, "b n l e"], rope: Rope) -> Float[Tensor, "b n l e"]:
    """x·cos + rotate_half(x)·sin, the half-split convention."""
    first, second = x_BNlE.chunk(2, -1)
    if torch.is_grad_enabled() or x_BNlE.dtype != rope.sin_B1lE.dtype:
        return x_BNlE * rope.cos_B1lE + torch.cat([-second, first], -1) * rope.sin_B1lE
    sin_first, sin_second = rope.sin_B1lE.chunk(2, -1)
    y_BNlE = x_BNlE * rope.cos_B1lE  # then half by half in place: fewer passes over memory
    low, high = y_BNlE.chunk(2, -1)
    low.addcmul_(second, sin_first, value=-1)
    high.addcmul_(first, sin_second)
    return y_BNlE
