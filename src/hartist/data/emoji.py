"""The emoji dataset: three styles of drawing on flat backgrounds, captions, a fixed split; an ImageFolder.

    OUT/train/1f34e_3d.png …   OUT/train/metadata.jsonl        file_name, text, captions, concept, style, …
    OUT/validation/…           OUT/validation/metadata.jsonl   the same, with split_kind
    OUT/dataset.json           versions, hashes, counts, the split rule
    OUT/NOTICE                 the licences of the art and of the labels

The split is a pure function of code points and style, so it never moves when art is added. Twins (a man
and a woman of the same profession, a skin tone, a mirrored pose) share a *family* and fall on one side.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from tqdm import tqdm

from hartist.data.concepts import (
    BACKGROUNDS,
    STYLES,
    WHITE,
    Concept,
    backgrounds,
    base_id,
    captions,
    concept_id,
    prompt,
    read_concepts,
    stable_hash,
)
from hartist.data.render import icon_svg, render_raster, render_svg
from hartist.data.sources import (
    EMOJI_PACKAGES,
    EMOJIBASE,
    FLUENT_3D,
    FLUENT_FLAT,
    NOTO,
    notice,
    obtain,
    unpack,
)
from hartist.errors import UserError
from hartist.files import atomic_directory, read_json, write_json, write_text
from hartist.pixels import png_bytes

FORMAT = "hartist-emoji"
FORMAT_VERSION = 2
HELD_OUT = 0.05
MANY = 500
"""Pictures that are worth starting processes for."""
TRAIN, UNSEEN_CONCEPT, UNSEEN_PAIR = "train", "unseen_concept", "unseen_pair"
SPLIT_RULE = (
    "h(x) = first 8 bytes of sha256(x) as a big-endian integer / 2^64. "
    "family = concept without gender, age, direction and skin tone. "
    f"unseen_concept: h('concept:' + family) < {HELD_OUT}. "
    f"unseen_pair: h('pair:' + family + '|' + style) < {HELD_OUT}, and another style of the concept trains. "
    "train: everything else. Both unseen kinds make up the validation split."
)

Draw = Callable[[int, str], Image.Image]  # side in pixels, background as #rrggbb → RGB image
SkinTones = Literal["none", "one", "all"]


@dataclass(frozen=True)
class EmojiSummary:
    """What was built. `counts[style][split_kind]` is a number of images."""

    out: Path
    size: int
    concepts: int
    counts: dict[str, dict[str, int]]

    def total(self, kind: str | None = None) -> int:
        """Images of one split kind, or of all."""
        return sum(n for by_kind in self.counts.values() for k, n in by_kind.items() if kind in (None, k))

    @property
    def images(self) -> int:
        return self.total()

    @property
    def train(self) -> int:
        return self.total(TRAIN)

    @property
    def validation(self) -> int:
        return self.images - self.train


def split_kinds(family: str, styles: Iterable[str]) -> dict[str, str]:
    """The split kind of each style in which one concept of `family` is drawn.

    >>> split_kinds("1f34e", ["3d", "flat"])
    {'3d': 'train', 'flat': 'train'}
    """
    limit = int(HELD_OUT * 2**64)
    styles = list(styles)
    if stable_hash(f"concept:{family}") < limit:
        return dict.fromkeys(styles, UNSEEN_CONCEPT)
    draws = {style: stable_hash(f"pair:{family}|{style}") for style in styles}
    kinds = {style: UNSEEN_PAIR if draws[style] < limit else TRAIN for style in styles}
    if draws and TRAIN not in kinds.values():  # an unseen pair needs a style of the concept that was seen
        kinds[max(draws, key=lambda style: draws[style])] = TRAIN
    return kinds


def _draw_file(path: Path, size: int, background: str) -> Image.Image:
    return render_raster(path.read_bytes(), size, background)


def _draw_icon(icons: Mapping[str, Any], name: str, size: int, background: str) -> Image.Image:
    return render_svg(icon_svg(icons, name), size, background)


def raster_art(package: Path) -> dict[str, Draw]:
    """Concept id → drawing, for a package of image files named by their code points."""
    # Some concepts come twice, with and without the variation selector; the fuller name is the proper one.
    files = sorted((package / "assets").glob("*.webp"), key=lambda path: (len(path.stem), path.stem))
    return {concept_id(path.stem): partial(_draw_file, path) for path in files}


def icon_art(package: Path) -> dict[str, Draw]:
    """Concept id → drawing, for an Iconify set with its table of code points."""
    icons = read_json(package / "icons.json")
    names = read_json(package / "chars.json")
    return {
        concept_id(code_points): partial(_draw_icon, icons, name)
        for code_points, name in names.items()
        if name in icons["icons"]
    }


@dataclass(frozen=True)
class _Item:
    concept: Concept
    style: str
    background: str
    kind: str
    draw: Draw

    @property
    def split(self) -> str:
        return "train" if self.kind == TRAIN else "validation"

    @property
    def file_name(self) -> str:
        colour = "" if self.background == WHITE else f"_{self.background.replace(' ', '-')}"
        return f"{self.concept.id}_{self.style}{colour}.png"

    def row(self) -> dict[str, Any]:
        concept = asdict(self.concept)
        return {
            "file_name": self.file_name,
            "text": prompt(self.concept.label, self.style, self.background),
            "captions": captions(self.concept, self.style, self.background),
            "concept": concept.pop("id"),
            "style": self.style,
            "background": self.background,
            "split_kind": self.kind,
            **concept,
        }


def one_tone(found: list[Concept], style: str) -> list[Concept]:
    """The plain concepts, and of each one's skin tones the one that its name and the style decide."""
    by_base: dict[str, list[Concept]] = {}
    for concept in found:
        if concept.skin_tone:
            by_base.setdefault(base_id(concept.id), []).append(concept)
    chosen = {min(tones, key=lambda c: stable_hash(f"tone:{c.id}|{style}")).id for tones in by_base.values()}
    return [concept for concept in found if not concept.skin_tone or concept.id in chosen]


