"""The token caches of a generator's run: computed in its own folder, or opened where `hartist data cache` left them"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from hartist.errors import UserError
from hartist.scales import ScaleSchedule
from hartist.text.encoder import TextEncoder
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.training.config import Phase
from hartist.training.images import ImageSet, load_images
from hartist.training.parallel import World
from hartist.training.token_cache import build_token_cache, cache_parts
from hartist.training.token_shards import Cache, open_token_cache, read_index, spread_rows

PROMPTS = 32
SPLITS = ("train", "validation")
Images = TypeVar("Images")


@dataclass(frozen=True)
class PreparedData:
    """The data of every phase."""

    train: list[Cache]
    validation: list[Cache | None]
    """None where there are no held-out images."""
    key: str
    """Changes with anything the tokens depend on."""
    prompts: list[str]
    """Captions to draw pictures of: three in four are trained, the others held out."""


def prepare_data(
    data: Path | str | None,
    folder: Path,
    phases: Sequence[Phase],
    tokenizer: HybridTokenizer,
    encoder: TextEncoder | None,
    *,
    world: World,
    progress: bool = True,
) -> PreparedData:
    """Caches in folder/SPLIT-SIZE, made from `data` where they are not there yet.

    Without `data` they must be: a cache of another tokenizer, text encoder, size or schedule is a UserError.
    """
    caches: dict[str, list[Cache | None]] = {split: [] for split in SPLITS}
    known: dict[tuple[str, Phase], Cache | None] = {}
    keys: list[str] = []
    prompts: list[str] = []
    for phase in phases:
        for split in SPLITS:
            what = split, Phase(phase.image_size, phase.sides)  # phases of one size share their data
            if what not in known:
                path = folder / f"{split}-{phase.image_size}"
                if data is None:
                    made = _opened(path, phase, tokenizer, encoder, needed=split == "train")
                else:
                    made = _built(path, data, split, phase, tokenizer, encoder, world, progress)
                known[what], key = made
                keys += [key] if key else []
                cache = known[what]
                if phase.image_size == phases[-1].image_size and encoder is not None and cache is not None:
                    prompts += _captions(cache, PROMPTS * 3 // 4 if split == "train" else PROMPTS // 4)
            caches[split].append(known[what])
    train = [cache for cache in caches["train"] if cache is not None]
    return PreparedData(train, caches["validation"], "-".join(keys), prompts)


Made = tuple[Cache | None, str]
"""A cache and its key."""


def _opened(path: Path, phase: Phase, tokenizer: HybridTokenizer, encoder: TextEncoder | None, *, needed: bool) -> Made:
    if not needed and not path.exists():
        return None, ""
    parts = cache_parts(tokenizer, encoder, phase.image_size, ScaleSchedule.from_sides(phase.sides))
    if encoder is None:
        del parts["text_encoder"]  # classes have no use for captions, but these may be there
    return open_token_cache(path, parts), read_index(path)["key"]


def _built(
    path: Path,
    data: Path | str,
    split: str,
    phase: Phase,
    tokenizer: HybridTokenizer,
    encoder: TextEncoder | None,
    world: World,
    progress: bool,
) -> Made:
    if encoder is None:
        raise UserError(
            "a class-conditional model trains from a token cache: make one with "
            "`hartist data cache --label-column …` and give --cache without --data"
        )

    def read() -> ImageSet:
        return load_images(data, split, phase.image_size, progress=progress and world.main)

    images = read() if split == "train" else held_out(read, world)
    if images is None:
        return None, ""
    schedule = ScaleSchedule.from_sides(phase.sides)
    cache: Cache | None = None
    for turn in (world.main, not world.main):  # one rank writes, then the others read
        if turn:
            cache = build_token_cache(
                path, images, tokenizer, encoder, schedule=schedule, progress=progress and world.main
            )
        world.barrier()
    return cache, read_index(path)["key"]


def held_out(read: Callable[[], Images], world: World) -> Images | None:
    """What `read` gives of the validation split. Where it can't be read there is none, and stderr says why."""
    try:
        return read()
    except UserError as error:
        if world.main:
            tqdm.write(f"training without held-out images: {error}", file=sys.stderr)
        return None


def _captions(cache: Cache, count: int) -> list[str]:
    """First captions of images from all over the cache."""
    batch = cache.rows(spread_rows(cache, count))
    return batch.captions(batch.first_caption_N)
