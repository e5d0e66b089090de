"""Reading token caches: images as tokens, captions as text states, in memory or mapped from the cache's shards

A cache is a folder of shards, NNNNN.safetensors, and an index.json, which says what the cache was made from.
Of mapped shards memory is taken only by what is asked for, so a cache may be larger than it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hartist.errors import UserError, quoted
from hartist.files import read_json
from hartist.text.encoder import TextContext, context_from_states

INDEX = "index.json"
FORMAT, VERSION = "hartist-token-cache", 1
LABELS = {
    "text_encoder": "text encoder",
    "image_size": "image size",
    "sides": "schedule of scales",
    "data": "dataset",
    "flip": "mirroring",
    "limit": "limit of images",
}
"""The parts of what a cache was made from, in words, where these differ from their names."""


@dataclass(frozen=True)
class Texts:
    """Text states of U distinct captions."""

    states_USC: Float[Tensor, "u s d"]
    """float16."""
    mask_US: Bool[Tensor, "u s"]
    utf8: UInt8[Tensor, " bytes"]
    """The captions themselves, end to end."""
    end_U: Int[Tensor, " u"]
    """Where each of them ends in `utf8`."""

    def __len__(self) -> int:
        return len(self.end_U)

    def string(self, row: int) -> str:
        start = int(self.end_U[row - 1]) if row else 0
        return self.utf8[start : int(self.end_U[row])].numpy().tobytes().decode()


@dataclass(frozen=True)
class TextTable:
    """The texts of all shards, numbered through."""

    parts: tuple[Texts, ...]

    def _starts(self) -> Int[Tensor, " parts"]:
        lengths = torch.tensor([len(part) for part in self.parts])
        return lengths.cumsum(0) - lengths

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def in_memory(self) -> TextTable:
        """The same, copied into one part."""
        lengths = torch.tensor([len(part.utf8) for part in self.parts])
        starts = (lengths.cumsum(0) - lengths).tolist()
        whole = Texts(
            torch.cat([part.states_USC for part in self.parts]),
            torch.cat([part.mask_US for part in self.parts]),
            torch.cat([part.utf8 for part in self.parts]),
            torch.cat([part.end_U + start for part, start in zip(self.parts, starts, strict=True)]),
        )
        return TextTable((whole,))

    def context(self, rows_B: Int[Tensor, " b"]) -> TextContext:
        """The contexts of some texts, float32."""
        states = [part.states_USC for part in self.parts]
        masks = [part.mask_US for part in self.parts]
        return context_from_states(_gather(states, self._starts(), rows_B), _gather(masks, self._starts(), rows_B))

    def strings(self, rows: Sequence[int]) -> list[str]:
        starts = self._starts()
        shards = torch.bucketize(torch.tensor(rows, dtype=torch.long), starts, right=True) - 1
        return [
            self.parts[shard].string(row - int(starts[shard])) for row, shard in zip(rows, shards.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class TokenCache:
    """N images with their M captions, which are U different texts. Only ids and the last scale are stored;
    the transformer's inputs follow from the ids."""

    ids_NL: Int[Tensor, "n l"]
    """Token ids of all scales side by side."""
    last_scale_NmC: Float[Tensor, "n l_last c"]
    """What the last scale has to express, before its discrete step. Rounded to float16 in the file: by at most
    2⁻¹¹ of each value (or 2⁻²⁵, if that is more). For the bundled tokenizer that is 70 dB below the residual tokens,
    and less than a tenth of an 8-bit step in any decoded pixel."""
    text_M: Int[Tensor, " m"]
    """The row in `texts` of every caption."""
    first_caption_N: Int[Tensor, " n"]
    num_captions_N: Int[Tensor, " n"]
    texts: TextTable
    label_N: Int[Tensor, " n"] | None = None
    """The numbers of the images' classes, if the dataset has them."""

    def __len__(self) -> int:
        return len(self.ids_NL)

    def rows(self, rows_B: Int[Tensor, " b"]) -> TokenCache:
        """Some of the images, with their captions; no text states are touched."""
        count_B = self.num_captions_N[rows_B]
        first_B = count_B.cumsum(0) - count_B
        caption_M = torch.arange(int(count_B.sum()))
        old_M = caption_M + (self.first_caption_N[rows_B] - first_B).repeat_interleave(count_B)
        return TokenCache(
            self.ids_NL[rows_B].int(),
            self.last_scale_NmC[rows_B].float(),
            self.text_M[old_M],
            first_B,
            count_B,
            self.texts,
            None if self.label_N is None else self.label_N[rows_B].long(),
        )

    def context(self, captions_B: Int[Tensor, " b"]) -> TextContext:
        """The text contexts of some captions, counted over all images."""
        return self.texts.context(self.text_M[captions_B])

    def drawn_context(self, draw_N: Float[Tensor, " n"]) -> TextContext:
        """The context of one caption of every image: the first for a draw of 0, the last for one just below 1."""
        return self.context(self.first_caption_N + (draw_N * self.num_captions_N).long())

    def captions(self, captions_B: Int[Tensor, " b"]) -> list[str]:
        """Those captions in words."""
        return self.texts.strings(self.text_M[captions_B].tolist())

    @staticmethod
    def cat(parts: Sequence[TokenCache]) -> TokenCache:
        """The images of all parts, which share their `texts`."""
        count_N = torch.cat([part.num_captions_N for part in parts])
        labels = [part.label_N for part in parts if part.label_N is not None]
        return TokenCache(
            torch.cat([part.ids_NL.int() for part in parts]),
            torch.cat([part.last_scale_NmC.float() for part in parts]),
            torch.cat([part.text_M for part in parts]),
            count_N.cumsum(0) - count_N,
            count_N,
            parts[0].texts,
            torch.cat(labels).long() if labels else None,
        )


