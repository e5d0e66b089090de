"""Block-causal attention of the teacher-forced pass: a scale sees itself and all earlier ones (paper section 3.2)

The rule is given by the lengths of context and scales, in order. On CUDA it is handed to FlexAttention, which
skips what it forbids and never holds an L×L mask; in bfloat16 on a CPU every scale attends to its own prefix
(`prefix_attention`); elsewhere PyTorch's attention gets a mask, which is the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hartist.transformer.prefix_attention import prefix_attention

if TYPE_CHECKING:  # importing it brings PyTorch's compiler along, which takes a second
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class Runs:
    """How many tokens context and scales have, in order."""

    lengths: tuple[int, ...]


def block_causal_attention(
    q_BNtE: Float[Tensor, "b n t e"],
    k_BNtE: Float[Tensor, "b n t e"],
    v_BNtE: Float[Tensor, "b n t e"],
    scale: float,
    runs: Runs,
) -> Float[Tensor, "b n t e"]:
    """Attention within a sequence of context and scales, in the form that is fastest on its device."""
    device, lengths = q_BNtE.device, runs.lengths
    # Rotations are float32, as positions have to be exact; nothing is computed on the meta device.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        q_BNtE, k_BNtE, v_BNtE = (x.to(torch.get_autocast_dtype(device.type)) for x in (q_BNtE, k_BNtE, v_BNtE))
    if device.type == "cuda":
        return attend_flex(q_BNtE, k_BNtE, v_BNtE, scale, flex_mask(lengths, str(device)))
    if device.type == "cpu" and q_BNtE.dtype == torch.bfloat16:
        return prefix_attention(q_BNtE, k_BNtE, v_BNtE, scale, lengths)
    mask_TT = dense_mask(lengths, str(device))
    return F.scaled_dot_product_attention(q_BNtE, k_BNtE, v_BNtE, attn_mask=mask_TT, scale=scale)


def keep_out_of_compiled_blocks() -> None:
    """To be called before blocks are compiled: lengths change from step to step, and each form is one call anyway."""
    global block_causal_attention
    if not hasattr(block_causal_attention, "_torchdynamo_disable"):
        block_causal_attention = torch.compiler.disable(block_causal_attention)


@functools.lru_cache(maxsize=4)
def dense_mask(lengths: tuple[int, ...], device: str = "cpu") -> Bool[Tensor, "t t"]:
    """True where a query (row) may see a key."""
    level_T = _levels(lengths, device)
    return level_T[:, None] >= level_T[None, :]


@functools.lru_cache(maxsize=4)
def flex_mask(lengths: tuple[int, ...], device: str = "cpu") -> BlockMask:
    """The same rule for FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask

    level_T = _levels(lengths, device)
    tokens = sum(lengths)
    # No named function: where shapes are checked, its wrapper would hide the four arguments that are looked for.
    return create_block_mask(
        lambda batch, head, query, key: level_T[query] >= level_T[key], None, None, tokens, tokens, device=device
    )


def _levels(lengths: tuple[int, ...], device: str) -> Int[Tensor, " t"]:
    """The number of the run that every token belongs to."""
    return torch.tensor([k for k, length in enumerate(lengths) for _ in range(length)], device=device)


def attend_flex(
    q_BNtE: Float[Tensor, "b n t e"],
    k_BNtE: Float[Tensor, "b n t e"],
    v_BNtE: Float[Tensor, "b n t e"],
    scale: float,
    mask: BlockMask,
) -> Float[Tensor, "b n t e"]:
    """Compiled on CUDA; elsewhere FlexAttention's plain form, which is slow and there to be compared with."""
    from torch.nn.attention.flex_attention import flex_attention

    attention: Any = _compiled() if q_BNtE.device.type == "cuda" else flex_attention
    return attention(q_BNtE, k_BNtE, v_BNtE, block_mask=mask, scale=scale)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
