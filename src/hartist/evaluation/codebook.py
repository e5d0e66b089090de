"""How a tokenizer uses its codebook, scale by scale: codes in use, and their entropy. Pure functions of counts"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from hartist.training.usage import perplexity_per_scale


def count_codes(ids: Sequence[Int[Tensor, "b _l"]], vocab_size: int) -> Int[Tensor, "k {vocab_size}"]:
    """How often each code occurs on each scale: ids of K scales → counts, to be summed over batches."""
    return torch.stack([torch.bincount(ids_Bl.flatten(), minlength=vocab_size) for ids_Bl in ids]).cpu()


def codebook_usage(counts_KV: Int[Tensor, "k v"]) -> Float64[Tensor, " k"]:
    """Distinct codes that occur on each scale, as a share of the codebook."""
    return (counts_KV > 0).double().mean(1)


def codebook_entropy(counts_KV: Int[Tensor, "k v"]) -> Float64[Tensor, " k"]:
    """Shannon entropy of each scale's codes in bits: from 0 (one code for everything) to log₂ V; 0 without counts.

    n tokens show at most log₂ n bits: a coarse scale of few pictures looks poorer than it is.
    """
    return perplexity_per_scale(counts_KV).clamp(min=1).log2()
