"""The emoji dataset: packages verified, captions honest, the split fixed, the folder readable again.

The builder runs here on packages made on the spot, laid out like the real ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hartist.data import concepts, emoji, folder, render, sources
from hartist.data.concepts import STYLES
from hartist.errors import UserError

# ---------------------------------------------------------------- packages made for the tests

_ENTRIES = [
    {"label": "regional indicator A", "hexcode": "1F1E6"},
    {"label": "red apple", "hexcode": "1F34E", "group": 0, "subgroup": 0, "tags": ["apple", "fruit", "ripe"]},
    {"label": "keycap: #", "hexcode": "0023-FE0F-20E3", "group": 2, "subgroup": 3, "tags": []},
    {
        "label": "waving hand",
        "hexcode": "1F44B",
        "group": 0,
        "subgroup": 0,
        "tags": ["hello"],
        "skins": [{"label": "waving hand: dark skin tone", "hexcode": "1F44B-1F3FF"}],
    },
    {"label": "man scientist", "hexcode": "1F468-200D-1F52C", "group": 0, "subgroup": 0},
    {"label": "woman scientist", "hexcode": "1F469-200D-1F52C", "group": 0, "subgroup": 0},
    {"label": "dark skin tone", "hexcode": "1F3FF", "group": 1, "subgroup": 1},
    {"label": "flag: Japan", "hexcode": "1F1EF-1F1F5", "group": 3, "subgroup": 2, "tags": ["JP", "flag"]},
]
_GROUPS = {
    "groups": {"0": "food-drink", "1": "component", "2": "symbols", "3": "flags"},
    "subgroups": {"0": "food-fruit", "1": "skin-tone", "2": "country-flag", "3": "keycap"},
}
_SQUARE = '<path fill="#0f0" d="M0 0h32v32H0z"/>'


def _webp(colour: tuple[int, int, int, int], size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", size, colour).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def _tarball(path: Path, files: Mapping[str, bytes | str]) -> str:
    """Write package/… files as a .tgz and return its sha256."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _icon_set(names: Mapping[str, str]) -> dict[str, str]:
    icons = {name: {"body": _SQUARE} for name in names.values()}
    return {
        "icons.json": json.dumps({"icons": icons, "width": 32, "height": 32}),
        "chars.json": json.dumps(names),
    }


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source folder with four small packages, pinned in place of the real ones."""
    source = tmp_path / "source"
    source.mkdir()
    names = {"1f34e": "apple", "23-20e3": "hash", "1f44b": "wave", "1f44b-1f3ff": "wave-dark"}
    people = {"1f468-200d-1f52c": "man", "1f469-200d-1f52c": "woman"}
    contents: dict[str, dict[str, bytes | str]] = {
        "FLUENT_3D": {
            "assets/1f34e.webp": _webp((255, 0, 0, 255)),
            "assets/0023-fe0f-20e3.webp": _webp((0, 0, 255, 255)),
            "assets/23-fe0f-20e3.webp": _webp((9, 9, 9, 255)),  # a second drawing of the same concept
            "assets/1f44b.webp": _webp((0, 0, 0, 0)),
            "assets/1f44b-1f3ff.webp": _webp((80, 50, 20, 255)),
            "assets/1f468-200d-1f52c.webp": _webp((1, 2, 3, 255)),
            "assets/1f469-200d-1f52c.webp": _webp((3, 2, 1, 255)),
            "assets/1f1ef-1f1f5.webp": _webp((255, 0, 0, 255)),
        },
        "FLUENT_FLAT": {**_icon_set({**names, **people})},
        "NOTO": {**_icon_set(names)},
        "EMOJIBASE": {
            "en/data.json": json.dumps(_ENTRIES),
            "meta/groups.json": json.dumps(_GROUPS),
            "LICENSE": "MIT License\n\nCopyright (c) 2017 Somebody\n",
        },
    }
    pinned = {}
    for attribute, files in contents.items():
        package = getattr(sources, attribute)
        sha256 = _tarball(source / package.tarball, files)
        pinned[attribute] = dataclasses.replace(package, sha256=sha256)
        monkeypatch.setattr(emoji, attribute, pinned[attribute])
    monkeypatch.setattr(emoji, "EMOJI_PACKAGES", tuple(pinned.values()))
    return source


def _bytes_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def _rows(out: Path) -> dict[str, folder.CaptionedImage]:
    found = [i for split in ("train", "validation") for i in folder.load_captioned_folder(out, split)]
    return {image.path.stem: image for image in found}


def _build(out: Path, source: Path, **options: Any) -> emoji.EmojiSummary:
    plain: dict[str, Any] = {"skin_tones": "none", "coloured": 0}
    return emoji.build_emoji(out, size=16, source=source, progress=False, **(plain | options))


# ---------------------------------------------------------------- the build


@pytest.fixture
def needs_svg() -> None:
    pytest.importorskip("resvg_py", reason="the train extra draws the SVG styles")


@pytest.mark.usefixtures("needs_svg")
class TestBuild:
    def test_gives_every_style_of_every_concept_once(self, packages: Path, tmp_path: Path) -> None:
        summary = _build(tmp_path / "out", packages)
        rows = _rows(tmp_path / "out")
        assert set(rows) == {
            *(f"{c}_{s}" for c in ("1f34e", "0023-20e3", "1f44b") for s in STYLES),
            *(f"{c}_{s}" for c in ("1f468-200d-1f52c", "1f469-200d-1f52c") for s in ("3d", "flat")),
        }
        assert (summary.images, summary.concepts) == (13, 5)
        assert summary.train + summary.validation == 13
        assert {style: sum(n.values()) for style, n in summary.counts.items()} == {
            "3d": 5,
            "flat": 5,
            "noto": 3,
        }

    def test_files_on_disk_are_exactly_those_named(self, packages: Path, tmp_path: Path) -> None:
        _build(tmp_path / "out", packages)
        named = {image.path for image in _rows(tmp_path / "out").values()}
        assert named == set((tmp_path / "out").rglob("*.png"))

    def test_pixels(self, packages: Path, tmp_path: Path) -> None:
        _build(tmp_path / "out", packages)
        rows = _rows(tmp_path / "out")

        def colour(name: str) -> tuple[int, ...]:
            pixels = folder.read_image(rows[name].path, 16)
            assert (pixels == pixels[0, 0]).all()
            return tuple(int(v) for v in pixels[0, 0])

        assert colour("1f34e_3d") == (255, 0, 0)
        assert colour("1f34e_flat") == (0, 255, 0)
        assert colour("1f44b_3d") == (255, 255, 255)  # transparent art lies on white
        assert colour("0023-20e3_3d") == (0, 0, 255)  # the file with the full name wins

    def test_metadata(self, packages: Path, tmp_path: Path) -> None:
        _build(tmp_path / "out", packages)
        apple = _rows(tmp_path / "out")["1f34e_3d"]
        assert apple.text == "red apple, 3d"
        assert apple.extra == {
            "concept": "1f34e",
            "style": "3d",
            "background": "white",
            "split_kind": "train",
            "family": "1f34e",
            "label": "red apple",
            "tags": ["fruit", "ripe"],
            "group": "food-drink",
            "subgroup": "food-fruit",
            "skin_tone": "",
        }

    def test_description_and_notice(self, packages: Path, tmp_path: Path) -> None:
        summary = _build(tmp_path / "out", packages)
        about = json.loads((tmp_path / "out" / "dataset.json").read_text())
        assert about["counts"] == summary.counts
        assert about["size"] == 16
        assert {s["licence"] for s in about["sources"]} == {"MIT", "Apache-2.0"}
        assert {s["sha256"] for s in about["sources"]} == {p.sha256 for p in emoji.EMOJI_PACKAGES}
        text = (tmp_path / "out" / "NOTICE").read_text()
        for expected in ("Microsoft Corporation", "Google", "2017 Somebody", "Apache License, Version 2.0"):
            assert expected in text

    def test_many_processes_give_the_same_bytes(
        self, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _build(tmp_path / "one", packages)
        monkeypatch.setattr(emoji, "MANY", 1)
        _build(tmp_path / "two", packages)
        assert _bytes_of(tmp_path / "one") == _bytes_of(tmp_path / "two")

    def test_skin_tones_and_flags_are_optional(self, packages: Path, tmp_path: Path) -> None:
        _build(tmp_path / "plain", packages)
        _build(tmp_path / "full", packages, skin_tones="all", flags=True)
        plain, full = _rows(tmp_path / "plain"), _rows(tmp_path / "full")
        extra = {name: image.text for name, image in full.items() if name not in plain}
        assert set(plain) < set(full)
        assert extra == {
            **{f"1f44b-1f3ff_{s}": f"waving hand with dark skin tone, {s}" for s in STYLES},
            "1f1ef-1f1f5_3d": "flag of japan, 3d",
        }
        assert {n for n, i in full.items() if i.extra["skin_tone"]} == {f"1f44b-1f3ff_{s}" for s in STYLES}
        assert all(full[name].extra == image.extra for name, image in plain.items())  # the split has not moved

    def test_one_skin_tone_is_drawn_of_every_style(self, packages: Path, tmp_path: Path) -> None:
        _build(tmp_path / "one", packages, skin_tones="one")
        toned = {name: image for name, image in _rows(tmp_path / "one").items() if image.extra["skin_tone"]}
        assert set(toned) == {f"1f44b-1f3ff_{s}" for s in STYLES}
        assert {image.extra["skin_tone"] for image in toned.values()} == {"dark"}

    def test_coloured_backgrounds_are_drawn_and_named(self, packages: Path, tmp_path: Path) -> None:
        summary = _build(tmp_path / "out", packages, coloured=2)
        plain = _build(tmp_path / "plain", packages)
        assert summary.images == 3 * plain.images
        rows = _rows(tmp_path / "out")
        wave = [image for name, image in rows.items() if name.startswith("1f44b_3d")]  # transparent art
        assert len({image.extra["background"] for image in wave}) == 3
        for image in wave:
            name = str(image.extra["background"])
            expected = tuple(bytes.fromhex(concepts.BACKGROUNDS[name][1:]))
            pixels = folder.read_image(image.path, 16)
            assert tuple(int(v) for v in pixels[5, 5]) == expected
            if name == "white":
                assert image.text == "waving hand, 3d"
            else:
                assert all(
                    caption.endswith(f"on a{'n' * (name[0] == 'o')} {name} background") for caption in image.captions
                )
        assert len({image.extra["split_kind"] for image in wave}) == 1

    def test_replaces_its_own_folder_only(self, packages: Path, tmp_path: Path) -> None:
        _build(tmp_path / "out", packages)
        (tmp_path / "out" / "train" / "stale.png").write_bytes(b"")
        _build(tmp_path / "out", packages)
        assert not (tmp_path / "out" / "train" / "stale.png").exists()
        other = tmp_path / "other"
        other.mkdir()
        (other / "thesis.txt").write_text("mine")
        with pytest.raises(UserError, match="not an emoji dataset"):
            _build(other, packages)
        assert (other / "thesis.txt").read_text() == "mine"

    def test_failure_leaves_nothing(self, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: object) -> Image.Image:
            raise UserError("no")

        monkeypatch.setattr(emoji, "render_svg", broken)
        before = set(tmp_path.iterdir())
        with pytest.raises(UserError, match="no"):
            _build(tmp_path / "out", packages)
        assert set(tmp_path.iterdir()) == before


def test_without_the_svg_renderer_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"hartist\[train\]"):
        render.render_svg("<svg/>", 8)


def test_one_tone_keeps_the_plain_concepts_and_one_of_each_ones_tones() -> None:
    tones = ["1f3fb", "1f3fc", "1f3fd"]
    found = [_concept("hand"), *(dataclasses.replace(_concept("hand"), id=f"1f44b-{t}", skin_tone=t) for t in tones)]
    kept = emoji.one_tone(found, "3d")
    assert len(kept) == 2
    assert kept[0] is found[0]
    assert {tuple(c.id for c in emoji.one_tone(found[::step], "3d"))[-1] for step in (1, 1)} == {kept[1].id}


@pytest.mark.parametrize("count", [-1, 13])
def test_unreasonable_count_of_backgrounds(count: int, packages: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="coloured backgrounds"):
        emoji.build_emoji(tmp_path / "out", size=16, source=packages, coloured=count)


@pytest.mark.parametrize("size", [0, 4, 5000])
def test_unreasonable_size(size: int, packages: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"size {size}"):
        emoji.build_emoji(tmp_path / "out", size=size, source=packages)


# ---------------------------------------------------------------- packages


def test_missing_tarball_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"npm pack @iconify-json/noto@1\.2\.9"):
        sources.obtain(sources.NOTO, tmp_path)


def test_wrong_hash_is_refused(packages: Path, tmp_path: Path) -> None:
    tarball = packages / emoji.NOTO.tarball
    tarball.write_bytes(tarball.read_bytes() + b"\0")
    with pytest.raises(UserError, match=f"{emoji.NOTO.tarball} is not @iconify-json/noto"):
        _build(tmp_path / "out", packages)
    assert not (tmp_path / "out").exists()


def test_no_npm_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"install Node\.js, or run `npm pack"):
        sources.obtain(sources.NOTO, cache=tmp_path / "cache")


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for npm is a shell script")
class TestNpm:
    def _npm(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "npm").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n{body}\n')
        (folder / "npm").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        monkeypatch.setenv("HARTIST_CACHE", str(tmp_path / "cache"))
        return tmp_path / "calls"

    def test_is_asked_once_and_then_the_cache_answers(
        self, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = self._npm(tmp_path, monkeypatch, f'cp "{packages}/{emoji.NOTO.tarball}" "$4"')
        first = sources.obtain(emoji.NOTO)
        assert first == tmp_path / "cache" / "packages" / emoji.NOTO.tarball
        assert sources.obtain(emoji.NOTO) == first
        assert calls.read_text().splitlines() == [
            f"pack --silent --pack-destination {first.parent} @iconify-json/noto@1.2.9"
        ]

    def test_a_damaged_cache_is_fetched_again(
        self, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._npm(tmp_path, monkeypatch, f'cp "{packages}/{emoji.NOTO.tarball}" "$4"')
        sources.obtain(emoji.NOTO).write_bytes(b"cut short")
        assert sources.sha256_of(sources.obtain(emoji.NOTO)) == emoji.NOTO.sha256

    def test_failure_is_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._npm(tmp_path, monkeypatch, 'echo "no route" >&2; echo "more" >&2; exit 1')
        with pytest.raises(UserError, match=r"failed \(no route\)") as caught:
            sources.obtain(sources.NOTO)
        assert "\n" not in str(caught.value)

    def test_other_bytes_than_pinned_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._npm(tmp_path, monkeypatch, f'echo other > "$4/{sources.NOTO.tarball}"')
        with pytest.raises(UserError, match="sha256"):
            sources.obtain(sources.NOTO)


@pytest.mark.parametrize("name", ["package/../../../escape", "{absolute}/escape"])
def test_unpack_never_writes_outside(name: str, tmp_path: Path) -> None:
    name = name.format(absolute=tmp_path)
    tarball = tmp_path / "evil.tgz"
    with tarfile.open(tarball, "w:gz") as archive:
        info = tarfile.TarInfo(name)
        info.size = 1
        archive.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(UserError, match=r"evil\.tgz"):
        sources.unpack(dataclasses.replace(sources.NOTO, wanted=(name,)), tarball, tmp_path / "a" / "b")
    assert not (tmp_path / "escape").exists()


def test_unpack_reports_a_broken_archive_and_an_incomplete_one(tmp_path: Path) -> None:
    broken = tmp_path / "broken.tgz"
    broken.write_bytes(b"not a tarball")
    with pytest.raises(UserError, match=r"broken\.tgz cannot be unpacked"):
        sources.unpack(sources.NOTO, broken, tmp_path / "x")
    partial = tmp_path / "partial.tgz"
    _tarball(partial, {"icons.json": "{}"})
    with pytest.raises(UserError, match=r"holds no package/chars\.json"):
        sources.unpack(sources.NOTO, partial, tmp_path / "y")


def test_tarballs_are_named_as_npm_names_them() -> None:
    assert sources.FLUENT_3D.tarball == "lobehub-fluent-emoji-3d-1.1.0.tgz"
    assert sources.EMOJIBASE.tarball == "emojibase-data-17.0.0.tgz"


# ---------------------------------------------------------------- rendering


def test_resizing_keeps_proportions_and_bleeds_no_hidden_colour() -> None:
    art = Image.new("RGBA", (64, 80), (255, 0, 255, 0))  # invisible magenta …
    art.paste((0, 0, 0, 255), (0, 0, 64, 40))  # … below a black upper half
    pixels = np.asarray(render.flatten_square(art, 40)).astype(int)
    assert pixels.shape == (40, 40, 3)
    assert (pixels[..., 0] == pixels[..., 1]).all()  # grey everywhere: no magenta
    assert (pixels[30:] == 255).all()
    assert (pixels[:, :3] > 200).all()  # the padding at the sides, 4 of 40 columns each
    assert (pixels[2:18, 7:33] < 30).all()


@pytest.mark.usefixtures("needs_svg")
def test_icons_that_are_not_square_are_centred() -> None:
    body = '<path d="M0 0h32v33H0z"/>'
    svg = render.icon_svg({"icons": {"tall": {"body": body, "height": 33}}, "width": 32, "height": 32}, "tall")
    assert 'viewBox="-0.5 0 33 33"' in svg
    pixels = np.asarray(render.render_svg(svg, 66))
    assert pixels.shape == (66, 66, 3)
    assert (pixels[:, 3:-3] < 5).all()
    np.testing.assert_array_equal(pixels, pixels[:, ::-1])
    assert pixels[33, 0].min() > 128


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("red apple", "red apple"),
        ("OK hand", "ok hand"),
        ("flag: Japan", "flag of japan"),
        ("keycap: #", "keycap #"),
        ("man: bald", "man with bald head"),
        ("person: blond hair", "person with blond hair"),
        ("man: dark skin tone, red hair", "man with dark skin tone and red hair"),
        ("woman walking: facing right", "woman walking facing right"),
        (
            "person with white cane: light skin tone, facing right",
            "person with white cane with light skin tone facing right",
        ),
        ("kiss: woman, man", "kiss between woman and man"),
        ("couple with heart: man, man", "couple with heart of man and man"),
        ("family: man, woman, girl, boy", "family of man, woman, girl and boy"),
        (
            "kiss: woman, man, light skin tone, dark skin tone",
            "kiss between woman and man with light skin tone and dark skin tone",
        ),
        ("kiss: medium skin tone", "kiss with medium skin tone"),
        ("man’s shoe", "man's shoe"),
        ("Japanese “here” button", "japanese here button"),
    ],
)
def test_clean_label(label: str, expected: str) -> None:
    assert concepts.clean_label(label) == expected
    assert concepts.clean_label(expected) == expected


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("red apple", "a red apple"),
        ("orange", "an orange"),
        ("unicorn", "a unicorn"),
        ("umbrella on ground", "an umbrella on ground"),
        ("hourglass done", "an hourglass done"),
        ("euro banknote", "a euro banknote"),
        ("face with tears of joy", "a face with tears of joy"),
        ("cactus", "a cactus"),
        ("cherries", None),
        ("people hugging", None),
        ("skis", None),
        ("bread", None),
        ("money with wings", None),
        ("one o'clock", None),
        ("six-thirty", None),
        ("t-rex", None),
    ],
)
def test_article(label: str, expected: str | None) -> None:
    assert concepts.with_article(label, "objects") == expected
    assert concepts.with_article(label, "symbols") is None


def test_tags_add_something() -> None:
    tags = ["red", "apple", "Fruit", "OMG", "g2g", "8:30", "fruit", "red apple", "evil-eye", "health food"]
    assert concepts.clean_tags(tags, "red apple") == ("fruit", "evil-eye", "health food")


def _concept(label: str = "red apple", tags: tuple[str, ...] = ("fruit", "ripe", "food")) -> concepts.Concept:
    return concepts.Concept("1f34e", "1f34e", label, tags, "food-drink", "food-fruit", "")


def test_captions() -> None:
    found = concepts.captions(_concept(), "3d")
    plain, tagged, *rest = found
    assert plain == "red apple, 3d"
    assert rest == [
        "a red apple, 3d",
        "3d red apple",
        "3d emoji of a red apple",
        "red apple, 3d, on a white background",
    ]
    start, *two, style = tagged.split(", ")
    assert (start, style, len(two)) == ("red apple", "3d", 2)
    assert set(two) < {"fruit", "ripe", "food"}
    assert concepts.captions(_concept("cherries", ()), "flat") == [
        "cherries, flat",
        "flat cherries",
        "flat emoji of cherries",
        "cherries, flat, on a white background",
    ]


_words = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=9)


@given(label=st.lists(_words, min_size=1, max_size=4).map(" ".join), tags=st.lists(_words, unique=True))
def test_every_caption_names_concept_and_style(label: str, tags: list[str]) -> None:
    for style in STYLES:
        found = concepts.captions(_concept(label, tuple(tags)), style)
        assert len(set(found)) == len(found) >= 3
        assert all(label in caption and style in caption for caption in found)
        assert found == concepts.captions(_concept(label, tuple(reversed(tags))), style)


_code_points = st.lists(st.integers(0x23, 0x1FFFF), min_size=1, max_size=5).map(
    lambda points: "-".join(f"{point:x}" for point in points)
)


@given(_code_points)
def test_concept_id_ignores_spelling(code_points: str) -> None:
    identity = concepts.concept_id(code_points)
    for spelling in (
        identity,
        code_points.upper(),
        code_points.replace("-", "_"),
        code_points.replace("-", "-fe0f-"),
        f"{code_points}-FE0F",
    ):
        assert concepts.concept_id(spelling) == identity


@pytest.mark.parametrize(
    "twins",
    [
        ("1f9d1-200d-1f52c", "1f468-200d-1f52c", "1f469-1f3fd-200d-1f52c"),
        ("1f3c3", "1f3c3-200d-2640", "1f3c3-1f3fb-200d-2642-200d-27a1"),
        ("1f46b", "1f46c", "1f46d", "1f9d1-200d-1f91d-200d-1f9d1"),
        ("1f46a", "1f468-200d-1f469-200d-1f466", "1f469-200d-1f467"),
        ("1f48f", "1f469-200d-2764-200d-1f48b-200d-1f468"),
    ],
)
def test_twins_are_one_family(twins: tuple[str, ...]) -> None:
    assert len({concepts.family_id(twin) for twin in twins}) == 1


@pytest.mark.parametrize("concept", ["1f34e", "2640", "2642", "27a1"])
def test_a_concept_without_twins_is_its_own_family(concept: str) -> None:
    assert concepts.family_id(concept) == concept


# ---------------------------------------------------------------- the split


def test_split_is_pinned() -> None:
    """These values are part of every published number: changing the rule is changing the dataset."""
    assert emoji.split_kinds("1f34e", STYLES) == dict.fromkeys(STYLES, "train")
    assert emoji.split_kinds("1f9d1-1f52c", STYLES) == dict.fromkeys(STYLES, "unseen_concept")
    assert emoji.split_kinds("1f602", STYLES) == {"3d": "train", "flat": "train", "noto": "unseen_pair"}


@given(family=st.text(min_size=1), styles=st.sets(st.sampled_from(STYLES)))
def test_a_held_out_pair_has_a_trained_style(family: str, styles: set[str]) -> None:
    kinds = emoji.split_kinds(family, styles)
    assert set(kinds) == styles
    if "unseen_concept" in kinds.values():
        assert set(kinds.values()) == {"unseen_concept"}
    elif styles:
        assert "train" in kinds.values()
    assert kinds == emoji.split_kinds(family, sorted(styles, reverse=True))


def test_the_last_style_of_a_concept_is_kept_for_training() -> None:
    both = next(
        f
        for f in map(str, range(100_000))
        if all(concepts.stable_hash(f"pair:{f}|{s}") < emoji.HELD_OUT * 2**64 for s in ("3d", "flat"))
        and concepts.stable_hash(f"concept:{f}") >= emoji.HELD_OUT * 2**64
    )
    assert sorted(emoji.split_kinds(both, ("3d", "flat")).values()) == ["train", "unseen_pair"]
    assert emoji.split_kinds(both, ("3d",)) == {"3d": "train"}


def test_about_five_percent_are_held_out_each_way() -> None:
    kinds = [kind for n in range(10_000) for kind in emoji.split_kinds(f"{n:x}", STYLES).values()]
    assert kinds.count("unseen_concept") / len(kinds) == pytest.approx(0.05, abs=0.007)
    assert kinds.count("unseen_pair") / len(kinds) == pytest.approx(0.05 * 0.95, abs=0.005)


# ---------------------------------------------------------------- reading a folder


def _folder(root: Path, *lines: str) -> Path:
    (root / "train").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(root / "train" / "a.png")
    (root / "train" / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


@pytest.mark.parametrize("text", ["a cat", "piñata, 3d", "two\u2028lines", 'with "quotes"', "crlf\r"])
def test_reading_gives_back_what_was_written(text: str, tmp_path: Path) -> None:
    line = json.dumps({"file_name": "a.png", "text": text, "style": "3d"}, ensure_ascii=False)
    (image,) = folder.load_captioned_folder(_folder(tmp_path, line, ""), "train")
    assert image == folder.CaptionedImage(tmp_path / "train" / "a.png", text, (text,), {"style": "3d"})


def test_captions_are_read(tmp_path: Path) -> None:
    line = json.dumps({"file_name": "a.png", "text": "x", "captions": ["x", "y"]})
    (image,) = folder.load_captioned_folder(_folder(tmp_path, line), "train")
    assert image.captions == ("x", "y")


_GOOD = '{"file_name": "a.png", "text": "x"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "a.png", ', "line 2 is not JSON"),
        ("[1, 2]", "line 2 is not a JSON object"),
        ('{"text": "x"}', "line 2 has no file_name"),
        ('{"file_name": "a.png"}', "line 2 has no text"),
        ('{"file_name": "a.png", "text": " "}', "line 2 has no text"),
        ('{"file_name": "a.png", "text": 5}', "line 2 has no text"),
        ('{"file_name": "b.png", "text": "x"}', r"line 2 names b\.png"),
        ('{"file_name": "a.png", "text": "x", "captions": "x"}', "line 2: captions"),
        ('{"file_name": "a.png", "text": "x", "captions": ["x", 3]}', "line 2: captions"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        folder.load_captioned_folder(_folder(tmp_path, _GOOD, line), "train")
    assert "metadata.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_empty_metadata(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hartist data emoji"):
        folder.load_captioned_folder(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match="is empty"):
        folder.load_captioned_folder(_folder(tmp_path / "empty"), "train")
    (tmp_path / "binary" / "train").mkdir(parents=True)
    (tmp_path / "binary" / "train" / "metadata.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        folder.load_captioned_folder(tmp_path / "binary", "train")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    Image.new("RGB", (12, 20), "white").convert(mode).save(path)
    pixels = folder.read_image(path, 8)
    assert (pixels.shape, pixels.dtype) == ((8, 8, 3), np.uint8)
    assert (pixels == 255).all()


def test_transparent_pixels_are_white_and_the_centre_is_kept(tmp_path: Path) -> None:
    art = Image.new("RGBA", (30, 10), (0, 0, 0, 255))
    art.paste((255, 0, 0, 0), (10, 0, 20, 10))
    art.save(tmp_path / "x.png")
    assert (folder.read_image(tmp_path / "x.png", 10) == 255).all()


def test_an_image_of_the_right_size_is_read_exactly(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    np.testing.assert_array_equal(folder.read_image(tmp_path / "x.png", 16), pixels)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    good = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(good, "PNG")
    data = good.getvalue()
    for name, content in {"cut.png": data[: len(data) // 2], "text.png": b"hello", "empty.png": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} cannot be read as an image"):
            folder.read_image(tmp_path / name, 8)
    with pytest.raises(UserError, match=r"gone\.png does not exist"):
        folder.read_image(tmp_path / "gone.png", 8)
