"""Tokens, residual targets and text states of a dataset, computed once: generator training sees no pixels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from hartist.checkpoint import write_safetensors
from hartist.pixels import from_uint8
from hartist.text.encoder import TextContext, TextEncoder, context_from_states
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.training.images import ImageSet


@dataclass(frozen=True)
class TokenCache:
    """N images with their M captions. Only ids and the last scale are stored; inputs follow from the ids."""

    ids_NL: Int[Tensor, "n l"]
    """Token ids of all scales side by side."""
    last_scale_NmC: Float[Tensor, "n l_last c"]
    """What the last scale has to express, before its discrete step."""
    states_MSC: Float[Tensor, "m s d"]
    """Text states of every caption, float16."""
    mask_MS: Bool[Tensor, "m s"]
    first_caption_N: Int[Tensor, " n"]
    num_captions_N: Int[Tensor, " n"]

    def context(self, captions_B: Int[Tensor, " b"]) -> TextContext:
        """The text contexts of some captions."""
        return context_from_states(self.states_MSC[captions_B], self.mask_MS[captions_B])


FIELDS = ("ids_NL", "last_scale_NmC", "states_MSC", "mask_MS", "first_caption_N", "num_captions_N")


def cache_key(images: ImageSet, tokenizer: HybridTokenizer, encoder: TextEncoder) -> str:
    """Changes with images, captions, tokenizer weights or settings, and text encoder."""
    digest = hashlib.sha256(f"{images.fingerprint} {encoder.fingerprint()} {tokenizer.config}".encode())
    for tensor in tokenizer.state_dict().values():
        digest.update(tensor.contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def build_token_cache(
    path: Path, images: ImageSet, tokenizer: HybridTokenizer, encoder: TextEncoder, *, progress: bool = True
) -> TokenCache:
    """Read the cache at `path` if it fits images, tokenizer and text encoder, else compute and write it."""
    key = cache_key(images, tokenizer, encoder)
    cached = _read(path, key)
    if cached is not None:
        return cached
    ids, last = [], []
    with torch.no_grad():
        for pixels in tqdm(images.pixels.split(32), desc="tokens", unit="batch", disable=not progress):
            tokens = tokenizer.encode(from_uint8(pixels))
            ids.append(torch.cat(tokens.ids, 1).int())
            last.append(tokens.last_scale_BlC)
    captions = [caption for item in images.items for caption in item.captions]
    unique = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
    encode = getattr(encoder, "encode_many", encoder.encode)  # in batches where the encoder offers it
    texts = list(unique)
    contexts = [
        encode(texts[i : i + 256])
        for i in tqdm(range(0, len(texts), 256), desc="captions", unit="batch", disable=not progress)
    ]
    unique_rows = torch.tensor([unique[caption] for caption in captions])
    context = TextContext.cat(contexts).select(unique_rows)
    counts_N = torch.tensor([len(item.captions) for item in images.items])
    cache = TokenCache(
        ids_NL=torch.cat(ids),
        last_scale_NmC=torch.cat(last),
        states_MSC=context.states_BSC.half(),
        mask_MS=context.mask_BS.bool(),
        first_caption_N=counts_N.cumsum(0) - counts_N,
        num_captions_N=counts_N,
    )
    write_safetensors(path, {name: getattr(cache, name) for name in FIELDS}, {"key": key})
    return cache


def _read(path: Path, key: str) -> TokenCache | None:
    """The cache at `path`, or None if there is none, it was made from something else, or it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return TokenCache(**{name: file.get_tensor(name) for name in FIELDS})
    except (OSError, SafetensorError):
        return None
