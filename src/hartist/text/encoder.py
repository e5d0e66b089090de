"""What the transformer is conditioned on, and what every text encoder has to offer."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hartist.errors import UserError


@dataclass(frozen=True)
class TextContext:
    """The context tokens of B prompts: what the transformer is conditioned on.

    The number of prompts is `len(context)`; every prompt has the same S tokens, padded on the right.
    """

    states_BSC: Float[Tensor, "b s c"]  # encoder states, float32
    mask_BS: Bool[Tensor, "b s"]  # True where a real token
    position_ids_BS: Int[Tensor, "b s"]  # cumsum(mask) - 1

    def __post_init__(self) -> None:
        if not self.states_BSC.shape[:2] == self.mask_BS.shape == self.position_ids_BS.shape:
            shapes = [tuple(x.shape) for x in (self.states_BSC, self.mask_BS, self.position_ids_BS)]
            raise ValueError(f"states, mask and position ids disagree in their shapes: {shapes}")

    @property
    def num_tokens(self) -> int:
        """S, the padded length."""
        return self.mask_BS.shape[1]

    @property
    def dim(self) -> int:
        """C, the width of the encoder's states."""
        return self.states_BSC.shape[2]

    def __len__(self) -> int:
        return self.states_BSC.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextContext:
        """Move to `device`; `dtype` converts the states alone."""
        return TextContext(
            self.states_BSC.to(device=device, dtype=dtype or self.states_BSC.dtype),
            self.mask_BS.to(device),
            self.position_ids_BS.to(device),
        )

    def select(self, rows: Sequence[int] | slice | Tensor) -> TextContext:
        """The prompts at `rows`, in that order; a row may be asked for more than once."""
        index = rows
        if not isinstance(index, (slice, Tensor)):
            index = torch.tensor(list(index), dtype=torch.long, device=self.states_BSC.device)
        return TextContext(self.states_BSC[index], self.mask_BS[index], self.position_ids_BS[index])

    @staticmethod
    def cat(contexts: Sequence[TextContext]) -> TextContext:
        """The prompts of all `contexts` (at least one, all with the same S and C), in order."""
        return TextContext(
            torch.cat([context.states_BSC for context in contexts]),
            torch.cat([context.mask_BS for context in contexts]),
            torch.cat([context.position_ids_BS for context in contexts]),
        )


def context_from_states(states_BSC: Float[Tensor, "b s c"], mask_BS: Bool[Tensor, "b s"]) -> TextContext:
    """A context in float32, its position ids counted from the mask: cumsum(mask) - 1."""
    return TextContext(states_BSC.float(), mask_BS, mask_BS.long().cumsum(dim=1) - 1)


def unconditional_context(like: TextContext) -> TextContext:
    """The context of guidance's unconditional branch, of the same shape and device as `like`.

    States all zeros (before norm and projection), position ids all 0, the mask true on the first token only.
    """
    mask_BS = torch.zeros_like(like.mask_BS)
    mask_BS[:, 0] = True
    return TextContext(torch.zeros_like(like.states_BSC), mask_BS, torch.zeros_like(like.position_ids_BS))


@runtime_checkable
class TextEncoder(Protocol):
    """Turns prompts into context tokens. The same prompt gives the same states in any batch."""

    @property
    def num_tokens(self) -> int:
        """S: every prompt is padded or cut to this many tokens."""
        ...

    @property
    def dim(self) -> int:
        """C: the width of the states."""
        ...

    def encode(self, prompts: Sequence[str]) -> TextContext:
        """The context of `prompts` (at least one; an empty prompt is allowed)."""
        ...

    def to(self, device: torch.device | str) -> object:
        """Compute there from now on."""
        ...

    def count_truncated_tokens(self, prompts: Sequence[str]) -> list[int]:
        """How many tokens at the end of each prompt `encode` would leave out; 0 where it fits."""
        ...

    def fingerprint(self) -> str:
        """A hash of everything the states depend on: weights, tokenizer, lengths, instruction."""
        ...


UNLOAD_BATCH = 8
"""Prompts encoded at once before the encoder is given up."""


class CachedTextEncoder:
    """Keeps the contexts of the last `max_prompts` different prompts, least recently used out first.

    Safe to share between threads: the encoder is asked by one thread at a time.
    """

    def __init__(self, encoder: TextEncoder, max_prompts: int = 256) -> None:
        if max_prompts < 1:
            raise ValueError(f"max_prompts must be at least 1, got {max_prompts}")
        self.encoder: TextEncoder | None = encoder
        self.max_prompts = max_prompts
        self._facts = (encoder.num_tokens, encoder.dim)
        self._truncated: dict[str, int] = {}
        """Of the prompts that were kept when the encoder was given up."""
        self._contexts: OrderedDict[str, TextContext] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_tokens(self) -> int:
        return self._facts[0]

    @property
    def dim(self) -> int:
        return self._facts[1]

    def to(self, device: torch.device | str) -> CachedTextEncoder:
        self._loaded().to(device)
        return self

    def unload(self, prompts: Sequence[str]) -> None:
        """Encode these prompts, then free the encoder's memory: no others can be encoded from then on."""
        kept = list(dict.fromkeys(prompts))
        self.max_prompts = max(self.max_prompts, len(kept))
        counts = self.count_truncated_tokens(kept)
        for start in range(0, len(kept), UNLOAD_BATCH):
            self.encode(kept[start : start + UNLOAD_BATCH])
        with self._lock:
            self._truncated = dict(zip(kept, counts, strict=True))
            self.encoder = None

    def encode(self, prompts: Sequence[str]) -> TextContext:
        with self._lock:
            wanted = dict.fromkeys(prompts)  # without repetitions, in order
            missing = [prompt for prompt in wanted if prompt not in self._contexts]
            found = {prompt: self._contexts[prompt] for prompt in wanted if prompt in self._contexts}
            if missing:
                encoded = self._loaded().encode(missing)
                # Picking by index copies: a row that stays in the cache does not keep its batch alive.
                found |= {prompt: encoded.select([i]) for i, prompt in enumerate(missing)}
            for prompt in wanted:
                self._contexts[prompt] = found[prompt]
                self._contexts.move_to_end(prompt)
            while len(self._contexts) > self.max_prompts:
                self._contexts.popitem(last=False)
            return TextContext.cat([found[prompt] for prompt in prompts])

    def count_truncated_tokens(self, prompts: Sequence[str]) -> list[int]:
        if self.encoder is None and all(prompt in self._truncated for prompt in prompts):
            return [self._truncated[prompt] for prompt in prompts]
        return self._loaded().count_truncated_tokens(prompts)

    def fingerprint(self) -> str:
        return self._loaded().fingerprint()

    def _loaded(self) -> TextEncoder:
        if self.encoder is None:
            raise UserError("the text encoder was unloaded; only prompts that were given then can be drawn")
        return self.encoder
