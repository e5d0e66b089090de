"""Filling a token cache shard by shard. To resume, run the same command again: it goes on after the last shard

The index is written last. Every shard says what it was made from and where in the data it ends.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hartist.checkpoint import write_safetensors
from hartist.data.records import Skipped
from hartist.data.stream import Sample
from hartist.errors import UserError
from hartist.files import read_json, write_json
from hartist.pixels import from_uint8
from hartist.scales import ScaleSchedule
from hartist.text.encoder import TextContext, TextEncoder
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.training.token_shards import (
    FORMAT,
    INDEX,
    VERSION,
    open_token_cache,
    read_index,
    read_shard,
    shard_path,
    texts_of,
)

BATCH, TEXT_BATCH = 32, 256
SHARD_IMAGES, SHARD_BYTES = 4096, 256 * 2**20
"""A shard ends when it has reached either."""


@runtime_checkable
class Images(Protocol):
    """What a cache is made from: an ImageStream, or something that can be resumed like it."""

    skipped: Skipped

    def __iter__(self) -> Iterator[Sample]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def parts_digest(parts: Mapping[str, Any]) -> str:
    """The hash of all that a cache is made from."""
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fill_token_cache(
    path: Path,
    images: Images,
    tokenizer: HybridTokenizer,
    encoder: TextEncoder | None,
    parts: Mapping[str, Any],
    *,
    schedule: ScaleSchedule | None = None,
    total: int | None = None,
    replace: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Make or finish the cache at `path`; returns its index. Without `encoder` it has no captions, only labels.

    `parts` are those of `cache_parts` and whatever else the images depend on; of them `flip` stores
    every image mirrored too, and `limit` stops after so many images. A cache made with other parts is
    deleted if `replace` is true, else refused. Raises UserError for that, or for values beyond float16.
    """
    key = parts_digest(parts)
    kept = _claim(path, parts, key, replace)
    if (path / INDEX).exists():
        return read_index(path)
    texts = _Texts(encoder)
    shards = []
    skipped, done, position = 0, 0, ""
    for number, (tensors, metadata) in enumerate(kept):
        texts.remember(tensors)
        shards.append(_describe(shard_path(path, number), tensors))
        skipped, done, position = int(metadata["skipped"]), int(metadata["images"]), metadata["position"]
    if kept:
        images.load_state_dict(json.loads(position))
        skipped -= len(images.skipped)  # what it knows from the start was counted before
    limit = math.inf if parts.get("limit") is None else parts["limit"]
    samples = iter(images)
    bar = tqdm(desc="tokens", unit="img", total=total, initial=done, disable=not progress)
    with torch.no_grad(), bar:
        while True:
            shard = _Shard(tokenizer, schedule, texts, mirrored=bool(parts.get("flip")))
            while len(shard) < SHARD_IMAGES and shard.size < SHARD_BYTES:
                batch = list(itertools.islice(samples, int(min(BATCH, limit - done))))
                if not batch:
                    break
                shard.add(batch)
                done += len(batch)
                bar.update(len(batch))
            if not len(shard):
                break
            state = {"position": json.dumps(images.state_dict()), "images": str(done)}
            state |= {"skipped": str(skipped + len(images.skipped)), "key": key}
            target = shard_path(path, len(shards))
            tensors = shard.tensors()
            write_safetensors(target, tensors, state)
            shards.append(_describe(target, tensors))
    totals = {name: sum(shard[name] for shard in shards) for name in ("images", "captions", "texts")}
    index = {"format": FORMAT, "version": VERSION, "key": key, "parts": dict(parts), **totals}
    index |= {"skipped": skipped + len(images.skipped), "shards": shards}
    write_json(path / INDEX, index)
    return index


Shard = tuple[dict[str, Tensor], dict[str, str]]


def _claim(path: Path, parts: Mapping[str, Any], key: str, replace: bool) -> list[Shard]:
    """The whole shards at `path` that were made from `parts`; whatever else was there of a cache is deleted.

    The index stays if nothing is missing. Raises UserError for a cache of other parts, unless `replace`.
    """
    kept: list[Shard] = []
    others = (path / INDEX).exists() and _key(path / INDEX) != key
    for number in itertools.count():
        try:
            tensors, metadata = read_shard(shard_path(path, number))
        except UserError:
            break
        if metadata.get("key") != key:
            others = True
            break
        kept.append((tensors, metadata))
    if others and not replace:
        if (path / INDEX).exists():
            open_token_cache(path, parts)  # says what differs, or that it is no cache at all
        raise UserError(f"{path} holds an unfinished cache of other settings; choose another folder or delete it")
    with contextlib.suppress(UserError):
        if not others and read_index(path):
            return kept
    (path / INDEX).unlink(missing_ok=True)
    for file in [*path.glob("[0-9]*.safetensors"), *path.glob(".[0-9]*.safetensors.*.tmp")]:
        if file not in [shard_path(path, number) for number in range(len(kept))]:
            file.unlink()
    return kept


