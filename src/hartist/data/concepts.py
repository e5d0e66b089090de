"""What an emoji depicts, in words: code points joined, labels cleaned, captions written.

A *concept* is one emojibase entry, named by its code points; the same concept drawn in several styles
gives several images. Everything here is a pure function of the emojibase JSON.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STYLES = ("3d", "flat", "noto")

WHITE = "white"
BACKGROUNDS = {
    WHITE: "#ffffff", "light blue": "#aed8f7", "pink": "#f7bcd2", "yellow": "#fbe27a", "green": "#8fce8a",
    "orange": "#f6ad62", "purple": "#b79be6", "grey": "#b4b8bf", "black": "#1c1d21", "dark blue": "#22417e",
    "red": "#dc5a52", "turquoise": "#6dcfc4", "beige": "#ece0c8",
}  # fmt: skip
"""Flat backgrounds by the name a caption calls them."""

# Twins: the same art but for gender, age or direction. Held-out data is chosen by family, so that no twin of
# a held-out image trains. Single code points are unified first, then whole sequences.
_PEOPLE = {
    "1f468": "1f9d1", "1f469": "1f9d1",  # man, woman → person
    "1f466": "1f9d2", "1f467": "1f9d2",  # boy, girl → child
    "1f474": "1f9d3", "1f475": "1f9d3",  # old man, old woman → older person
}  # fmt: skip
_GROUPS = {
    "1f46c": "1f46b", "1f46d": "1f46b", "1f9d1-1f91d-1f9d1": "1f46b",  # holding hands
    "1f9d1-2764-1f48b-1f9d1": "1f48f",  # kiss
    "1f9d1-2764-1f9d1": "1f491",  # couple with heart
    "1f9d1-1f9d2": "1f46a", "1f9d1-1f9d2-1f9d2": "1f46a",  # family
    "1f9d1-1f9d1-1f9d2": "1f46a", "1f9d1-1f9d1-1f9d2-1f9d2": "1f46a",
}  # fmt: skip
_SKIN_TONES = frozenset({"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"})
_MODIFIERS = frozenset({"2640", "2642", "27a1", "200d"}) | _SKIN_TONES
_INVISIBLE = frozenset({"fe0f", "e007f"})  # variation selector and end-of-tag: written by some, not by others

_COMPONENTS = "component"
_COUNTRY_FLAGS = frozenset({"country-flag", "subdivision-flag"})
# Where "a …" would be wrong: mass nouns, activities, proper names, and names that are no noun phrase at all.
_NO_ARTICLE_HEADS_TEXT = """
    american football, bacon, badminton, baguette bread, baseball, basketball, bowling, bread,
    breast-feeding, broccoli, butter, camping, canned food, construction, cooked rice, cooking,
    coral, curry rice, custard, dashing away, dizzy, dna, field hockey, fire, fog, foggy, fried
    shrimp, garlic, ginger root, high voltage, horse racing, ice, ice hockey, kaaba, lacrosse, leafy
    green, lipstick, locked, luggage, meat, milky way, money, mount fuji, mrs. claus, mx claus, nail
    polish, oden, palms up together, ping pong, popcorn, pouring liquid, rock, rolling, rugby
    football, sake, salt, santa claus, shaved ice, soap, softball, spaghetti, splatter, statue,
    sushi, tennis, tokyo tower, unlocked, volleyball, wood, yarn, zzz