@dataclass(frozen=True)
class ShardedTokenCache:
    """A cache on disk: `rows` reads the images asked for, and nothing else."""

    shards: tuple[TokenCache, ...]

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    def rows(self, rows_B: Int[Tensor, " b"]) -> TokenCache:
        """Some of the images, in memory. Raises IndexError beyond the last one."""
        if not len(rows_B) or int(rows_B.min()) < 0 or int(rows_B.max()) >= len(self):
            raise IndexError(f"rows {rows_B.tolist()} of a cache of {len(self)} images")
        lengths = torch.tensor([len(shard) for shard in self.shards])
        starts = lengths.cumsum(0) - lengths
        shard_B = torch.bucketize(rows_B, starts, right=True) - 1
        parts, places = [], []
        for number in shard_B.unique().tolist():
            place = (shard_B == number).nonzero()[:, 0]
            parts.append(self.shards[number].rows(rows_B[place] - starts[number]))
            places.append(place)
        return TokenCache.cat(parts).rows(torch.cat(places).argsort())


def open_token_cache(
    path: Path, parts: Mapping[str, Any] | None = None, *, in_memory: int = 4 * 2**30
) -> TokenCache | ShardedTokenCache:
    """The cache at `path`; one of at most `in_memory` bytes is read, a larger one mapped.

    Raises UserError if it is unfinished or damaged, or if it was made from something else than `parts`
    say (see `cache_parts`): it names which one. What `parts` leave out may be anything.
    """
    index = read_index(path)
    for name, value in (parts or {}).items():
        made_with = index["parts"].get(name)
        if made_with != json.loads(json.dumps(value)):
            label = LABELS.get(name, name)
            raise UserError(
                f"{path} was made with another {label} ({quoted(made_with)}, not {quoted(value)}); make a new one "
                f"with `hartist data cache`, or use the {label} it was made with"
            )
    tensors = [read_shard(path / shard["file"])[0] for shard in index["shards"]]
    texts = TextTable(tuple(map(texts_of, tensors)))
    if sum(shard["bytes"] for shard in index["shards"]) > in_memory:
        return ShardedTokenCache(tuple(images_of(part, texts) for part in tensors))
    texts = texts.in_memory()
    return TokenCache.cat([images_of(part, texts) for part in tensors])


def read_index(path: Path) -> dict[str, Any]:
    """The index of a finished cache. Raises UserError if there is none, or a shard is missing or cut off."""
    if not (path / INDEX).exists():
        if shard_path(path, 0).exists():
            raise UserError(f"{path} is an unfinished token cache; to resume, run the same command again")
        raise UserError(f"{path} is no token cache (it has no {INDEX}); make one with `hartist data cache`")
    index = read_json(path / INDEX)
    if not isinstance(index, dict) or (index.get("format"), index.get("version")) != (FORMAT, VERSION):
        raise UserError(
            f"{path / INDEX} is not of a token cache of version {VERSION}; make one with `hartist data cache`"
        )
    for shard in index["shards"]:
        file = path / shard["file"]
        if not file.is_file() or file.stat().st_size != shard["bytes"]:
            raise UserError(f"{file} is missing or cut off; to make it again, run the same command again")
    return index


def shard_path(path: Path, number: int) -> Path:
    return path / f"{number:05d}.safetensors"


Cache = TokenCache | ShardedTokenCache


def spread_rows(cache: Cache, count: int) -> Int[Tensor, " n"]:
    """At most `count` rows from all over the cache: images may be sorted by subject."""
    count = min(count, len(cache))
    return torch.arange(count) * len(cache) // max(count, 1)


def read_shard(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a shard, mapped rather than read, and what is written beside them.

    Raises UserError if the file is missing, cut off or no shard.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); to make it again, run the same command again") from error


def texts_of(tensors: dict[str, Tensor]) -> Texts:
    """The texts that a shard brings with it."""
    return Texts(tensors["states_USC"], tensors["mask_US"], tensors["utf8"], tensors["end_U"])


def images_of(tensors: dict[str, Tensor], texts: TextTable) -> TokenCache:
    """The images of a shard; their captions are among the `texts` of all shards."""
    count_N = tensors["num_captions_N"].long()
    first_N = count_N.cumsum(0) - count_N
    fields = tensors["ids_NL"], tensors["last_scale_NmC"], tensors["text_M"]
    return TokenCache(*fields, first_N, count_N, texts, tensors.get("label_N"))


def _gather(parts: Sequence[Tensor], starts: Tensor, rows_B: Int[Tensor, " b"]) -> Tensor:
    """Rows of several tensors laid end to end."""
    if len(parts) == 1:
        return parts[0][rows_B]
    part_B = torch.bucketize(rows_B, starts, right=True) - 1
    out = parts[0].new_empty(len(rows_B), *parts[0].shape[1:])
    for number in part_B.unique().tolist():
        place = part_B == number
        out[place] = parts[number][rows_B[place] - starts[number]]
    return out
