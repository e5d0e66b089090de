"""Features that are computed once: rows by the hash of what they were computed from, in one file a network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from hartist.checkpoint import write_safetensors

T = TypeVar("T")
DIGEST_BYTES = 16


def digest(content: bytes) -> bytes:
    """Sixteen bytes of a sha256: what rows are kept under."""
    return hashlib.sha256(content).digest()[:DIGEST_BYTES]


class FeatureCache:
    """Rows of one network. `save` writes them; without a folder they live as long as the object."""

    def __init__(self, folder: Path | None = None, network: str = "") -> None:
        """`network` names the file, and must change with whatever changes the rows.

        A file that is missing, damaged or of another kind counts as empty.
        """
        self.path = folder / f"{network}.safetensors" if folder is not None else None
        self.rows: dict[bytes, Tensor] = {}
        self._saved = 0
        if self.path is not None and self.path.is_file():
            try:
                tensors = load_file(self.path)
                digests = tensors["digests"].reshape(-1, DIGEST_BYTES).numpy()
                self.rows = dict(zip((row.tobytes() for row in digests), tensors["rows"], strict=True))
            except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
                self.rows = {}
            self._saved = len(self.rows)

    def save(self) -> None:
        """Write the rows if there are new ones, atomically."""
        if self.path is None or len(self.rows) == self._saved:
            return
        digests = torch.frombuffer(bytearray(b"".join(self.rows)), dtype=torch.uint8).view(-1, DIGEST_BYTES)
        write_safetensors(self.path, {"digests": digests, "rows": torch.stack(list(self.rows.values()))})
        self._saved = len(self.rows)


def cached_rows(
    items: Iterable[T],
    key: Callable[[T], bytes],
    compute: Callable[[list[T]], Float[Tensor, "b d"]],
    cache: FeatureCache,
    *,
    total: int,
    batch_size: int,
    description: str,
    progress: bool,
) -> Float[Tensor, "n d"]:
    """One row an item, in their order; what the cache lacks is computed in batches and saved at the end.

    An interruption saves as well: the next call goes on where this one stopped.
    """
    rows: list[Tensor] = []
    try:
        with tqdm(total=total, desc=description, disable=not progress) as bar:
            for batch in _batches(items, batch_size):
                keys = [key(item) for item in batch]
                missing = {k: item for k, item in zip(keys, batch, strict=True) if k not in cache.rows}
                if missing:
                    cache.rows |= zip(missing, compute(list(missing.values())), strict=True)
                rows += [cache.rows[k] for k in keys]
                bar.update(len(batch))
    finally:
        cache.save()
    return torch.stack(rows)


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
