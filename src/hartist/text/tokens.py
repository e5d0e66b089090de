"""Prompts to rows of token ids: cut on the right to a fixed length, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor

from hartist.errors import UserError


@dataclass(frozen=True)
class TokenRow:
    """The tokens of one text."""

    ids: list[int]  # at most the tokenizer's limit, special tokens included
    num_dropped: int  # tokens of the text that found no room


def read_tokenizer(path: Path, num_tokens: int, vocab_size: int) -> Tokenizer:
    """Read a `tokenizer.json` and let it cut texts to `num_tokens`; its own limits are not used.

    Raises UserError if the file is missing, is not a tokenizer or knows ids from `vocab_size` on.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; save the tokenizer as tokenizer.json beside the weights")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path} is not a tokenizer ({error}); download or write it again") from error
    if max(tokenizer.get_vocab().values(), default=0) >= vocab_size:
        raise UserError(f"{path} has more tokens than the {vocab_size} of the model; use the model's own tokenizer")
    room = num_tokens - tokenizer.num_special_tokens_to_add(is_pair=False)
    if room < 1:
        raise UserError(f"num_tokens = {num_tokens} leaves no room for words beside the special tokens; raise it")
    # Padding is ours (see pad_rows): with the library's, dropped tokens could not be counted.
    tokenizer.no_padding()
    tokenizer.enable_truncation(num_tokens)
    return tokenizer


def tokenize(tokenizer: Tokenizer, text: str) -> TokenRow:
    """The ids of `text`, and how many of its tokens were cut away."""
    encoding = tokenizer.encode(text)
    num_special = tokenizer.num_special_tokens_to_add(is_pair=False)
    num_dropped = sum(len(piece.ids) - num_special for piece in encoding.overflowing)
    return TokenRow(list(encoding.ids), num_dropped)


def pad_rows(rows: Sequence[TokenRow], num_tokens: int, pad_id: int) -> Int[Tensor, "b s"]:
    """The ids of all rows, padded on the right with `pad_id` to `num_tokens`."""
    return torch.tensor([row.ids + [pad_id] * (num_tokens - len(row.ids)) for row in rows], dtype=torch.long)