def _key(index: Path) -> Any:
    try:
        values = read_json(index)
    except UserError:
        return None
    return values.get("key") if isinstance(values, dict) else None


def _describe(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A shard's line in the index."""
    counts = {"images": "num_captions_N", "captions": "text_M", "texts": "end_U"}
    return {"file": path.name, "bytes": path.stat().st_size} | {k: len(tensors[v]) for k, v in counts.items()}


class _Texts:
    """Numbers distinct captions over all shards and encodes each once."""

    def __init__(self, encoder: TextEncoder | None) -> None:
        self.encoder = encoder
        self.shape = (encoder.num_tokens, encoder.dim) if encoder is not None else (0, 0)
        self.rows: dict[str, int] = {}
        self.new: list[str] = []

    def remember(self, tensors: dict[str, Tensor]) -> None:
        """Those that a finished shard brought."""
        texts = texts_of(tensors)
        for row in range(len(texts)):
            self.rows[texts.string(row)] = len(self.rows)

    def row(self, text: str) -> int:
        if text not in self.rows:
            self.rows[text] = len(self.rows)
            self.new.append(text)
        return self.rows[text]

    def encode_new(self) -> dict[str, Tensor]:
        """The states of those that came since the last call."""
        texts, self.new = self.new, []
        states = torch.empty(0, *self.shape), torch.empty(0, self.shape[0], dtype=torch.bool)
        if texts:
            assert self.encoder is not None
            encode = getattr(self.encoder, "encode_many", None) or self.encoder.encode  # in batches where it is offered
            chunks = [texts[i : i + TEXT_BATCH] for i in range(0, len(texts), TEXT_BATCH)]
            context = TextContext.cat([encode(chunk) for chunk in chunks])
            states = context.states_BSC, context.mask_BS
        encoded = [text.encode() for text in texts]
        return {
            "states_USC": _half(states[0], "text states"),
            "mask_US": states[1].bool().cpu(),
            "utf8": torch.from_numpy(np.array(bytearray(b"".join(encoded)), dtype=np.uint8)),
            "length_U": torch.tensor([len(text) for text in encoded], dtype=torch.long),
        }


class _Shard:
    """The images of one shard while they gather."""

    def __init__(
        self, tokenizer: HybridTokenizer, schedule: ScaleSchedule | None, texts: _Texts, *, mirrored: bool
    ) -> None:
        self.tokenizer, self.schedule, self.texts, self.mirrored = tokenizer, schedule, texts, mirrored
        self.id_type = torch.int16 if tokenizer.config.vocab_size <= 2**15 else torch.int32
        self.ids: list[Tensor] = []
        self.last: list[Tensor] = []
        self.encoded: list[dict[str, Tensor]] = []
        self.text_rows: list[int] = []
        self.counts: list[int] = []
        self.labels: list[int] = []
        self.size = 0
        """Bytes so far."""

    def __len__(self) -> int:
        return len(self.counts)

    def add(self, batch: Sequence[Sample]) -> None:
        """Encode some images, each followed by its mirror image if these are wanted."""
        pixels = np.stack([sample.pixels for sample in batch])
        if self.mirrored:
            pixels = np.stack([pixels, pixels[:, :, ::-1]], 1).reshape(-1, *pixels.shape[1:])
        device = self.tokenizer.quantizer.codebook.device
        tokens = self.tokenizer.encode(from_uint8(torch.from_numpy(pixels).to(device)), self.schedule)
        self.ids.append(torch.cat(tokens.ids, 1).to(self.id_type).cpu())
        self.last.append(_half(tokens.last_scale_BlC, "latents"))
        for sample in batch:
            rows = [self.texts.row(caption) for caption in sample.captions] if self.texts.encoder else []
            for _ in range(2 if self.mirrored else 1):
                self.text_rows += rows
                self.counts.append(len(rows))
                self.labels += [] if sample.label is None else [sample.label]
        self.encoded.append(self.texts.encode_new())
        new = (self.ids[-1], self.last[-1], *self.encoded[-1].values())
        self.size += sum(tensor.nbytes for tensor in new)

    def tensors(self) -> dict[str, Tensor]:
        return {
            "ids_NL": torch.cat(self.ids),
            "last_scale_NmC": torch.cat(self.last),
            "text_M": torch.tensor(self.text_rows, dtype=torch.long),
            "num_captions_N": torch.tensor(self.counts),
            **({"label_N": torch.tensor(self.labels)} if self.labels else {}),
            **{name: torch.cat([part[name] for part in self.encoded]) for name in ("states_USC", "mask_US", "utf8")},
            "end_U": torch.cat([part["length_U"] for part in self.encoded]).cumsum(0),
        }


def _half(x: Tensor, what: str) -> Tensor:
    """As float16. Raises UserError if a value doesn't fit into it."""
    rounded = x.half().cpu()
    if not rounded.isfinite().all():
        raise UserError(f"the {what} have values that are not finite in float16; use another model")
    return rounded