def _items(packages: Mapping[str, Path], *, skin_tones: SkinTones, flags: bool, coloured: int) -> list[_Item]:
    art = {
        "3d": raster_art(packages[FLUENT_3D.name]),
        "flat": icon_art(packages[FLUENT_FLAT.name]),
        "noto": icon_art(packages[NOTO.name]),
    }
    entries = read_json(packages[EMOJIBASE.name] / "en" / "data.json")
    groups = read_json(packages[EMOJIBASE.name] / "meta" / "groups.json")
    found = list(read_concepts(entries, groups, skin_tones=skin_tones != "none", flags=flags))
    wanted = {}
    for style in STYLES:
        drawn = [concept for concept in found if concept.id in art[style]]
        wanted[style] = {c.id for c in (one_tone(drawn, style) if skin_tones == "one" else drawn)}
    items = []
    for concept in found:
        styles = [style for style in STYLES if concept.id in wanted[style]]
        # The kinds follow from every style there is, so that they do not depend on the tones chosen.
        kinds = split_kinds(concept.family, [style for style in STYLES if concept.id in art[style]])
        items += [
            _Item(concept, style, background, kinds[style], art[style][concept.id])
            for style in styles
            for background in backgrounds(concept.id, style, coloured)
        ]
    return items


def _draw_all(items: list[_Item], again: Callable[[], list[_Item]], folder: Path, size: int) -> Iterator[None]:
    """Draw into folder/SPLIT, yielding after each; `again` makes the same list in another process.

    Few pictures are drawn here. The renderer holds the interpreter's lock, so many go to a process for each core.
    """
    if len(items) < MANY:
        for item in items:
            _render(item, folder, size)
            yield
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, _be_drawer, (again, folder, size)) as pool:
        yield from pool.map(_draw, range(len(items)), chunksize=32)


_draws: list[Callable[[], None]] = []
"""In a process of `_draw_all`: what draws each item."""


def _be_drawer(again: Callable[[], list[_Item]], folder: Path, size: int) -> None:
    _draws.extend(partial(_render, item, folder, size) for item in again())