"""
_NO_ARTICLE_HEADS = frozenset(head.strip() for head in _NO_ARTICLE_HEADS_TEXT.split(","))
_PREPOSITIONS = re.compile(r" (?:with|of|in|on|over|without|and|behind|not|from|between|facing|showing|for|at) ")


@dataclass(frozen=True)
class Concept:
    """One emoji, in words. `tags` excludes words that the label already holds."""

    id: str
    family: str
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    skin_tone: str
    """"" for the plain concept, else "light", "medium-light", … or, for couples, "light and dark"."""


def concept_id(code_points: str) -> str:
    """Normalise code points ("23-FE0F-20E3", "0023_20e3"): lower case, four digits, no selectors."""
    parts = re.split(r"[-_]", code_points.lower())
    return "-".join(part.rjust(4, "0") for part in parts if part not in _INVISIBLE)


def base_id(concept: str) -> str:
    """The concept without its skin tones.

    >>> base_id("1f44b-1f3ff")
    '1f44b'
    """
    return "-".join(part for part in concept.split("-") if part not in _SKIN_TONES)


def family_id(concept: str) -> str:
    """The key shared by twins: gender, age, direction and skin tone removed.

    >>> family_id("1f469-200d-1f52c") == family_id("1f468-1f3fd-200d-1f52c") == family_id("1f9d1-200d-1f52c")
    True
    """
    parts = [_PEOPLE.get(part, part) for part in concept.split("-") if part not in _MODIFIERS]
    key = "-".join(parts)
    return _GROUPS.get(key, key) or concept


def _listing(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def clean_label(label: str) -> str:
    """A label as a phrase in lower case: no colon, plain apostrophes.

    >>> clean_label("family: man, woman, boy"), clean_label("man: bald"), clean_label("flag: Japan")
    ('family of man, woman and boy', 'man with bald head', 'flag of japan')
    """
    text = label.lower().replace("’", "'").replace("“", "").replace("”", "")
    head, colon, tail = text.partition(": ")
    if not colon:
        return text
    if head == "flag":
        return f"flag of {tail}"
    if head == "keycap":
        return f"keycap {tail}"
    details = tail.split(", ")
    facing = [d for d in details if d.startswith("facing")]
    tones = [d for d in details if d.endswith("skin tone")]
    rest = ["bald head" if d == "bald" else d for d in details if d not in facing and d not in tones]
    if head in ("family", "kiss", "couple with heart") and rest:
        who = _listing(rest)
        head = {"family": f"family of {who}", "kiss": f"kiss between {who}"}.get(head, f"couple with heart of {who}")
        rest = []
    phrase = f"{head} with {_listing([*tones, *rest])}" if tones or rest else head
    return " ".join([phrase, *facing])


def clean_tags(tags: Iterable[str], label: str) -> tuple[str, ...]:
    """Tags worth reading: words of at least four letters that add something to the label, in given order."""
    known = set(re.findall(r"[^\W_]+", label))
    kept: dict[str, None] = {}
    for tag in tags:
        text = tag.lower().replace("’", "'")
        words = text.split()
        plain = len(text) >= 4 and all(re.fullmatch(r"[^\W\d_]+(?:['-][^\W\d_]+)*", word) for word in words)
        if plain and not set(re.findall(r"[^\W_]+", text)) <= known:
            kept[text] = None
    return tuple(kept)


def read_concepts(
    entries: Sequence[Mapping[str, Any]], groups: Mapping[str, Any], *, skin_tones: bool, flags: bool
) -> Iterator[Concept]:
    """Concepts of emojibase's `data.json`, in its order; `groups` is its `meta/groups.json`.

    Left out always: components (skin-tone swatches, hair) and regional indicator letters, which mean
    nothing alone. Left out unless asked for: skin-tone variants, and flags of countries and regions.
    """
    for entry in entries:
        if "group" not in entry:
            continue
        group = groups["groups"][str(entry["group"])]
        subgroup = groups["subgroups"][str(entry["subgroup"])]
        if group == _COMPONENTS or (subgroup in _COUNTRY_FLAGS and not flags):
            continue
        variants = [entry, *(entry.get("skins", ()) if skin_tones else ())]
        for variant in variants:
            label = clean_label(variant["label"])
            identity = concept_id(variant["hexcode"])
            yield Concept(
                id=identity,
                family=family_id(identity),
                label=label,
                tags=clean_tags(entry.get("tags", ()), label),
                group=group,
                subgroup=subgroup,
                skin_tone="" if variant is entry else skin_tone(label),
            )


def skin_tone(label: str) -> str:
    """The tones a cleaned label names.

    >>> skin_tone("waving hand with medium-light skin tone"), skin_tone("red apple")
    ('medium-light', '')
    """
    return " and ".join(re.findall(r"([a-z-]+) skin tone", label))


def backgrounds(concept: str, style: str, count: int) -> list[str]:
    """The backgrounds on which an image is drawn: white, and `count` others that its name decides."""
    others = [name for name in BACKGROUNDS if name != WHITE]
    others.sort(key=lambda name: stable_hash(f"background:{concept}|{style}|{name}"))
    return [WHITE, *others[:count]]


def stable_hash(text: str) -> int:
    """64 bits of the sha256 of `text`: the same on every machine and in every Python."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def with_article(label: str, group: str) -> str | None:
    """The label as a noun phrase, or None where an article would be wrong or doubtful (plurals, symbols).

    >>> with_article("orange", "food-drink"), with_article("unicorn", "animals-nature")
    ('an orange', 'a unicorn')
    >>> with_article("cherries", "food-drink") is None
    True
    """
    head = _PREPOSITIONS.split(label, maxsplit=1)[0]
    words = head.split()
    plural = re.search(r"(?<![siu])s$|^skis$", words[-1]) or {"people", "men", "women", "children"} & set(words)
    time = "o'clock" in label or label.endswith("-thirty")
    if group == "symbols" or plural or time or head in _NO_ARTICLE_HEADS or not words[-1].isalpha():
        return None
    vowel = re.match(r"[aeio]|hourglass|u(?!ni|s|ti|k)", label) and not re.match(r"eu|ewe|one", label)
    return f"{'an' if vowel else 'a'} {label}"


def prompt(label: str, style: str, background: str = WHITE) -> str:
    """The plain prompt of an image: "red apple, 3d", or "red apple, 3d, on a pink background"."""
    return f"{label}, {style}" if background == WHITE else on_background(f"{label}, {style}", background)


def on_background(caption: str, background: str) -> str:
    article = "an" if background[0] in "aeiou" else "a"
    return f"{caption}, on {article} {background} background"


def captions(concept: Concept, style: str, background: str = WHITE) -> list[str]:
    """Prompts that are all true of the image, the plain one first. Deterministic; no two are equal."""
    found = [prompt(concept.label, style)]
    if concept.tags:
        ordered = sorted(concept.tags, key=lambda tag: stable_hash(f"{concept.id}|{style}|{tag}"))
        found.append(f"{concept.label}, {', '.join(ordered[:2])}, {style}")
    articled = with_article(concept.label, concept.group)
    if articled:
        found.append(f"{articled}, {style}")
    found.append(f"{style} {concept.label}")
    found.append(f"{style} emoji of {articled or concept.label}")
    if background != WHITE:
        found = [on_background(caption, background) for caption in found]
    else:
        # Once in a while: a prompt that names no background means white.
        found.append(on_background(found[0], WHITE))
    return list(dict.fromkeys(found))
