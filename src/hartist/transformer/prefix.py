"""A prefix that is run once and then shared by all images: guidance's other branch, which no prompt changes

The unconditional context (or a negative prompt) is the same for every image, so its keys and values are too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hartist.text.encoder import TextContext
from hartist.transformer.cache import KVCache
from hartist.transformer.model import Condition, ScaleTransformer


@dataclass(frozen=True)
class Prefix:
    """What later scales need of one condition's prefix."""

    condition: Condition
    """Of one row."""
    hidden_1lD: Float[Tensor, "1 l d"]
    """Hidden states of scale 1's cells."""
    cache: KVCache
    """One row, the prefix alone."""


@torch.inference_mode()
def run_prefix(model: ScaleTransformer, condition: TextContext | Int[Tensor, " 1"]) -> Prefix:
    """Run the prefix of one context or class label."""
    config = model.config
    prepared = model.prepare(condition)
    weight = model.word_embed.weight
    cache = KVCache(config.depth, 1, config.heads, config.prefix_tokens, config.head_dim, weight.dtype, weight.device)
    return Prefix(prepared, model.forward_scale(0, None, prepared, cache), cache)


def join_prefix(own: Condition, shared: Prefix) -> Condition:
    """The condition of B rows with prefixes of their own, then of B rows that share one."""
    other = shared.condition.select([0] * len(own.prefix_BSD))
    return replace(
        own,
        prefix_BSD=torch.cat([own.prefix_BSD, other.prefix_BSD]),
        prefix_rope=None,  # both prefixes have their own
        offset_B=torch.cat([own.offset_B, other.offset_B]),
        head_BD=torch.cat([own.head_BD, other.head_BD]),
        modulations=tuple(
            None if a is None or b is None else torch.cat([a, b])
            for a, b in zip(own.modulations, other.modulations, strict=True)
        ),
    )


def forward_prefix(
    model: ScaleTransformer, own: Condition, shared: Prefix, cache: KVCache
) -> Float[Tensor, "{2*len(own.prefix_BSD)} l d"]:
    """`model.forward_scale` of scale 1 for the rows of `join_prefix`: only the first half is computed."""
    batch = len(own.prefix_BSD)
    hidden_BlD = model.forward_scale(0, None, own, cache.rows(0, batch))
    cache.rows(batch, 2 * batch).copy(shared.cache)
    cache.lengths = list(shared.cache.lengths)
    return torch.cat([hidden_BlD, shared.hidden_1lD.expand(batch, -1, -1)])


class Prefixes:
    """The last few prefixes that were run, by name. 44 MB each at the released size."""

    def __init__(self, model: ScaleTransformer, kept: int = 4) -> None:
        self.model, self.kept = model, kept
        self._prefixes: OrderedDict[str, Prefix] = OrderedDict()

    def get(self, name: str, condition: Callable[[], TextContext | Tensor]) -> Prefix:
        """The prefix of this name, or else of `condition()`, one row."""
        found = self._prefixes.pop(name, None) or run_prefix(self.model, condition())
        self._prefixes[name] = found
        while len(self._prefixes) > self.kept:
            self._prefixes.popitem(last=False)
        return found