def _draw(number: int) -> None:
    _draws[number]()


def _render(item: _Item, folder: Path, size: int) -> None:
    (folder / item.split / item.file_name).write_bytes(png_bytes(item.draw(size, BACKGROUNDS[item.background])))


def _check_target(out: Path) -> None:
    # The folder is replaced as a whole, so it must be ours: nobody's other files may go with it.
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    marker = out / "dataset.json"
    known = read_json(marker) if marker.is_file() else None
    if not (isinstance(known, dict) and known.get("format") == FORMAT):
        raise UserError(f"{out} exists and is not an emoji dataset; choose a new folder")


def _description(items: list[_Item], summary: EmojiSummary, options: dict[str, Any]) -> dict[str, Any]:
    import PIL
    import resvg_py

    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "size": summary.size,
        "styles": list(STYLES),
        "options": options,
        "concepts": summary.concepts,
        "families": len({item.concept.family for item in items}),
        "images": summary.images,
        "splits": {"train": summary.train, "validation": summary.validation},
        "counts": summary.counts,
        "split_rule": SPLIT_RULE,
        "sources": [
            {
                "package": p.name,
                "version": p.version,
                "sha256": p.sha256,
                "licence": p.licence,
                "gives": p.describes,
            }
            for p in EMOJI_PACKAGES
        ],
        "rendered_with": {"pillow": PIL.__version__, "resvg_py": resvg_py.__version__},
    }


def build_emoji(
    out: Path,
    *,
    size: int = 256,
    source: Path | None = None,
    progress: bool = True,
    skin_tones: SkinTones = "one",
    flags: bool = False,
    coloured: int = 1,
) -> EmojiSummary:
    """Build the dataset at `out`, replacing an earlier one; `size` is the side of the images in pixels.

    `skin_tones` "one" draws one tone of every concept and style that has any; `coloured` is how many times an
    image is drawn again, each on another colour. The packages come from `source`, or through npm. The same
    inputs and library versions give the same bytes.
    Raises UserError if a package can't be had, or if `out` holds something else.
    """
    out = Path(out)
    if not 8 <= size <= 1024:
        raise UserError(f"size {size} is out of range; choose 8 to 1024 pixels")
    if not 0 <= coloured < len(BACKGROUNDS):
        raise UserError(f"{coloured} coloured backgrounds are out of range; choose 0 to {len(BACKGROUNDS) - 1}")
    _check_target(out)
    tarballs = {package: obtain(package, source) for package in EMOJI_PACKAGES}
    with tempfile.TemporaryDirectory(prefix="hartist-emoji-") as scratch:
        packages = {p.name: unpack(p, tarball, Path(scratch) / p.tarball) for p, tarball in tarballs.items()}
        again = partial(_items, packages, skin_tones=skin_tones, flags=flags, coloured=coloured)
        items = again()
        counts = Counter((item.style, item.kind) for item in items)
        summary = EmojiSummary(
            out=out,
            size=size,
            concepts=len({item.concept.id for item in items}),
            counts={s: {k: counts[s, k] for k in (TRAIN, UNSEEN_CONCEPT, UNSEEN_PAIR)} for s in STYLES},
        )
        with atomic_directory(out) as folder:
            for split in ("train", "validation"):
                (folder / split).mkdir()
            drawn = _draw_all(items, again, folder, size)
            for _ in tqdm(drawn, total=len(items), desc="emoji", unit="img", disable=not progress):
                pass
            for split in ("train", "validation"):
                rows = [json.dumps(item.row(), ensure_ascii=False) for item in items if item.split == split]
                write_text(folder / split / "metadata.jsonl", "".join(f"{row}\n" for row in rows))
            write_json(
                folder / "dataset.json",
                _description(items, summary, {"skin_tones": skin_tones, "flags": flags, "coloured": coloured}),
            )
            write_text(folder / "NOTICE", "\n".join(notice(p, packages[p.name]) for p in EMOJI_PACKAGES))
    return summary
