"""Against codebook collapse when a tokenizer is trained from scratch: initialisation and revival."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hartist.scales import ScaleSchedule
from hartist.tokenizer.residual_loop import Phi, area_downsample, map_to_tokens, nearest_codes, residual_loop


@torch.no_grad()
def scale_vectors(
    f_BChw: Float[Tensor, "b c h w"], schedule: ScaleSchedule, phi: Phi, per_scale: int, generator: torch.Generator
) -> Float[Tensor, "n c"]:
    """What a perfect codebook would have to hold: the loop's inputs of every scale, equally many of each."""
    rest_BChw = f_BChw.float()
    taken: list[Tensor] = []

    def choose(k: int, _: Tensor) -> Tensor:
        z_BlC = map_to_tokens(area_downsample(rest_BChw, schedule.grids[k]))
        z_NC = z_BlC.reshape(-1, z_BlC.shape[-1])
        rows = torch.randint(len(z_NC), (per_scale,), generator=generator)
        taken.append(z_NC[rows])
        return z_BlC

    start = torch.zeros_like(rest_BChw)
    for step in residual_loop(choose, start, schedule, phi, phi_at_last_scale=True):
        rest_BChw = rest_BChw - step.update_BChw
    return torch.cat(taken)


@torch.no_grad()
def kmeans(
    vectors_NC: Float[Tensor, "n c"], count: int, generator: torch.Generator, rounds: int = 12
) -> Float[Tensor, "v c"]:
    """Lloyd's algorithm; a centre that loses all its vectors moves onto a random one."""
    centres_VC = vectors_NC[torch.randperm(len(vectors_NC), generator=generator)[:count]].clone()
    for _ in range(rounds):
        ids = nearest_codes(vectors_NC[None], centres_VC)[0]
        sums_VC = torch.zeros_like(centres_VC).index_add_(0, ids, vectors_NC)
        counts_V = ids.bincount(minlength=count)
        empty = counts_V == 0
        centres_VC = sums_VC / counts_V.clamp(min=1)[:, None]
        replacements = torch.randint(len(vectors_NC), (int(empty.sum()),), generator=generator)
        centres_VC[empty] = vectors_NC[replacements]
    return centres_VC


@torch.no_grad()
def revive_dead_codes(
    codebook_VC: Tensor, hits_V: Int[Tensor, " v"], vectors_NC: Float[Tensor, "n c"], generator: torch.Generator
) -> int:
    """Move codes without hits onto vectors the loop has just met (in place); returns how many moved."""
    dead = hits_V == 0
    count = int(dead.sum())
    if count:
        rows = torch.randint(len(vectors_NC), (count,), generator=generator)
        codebook_VC[dead] = vectors_NC[rows].to(codebook_VC.dtype)
    return count
