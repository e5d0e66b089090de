"""The reader: every layout, every kind of damage, every position."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

pytest.importorskip("datasets")
import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from hartist.commands.data import examine, format_report
from hartist.data import reader
from hartist.data.folder import read_image
from hartist.data.locate import is_local
from hartist.data.reader import Source, open_dataset
from hartist.data.records import Broken, Columns, Record, Skipped, guess_columns
from hartist.data.stream import ImageStream, Sample, Settings
from hartist.data.transform import BrokenImage, decode, prepare
from hartist.errors import UserError
from hartist.training.images import load_images

SIDE = 12


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the library copies goes into a folder of the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def pixels(number: int, width: int = SIDE, height: int = SIDE) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(number: int, width: int = SIDE, height: int = SIDE) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(number, width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def caption(number: int) -> str:
    return f"picture number {number}"


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def members(numbers: Sequence[int], text: str = "txt") -> list[tuple[str, bytes]]:
    """A WebDataset's members: an image and its caption for each number."""
    found = []
    for n in numbers:
        words = caption(n).encode() if text == "txt" else json.dumps({"caption": caption(n), "width": SIDE}).encode()
        found += [(f"{n:04d}.png", png(n)), (f"{n:04d}.{text}", words)]
    return found


def write_tars(folder: Path, count: int, shards: int) -> Path:
    """`count` images over `shards` tars, as evenly as it goes."""
    for shard, numbers in enumerate(np.array_split(np.arange(count), shards)):
        write_tar(folder / f"{shard:03d}.tar", members(numbers.tolist()))
    return folder


def write_folder(folder: Path, count: int, kind: str = "jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        (folder / f"{n:04d}.png").write_bytes(png(n))
    rows = [{"file_name": f"{n:04d}.png", "text": caption(n)} for n in range(count)]
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        with open(folder / "metadata.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")
    return folder


def write_parquet(path: Path, numbers: Sequence[int], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(n), "path": f"{n:04d}.png"} for n in numbers]
    pq.write_table(pa.table({"image": images, "caption": [caption(n) for n in numbers]}), path, **options)
    return path


def records(source: Source) -> list[Record]:
    found = list(source.records())
    assert all(isinstance(record, Record) for record in found), found
    return found  # type: ignore[return-value]


def settings_of(**changes: Any) -> Settings:
    return Settings(SIDE, **({"epochs": 1} | changes))


# --------------------------------------------------------------------- layouts


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("layout", ["jsonl", "csv", "metadata parquet", "tar txt", "tar json", "parquet"])
def test_every_layout_gives_the_same_images_and_captions(layout: str, streaming: bool, tmp_path: Path) -> None:
    if layout in ("jsonl", "csv", "metadata parquet"):
        source = write_folder(tmp_path / "set", 5, layout.split()[-1])
    elif layout.startswith("tar"):
        for shard, numbers in enumerate(([0, 1, 2], [3, 4])):
            write_tar(tmp_path / "set" / f"{shard}.tar", members(numbers, layout.split()[1]))
        source = tmp_path / "set"
    else:
        write_parquet(tmp_path / "set" / "a.parquet", [0, 1, 2])
        source = write_parquet(tmp_path / "set" / "b.parquet", [3, 4]).parent
    opened = open_dataset(source, streaming=streaming)
    found = records(opened)
    assert [record.name for record in found] == [f"{n:04d}.png" for n in range(5)]
    assert [record.captions for record in found] == [(caption(n),) for n in range(5)]
    samples = list(ImageStream(opened, settings_of(shuffle=False)))
    assert [sample.name for sample in samples] == [record.name for record in found]
    for n, sample in enumerate(samples):
        np.testing.assert_array_equal(sample.pixels, pixels(n))


def test_a_hub_repository_is_read_as_the_library_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same layout that a parquet dataset has on the Hub, with the Hub's name for its splits."""
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", [0, 1])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", [2])
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", [7])
    monkeypatch.setattr(reader, "is_local", lambda source: False)
    for streaming in (True, False):
        assert len(records(open_dataset(str(tmp_path), streaming=streaming))) == 3
        (held_out,) = records(open_dataset(str(tmp_path), "validation", streaming=streaming))
        assert held_out.captions == (caption(7),)
        with pytest.raises(UserError, match="test"):
            open_dataset(str(tmp_path), "test", streaming=streaming)


def test_a_hub_id_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> None:
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub\n(offline mode is enabled)")

    monkeypatch.setattr(datasets, "load_dataset_builder", offline)
    with pytest.raises(UserError, match=r"owner/name is no local path.*Couldn't reach") as caught:
        open_dataset("owner/name")
    assert "\n" not in str(caught.value)


def test_splits_are_told_by_folders_and_file_names(tmp_path: Path) -> None:
    write_folder(tmp_path / "a" / "train", 2)
    write_folder(tmp_path / "a" / "val", 1)
    assert [len(records(open_dataset(tmp_path / "a", split))) for split in ("train", "validation")] == [2, 1]
    write_parquet(tmp_path / "b" / "train-00000-of-00001.parquet", [0, 1, 2])
    write_parquet(tmp_path / "b" / "extra-00000-of-00001.parquet", [3])
    assert [len(records(open_dataset(tmp_path / "b", split))) for split in ("train", "extra")] == [3, 1]
    write_tars(tmp_path / "c", 4, 2)
    assert len(records(open_dataset(tmp_path / "c", streaming=True))) == 4  # no file names a split: all is for training
    assert len(records(open_dataset(f"{tmp_path}/c/*1.tar", streaming=True))) == 2
    assert len(records(open_dataset(tmp_path / "c" / "000.tar", streaming=True))) == 2
    with pytest.raises(UserError, match="no split 'validation'; it has train"):
        open_dataset(tmp_path / "c", "validation")


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no metadata\.jsonl, \.tar or \.parquet"):
        open_dataset(tmp_path / "empty")
    with pytest.raises(UserError, match="nowhere does not exist"):
        open_dataset(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    assert is_local("empty")
    assert is_local("empty/nowhere")
    assert is_local("owner/name/more")
    assert is_local("shards/*.tar")
    assert not is_local("owner/name")
    with pytest.raises(UserError, match="no file matches"):
        open_dataset(f"{tmp_path}/*.tar")
    write_folder(tmp_path / "blank", 1)
    (tmp_path / "blank" / "metadata.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match=r"metadata\.jsonl is empty"):
        open_dataset(tmp_path / "blank")
    (tmp_path / "blank" / "metadata.jsonl").write_text('{"file_name": ')
    with pytest.raises(UserError, match=r"metadata\.jsonl cannot be read: JSON"):
        open_dataset(tmp_path / "blank")
    (tmp_path / "blank" / "metadata.jsonl").write_text('{"file_name": "../../x.png", "text": "x"}')
    with pytest.raises(UserError, match=r"metadata\.jsonl cannot be read: Invalid metadata"):
        open_dataset(tmp_path / "blank")
    write_tars(tmp_path / "both", 1, 1)
    write_parquet(tmp_path / "both" / "a.parquet", [0])
    with pytest.raises(UserError, match=r"both \.tar and \.parquet"):
        open_dataset(tmp_path / "both")


def test_the_fingerprint_changes_with_files_and_columns(tmp_path: Path) -> None:
    def fingerprint(path: Path, **options: Any) -> str:
        return open_dataset(path, streaming=True, **options).fingerprint

    folder = write_folder(tmp_path / "folder", 3)
    tars = write_tars(tmp_path / "tars", 3, 2)
    seen = {fingerprint(folder), fingerprint(tars)}
    assert seen == {fingerprint(folder), fingerprint(tars)}  # the same every time
    moved = shutil.copytree(folder, tmp_path / "moved", copy_function=shutil.copy2)
    assert fingerprint(moved) in seen  # and in any place
    (folder / "0001.png").write_bytes(png(9, 30))
    os.utime(tars / "001.tar", ns=(1, 1))
    seen |= {fingerprint(folder), fingerprint(tars), fingerprint(tars, caption_columns=["txt", "__key__"])}
    assert len(seen) == 5


# --------------------------------------------------------------------- columns


def test_captions_are_lists_or_strings_and_never_repeat(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, 4)
    rows: list[dict[str, Any]] = [
        {"text": "main", "captions": ["one", " two ", "one"]},
        {"text": "main", "captions": []},
        {"text": "main", "captions": None},
        {"text": "main", "captions": ["", "three"]},
    ]
    lines = [json.dumps({"file_name": f"{n:04d}.png", "style": "3d", **row}) for n, row in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    found = records(open_dataset(folder))
    assert [record.captions for record in found] == [("one", "two"), ("main",), ("main",), ("three",)]
    assert {record.text for record in found} == {"main"}
    assert found[0].extra == {"style": "3d"}
    both = records(open_dataset(folder, caption_columns=["text", "captions"]))
    assert both[0].captions == ("main", "one", "two")


@pytest.mark.parametrize(
    ("features", "asked", "expected"),
    [
        ({"image": 0, "caption": 0}, {}, Columns("image", ("caption",))),
        ({"jpg": 0, "txt": 0, "json": {"caption": 0}}, {}, Columns("jpg", ("txt",))),
        ({"webp": 0, "json": {"caption": 0, "url": 0}}, {}, Columns("webp", ("json.caption",))),
        ({"png": 0, "captions": 0, "text": 0}, {}, Columns("png", ("captions",), "text")),
        ({"photo": 0, "text": 0}, {"images": ["photo"]}, Columns("photo", ("text",))),
        ({"a.png": 0, "b.png": 0, "txt": 0}, {"image_column": "b.png"}, Columns("b.png", ("txt",))),
        ({"image": 0, "x": {"y": {"z": 0}}}, {"caption_columns": ["x.y.z"]}, Columns("image", ("x.y.z",))),
        ({"image": 0, "label": 0}, {"label_column": "label"}, Columns("image", (), None, "label")),
    ],
)
def test_columns_are_guessed_or_taken(features: dict[str, Any], asked: dict[str, Any], expected: Columns) -> None:
    assert guess_columns("set", features, asked.pop("images", []), **asked) == expected


@pytest.mark.parametrize(
    ("features", "asked", "message"),
    [
        ({"image": 0, "size": 0}, {}, "no column of captions; its columns are image, size: name one by --caption-col"),
        (
            {"photo": 0, "text": 0, "__key__": 0},
            {},
            "no column of images that can be told; its columns are photo, text",
        ),
        ({"image": 0, "text": 0}, {"caption_columns": ["txt"]}, "no column 'txt'; its columns are image, text"),
        ({"image": 0, "text": 0}, {"image_column": "jpg"}, "no column 'jpg'"),
        ({"image": 0, "text": 0}, {"label_column": "label"}, "no column 'label'"),
        ({"image": 0, "json": {"a": 0}}, {"caption_columns": ["json.b"]}, r"'json.b'; its columns are image, json\.a"),
    ],
)
def test_columns_that_are_missing_are_named(features: dict[str, Any], asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        guess_columns("set", features, [], **asked)


def test_class_numbers_may_stand_in_for_captions(tmp_path: Path) -> None:
    images = [{"bytes": png(n), "path": None} for n in range(3)]
    pq.write_table(pa.table({"image": images, "label": [4, None, 0]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column of captions; its columns are image, label"):
        open_dataset(tmp_path)
    source = open_dataset(tmp_path, label_column="label", streaming=True)
    first, second, third = source.records()
    assert isinstance(first, Record)
    assert isinstance(third, Record)
    assert (first.label, first.captions, third.label) == (4, (), 0)
    assert second == Broken("a.parquet row 1", "no class number", "caption")
    assert [sample.label for sample in ImageStream(source, settings_of(shuffle=False))] == [4, 0]


# --------------------------------------------------------------------- damage


def test_broken_images_and_empty_captions_are_counted_and_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", 6)
    (folder / "0001.png").write_bytes(png(1)[:60])
    (folder / "0002.png").write_text("not an image")
    (folder / "0003.png").unlink()
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    lines[4] = json.dumps({"file_name": "0004.png", "text": "  "})
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    stream = ImageStream(open_dataset(folder), settings_of())
    assert {sample.name for sample in stream} == {"0000.png", "0005.png"}
    assert {(broken.name, broken.kind) for broken in stream.skipped.found.values()} == {
        ("0001.png", "image"),
        ("0002.png", "image"),
        ("0003.png", "image"),
        ("0004.png", "caption"),
    }
    assert stream.skipped.found["image", "0003.png"].reason == "does not exist"
    assert stream.skipped.found["image", "0002.png"].reason == "not an image"
    assert len(list(ImageStream(open_dataset(folder), settings_of(epochs=3)))) == 6  # and named once
    report = examine(open_dataset(folder), progress=False)
    text = format_report(open_dataset(folder), "train", report)
    assert (report.images, report.captions, len(report.skipped)) == (2, 2, 4)
    assert "broken images: 3" in text
    assert "images without captions: 1" in text


def test_a_set_without_any_good_image_is_an_error(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", 3)
    for n in range(3):
        (folder / f"{n:04d}.png").write_bytes(b"no")
    for epochs in (1, None):
        with pytest.raises(UserError, match="no image that can be read: 3 skipped: 000"):
            list(ImageStream(open_dataset(folder), settings_of(epochs=epochs)))
    with pytest.raises(UserError, match="no image in train that can be read"):
        load_images(folder, "train", 8, progress=False)
    with pytest.raises(UserError, match="no image that can be read"):
        examine(open_dataset(folder), progress=False)
    with pytest.raises(UserError, match="no image that can be read"):  # more ranks than images
        list(ImageStream(open_dataset(write_folder(tmp_path / "one", 1)), settings_of(world_size=2), rank=1))


def test_what_is_skipped_is_remembered_up_to_a_limit() -> None:
    skipped = Skipped(limit=3)
    for n in (0, 1, 1, 0, 2, 3, 4):
        skipped.add(Broken(f"{n}.png", "broken", "image"))
    assert len(skipped) == 5
    assert skipped.summary(2) == "5 skipped: 0.png (broken), 1.png (broken) and 3 more"


@pytest.mark.parametrize("cut", [0, 700, 5000])
@pytest.mark.parametrize("position", [0, 1])
def test_a_cut_off_tar_loses_only_what_was_cut(cut: int, position: int, tmp_path: Path) -> None:
    """0: an empty file; 700: within the first image; 5000: after some images."""
    folder = write_tars(tmp_path / "set", 36, 3)
    path = folder / f"{position:03d}.tar"
    path.write_bytes(path.read_bytes()[:cut])
    stream = ImageStream(open_dataset(folder, streaming=True), settings_of(shuffle=False))
    names = [sample.name for sample in stream]
    assert names == sorted(set(names))
    lost = {f"{n:04d}.png" for n in range(36)} - set(names)
    assert {f"{n:04d}.png" for n in range(12 * position, 12 * position + 12)} >= lost
    assert len(lost) == 12 or (cut == 5000 and position == 1)  # the first one has to tell the columns
    assert lost
    assert cut < 5000 or position == 0 or names[12] == "0012.png"
    (broken,) = stream.skipped.found.values()
    assert (broken.name, broken.kind) == (path.name, "shard")
    with pytest.raises(UserError, match=rf"{path.name} is damaged|no shard can be read"):
        open_dataset(f"{folder}/{path.name}" if position == 0 else folder, streaming=False)


@pytest.mark.parametrize("into_header", [0, 100])
def test_a_tar_cut_off_between_its_files_is_told_of(into_header: int, tmp_path: Path) -> None:
    """Libraries take such a tar for whole."""
    folder = write_tars(tmp_path / "set", 36, 3)
    path = folder / "001.tar"
    with tarfile.open(path) as tar:
        cut = tar.getmembers()[16].offset + into_header
    path.write_bytes(path.read_bytes()[:cut])
    stream = ImageStream(open_dataset(folder, streaming=True), settings_of(shuffle=False))
    assert len(list(stream)) == 12 + 8 + 12
    (broken,) = stream.skipped.found.values()
    assert (broken.name, broken.kind) == (path.name, "shard")
    assert "cut off" in broken.reason
    with pytest.raises(UserError, match=rf"{path.name} is damaged \(it has no end mark"):
        open_dataset(folder, streaming=False)


def test_damaged_parquet_files_are_named(tmp_path: Path) -> None:
    for shard in range(3):
        write_parquet(tmp_path / f"{shard}.parquet", range(4 * shard, 4 * shard + 4), row_group_size=2)
    cut, torn = tmp_path / "0.parquet", tmp_path / "2.parquet"
    cut.write_bytes(cut.read_bytes()[:-10])
    content = bytearray(torn.read_bytes())
    with pq.ParquetFile(torn) as file:
        start = file.metadata.row_group(1).column(0).data_page_offset
    content[start : start + 400] = b"\xff" * 400
    torn.write_bytes(content)
    stream = ImageStream(open_dataset(tmp_path, streaming=True), settings_of())
    names = {sample.name for sample in stream}
    assert names >= {f"{n:04d}.png" for n in range(4, 8)}
    assert names <= {f"{n:04d}.png" for n in range(4, 10)}  # the library may read a row group ahead
    assert {broken.name for broken in stream.skipped.of("shard")} == {"0.parquet", "2.parquet"}
    with pytest.raises(UserError, match=r"2\.parquet is damaged"):
        open_dataset(tmp_path, streaming=False)


def test_no_shard_left_is_an_error(tmp_path: Path) -> None:
    for n in range(2):
        (tmp_path / f"{n}.tar").write_bytes(b"junk" * 200)
    with pytest.raises(UserError, match=r"no shard can be read; 0\.tar: "):
        open_dataset(tmp_path, streaming=True)


def test_a_lost_connection_stops_instead_of_skipping(tmp_path: Path) -> None:
    """A shard on the network that can't be read on is no damage: the run stops and can be resumed."""
    source = open_dataset(write_tars(tmp_path, 4, 2), streaming=True)

    class Lost:
        def shard(self, num_shards: int, index: int) -> Lost:
            return self

        def iter(self, batch_size: int) -> Iterator[dict[str, list[Any]]]:
            yield {"png": [{"bytes": png(0), "path": None}], "txt": ["x"]}
            raise ConnectionResetError("reset by peer")

    remote = replace(source, stream=Lost(), root=None)
    stream = iter(ImageStream(remote, settings_of(shuffle=False)))
    next(stream)
    with pytest.raises(UserError, match=r"000\.tar cannot be read on \(reset by peer\); to resume, run the same"):
        next(stream)


# --------------------------------------------------------------------- decoding and cropping


@given(width=st.integers(1, 40), height=st.integers(1, 40), size=st.integers(1, 24))
@settings(max_examples=60)
def test_the_centre_square_is_what_the_library_crops(width: int, height: int, size: int) -> None:
    image = Image.fromarray(pixels(width * height, width, height))
    found = prepare(image, size)
    assert (found.shape, found.dtype) == ((size, size, 3), np.uint8)
    expected = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(found, np.array(expected))


@given(seed=st.integers(0, 2**32), flip=st.booleans())
@settings(max_examples=60)
def test_a_random_crop_is_somewhere_along_the_longer_side(seed: int, flip: bool) -> None:
    """At a crop's own size no pixel is resampled but for a shift below one: columns stay in their order."""
    ramp = np.repeat(np.arange(100, dtype=np.uint8)[None, :, None], 20, 0).repeat(3, 2)
    image = Image.fromarray(ramp)
    found = prepare(image, 20, "random", flip, np.random.default_rng(seed))
    again = prepare(image, 20, "random", flip, np.random.default_rng(seed))
    np.testing.assert_array_equal(found, again)
    row = found[0, :, 0].astype(int)
    steps = np.diff(row)
    assert abs(abs(row[-1] - row[0]) - 19) <= 2  # a window of 20 columns, neither wider nor narrower
    assert (steps >= 0).all() or (flip and (steps <= 0).all())


def test_crops_and_flips_vary() -> None:
    image = Image.fromarray(pixels(0, 60, 20))
    crops = [prepare(image, 20, "random", False, np.random.default_rng(seed)).tobytes() for seed in range(8)]
    assert len(set(crops)) == 8
    flips = [prepare(image, 20, "centre", True, np.random.default_rng(seed)) for seed in range(64)]
    plain = prepare(image, 20)
    mirrored = [bool((found == plain[:, ::-1]).all()) for found in flips]
    assert all(mirror or (found == plain).all() for mirror, found in zip(mirrored, flips, strict=True))
    assert 16 < sum(mirrored) < 48


def test_exif_orientation_alpha_and_16_bits_are_respected(tmp_path: Path) -> None:
    image = Image.new("RGB", (10, 20), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # stored a quarter turn off
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert decode(tmp_path / "turned.jpg").size == (20, 10)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert decode((tmp_path / "clear.png").read_bytes()).getpixel((0, 0)) == (255, 255, 255)
    Image.fromarray(np.full((4, 4), 0x80FF, np.uint16)).save(tmp_path / "deep.png")
    assert decode(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)


def encoded(format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(1, 24, 16)).save(buffer, format)
    return buffer.getvalue()


FORMATS = {name: encoded(name) for name in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")}


@given(
    format=st.sampled_from(sorted(FORMATS)),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    kept=st.floats(0, 1),
)
@settings(max_examples=150)
@example(format="PNG", edits=[], kept=0.0)
def test_no_damage_is_fatal(format: str, edits: list[tuple[float, int]], kept: float) -> None:
    data = bytearray(FORMATS[format])
    for place, value in edits:
        data[int(place * len(data))] = value
    mode, reason = "", ""
    try:
        mode = decode(bytes(data[: int(kept * len(data)) + 1])).mode
    except BrokenImage as error:
        reason = str(error)
    assert mode == "RGB" or (reason and "\n" not in reason)


# --------------------------------------------------------------------- order and position


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """13 images by row number and in 1, 3 and 4 shards; image 5 is broken and image 7 has no caption."""
    root = tmp_path_factory.mktemp("sets")
    folder = write_folder(root / "rows", 13)
    (folder / "0005.png").write_bytes(b"broken")
    text = (folder / "metadata.jsonl").read_text().replace(caption(7), "")
    (folder / "metadata.jsonl").write_text(text)
    found = {"rows": open_dataset(folder)}
    for shards in (1, 3, 4):
        for shard, numbers in enumerate(np.array_split(np.arange(13), shards)):
            content = dict(members(numbers.tolist()))
            content |= {name: b"broken" for name in content if name == "0005.png"}
            content |= {name: b"" for name in content if name == "0007.txt"}
            write_tar(root / str(shards) / f"{shard}.tar", list(content.items()))
        found[f"{shards} shards"] = open_dataset(root / str(shards), streaming=True)
    return found


GOOD = {f"{n:04d}.png" for n in range(13)} - {"0005.png", "0007.png"}
KINDS = ("rows", "1 shards", "3 shards", "4 shards")
ORDERS: dict[str, Any] = {
    "shuffle": st.booleans(),
    "seed": st.integers(-3, 3),
    "block": st.integers(1, 20),
    "world_size": st.integers(1, 4),
}


@given(kind=st.sampled_from(KINDS), order=st.fixed_dictionaries(ORDERS), epochs=st.integers(1, 2))
@settings(max_examples=40)
def test_an_epoch_has_every_image_once_over_all_ranks(
    sets: dict[str, Source], kind: str, order: dict[str, Any], epochs: int
) -> None:
    names: Counter[str] = Counter()
    skipped = set()
    for rank in range(order["world_size"]):
        stream = ImageStream(sets[kind], settings_of(epochs=epochs, **order), rank)
        names.update(sample.name for sample in stream)
        skipped |= {broken.name for broken in stream.skipped.found.values()}
    assert names == dict.fromkeys(GOOD, epochs)
    assert skipped == {"0005.png", "0007.png"}


@given(
    kind=st.sampled_from(KINDS),
    order=st.fixed_dictionaries(ORDERS),
    rank=st.integers(0, 3),
    stop=st.integers(0, 25),
    epochs=st.sampled_from([2, None]),
)
@settings(max_examples=30)
def test_resuming_gives_exactly_what_remains(
    sets: dict[str, Source], kind: str, order: dict[str, Any], rank: int, stop: int, epochs: int | None
) -> None:
    def stream() -> ImageStream:
        asked = settings_of(epochs=epochs, crop="random", flip=True, **order)
        return ImageStream(sets[kind], asked, rank % order["world_size"])

    def taken(source: ImageStream, count: int) -> list[tuple[str, bytes]]:
        return [(s.name, s.pixels.tobytes()) for s, _ in zip(source, range(count), strict=False)]

    def rest(source: ImageStream) -> list[tuple[str, bytes]]:
        return taken(source, 30) if epochs is None else [(s.name, s.pixels.tobytes()) for s in source]

    whole, first, second = stream(), stream(), stream()
    iterator = iter(first)
    before = [(s.name, s.pixels.tobytes()) for s in (next(iterator, None) for _ in range(stop)) if s is not None]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    after = rest(second)
    assert before + after == taken(whole, len(before) + len(after) + (epochs is not None))


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_at_every_position(sets: dict[str, Source], kind: str) -> None:
    asked = settings_of(block=4, epochs=2)
    whole = ImageStream(sets[kind], asked)
    names, states = [], [whole.state_dict()]
    for sample in whole:
        names.append(sample.name)
        states.append(whole.state_dict())
    assert len(names) == 2 * len(GOOD)
    assert names[: len(GOOD)] != names[len(GOOD) :]  # another order in the second epoch
    for position, state in enumerate(states[:-1]):
        resumed = ImageStream(sets[kind], asked)
        resumed.load_state_dict(state)
        assert [sample.name for sample in resumed] == names[position:]


@pytest.mark.parametrize("kind", ["rows", "1 shards", "4 shards"])
def test_ranks_and_workers_share_the_images_and_can_be_resumed(sets: dict[str, Source], kind: str) -> None:
    """Two ranks with two worker processes each, the second one interrupted while its workers have read ahead."""
    asked = settings_of(world_size=2, workers=2, block=3)
    by_rank = [[sample.name for sample in ImageStream(sets[kind], asked, rank)] for rank in range(2)]
    assert Counter(by_rank[0] + by_rank[1]) == dict.fromkeys(GOOD, 1)
    first, second = ImageStream(sets[kind], asked, 1), ImageStream(sets[kind], asked, 1)
    iterator = iter(first)
    before = [next(iterator).name for _ in range(3)]  # an odd number: it is the second worker's turn
    second.load_state_dict(first.state_dict())
    assert before + [sample.name for sample in second] == by_rank[1]


def test_a_position_of_other_settings_is_refused(sets: dict[str, Source]) -> None:
    state = ImageStream(sets["rows"], settings_of()).state_dict()
    for changes, name in (({"seed": 1}, "seed"), ({"world_size": 2}, "world size"), ({"workers": 3}, "workers")):
        with pytest.raises(UserError, match=f"saved with {name}"):
            ImageStream(sets["rows"], settings_of(**changes)).load_state_dict(state)
    with pytest.raises(UserError, match="saved with shards None"):
        ImageStream(sets["3 shards"], settings_of()).load_state_dict(state)


def test_reading_ahead_leaves_the_random_numbers_alone(sets: dict[str, Source]) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(iter(ImageStream(sets["rows"], settings_of(workers=1))))
    assert torch.equal(torch.get_rng_state(), before)


# --------------------------------------------------------------------- into memory


def test_images_are_read_into_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "set", 4)
    found = load_images(folder, "train", 8, progress=False)
    assert [item.path for item in found.items] == [folder.resolve() / f"{n:04d}.png" for n in range(4)]
    assert [item.captions for item in found.items] == [(caption(n),) for n in range(4)]
    for n in range(4):
        np.testing.assert_array_equal(found.pixels[n].numpy(), read_image(folder / f"{n:04d}.png", 8))
    assert capsys.readouterr().err == ""
    assert load_images(write_tars(tmp_path / "tars", 4, 2), "train", 8, progress=False).fingerprint == found.fingerprint

    fingerprints = {found.fingerprint}
    (folder / "0002.png").write_bytes(png(99))
    fingerprints.add(load_images(folder, "train", 8, progress=False).fingerprint)
    text = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(text.replace(caption(1), "another"))
    fingerprints.add(load_images(folder, "train", 8, progress=False).fingerprint)
    (folder / "0003.png").unlink()
    some = load_images(folder, "train", 8, progress=False)
    assert some.pixels.shape == (3, 8, 8, 3)
    assert "1 skipped: 0003.png (does not exist)" in capsys.readouterr().err
    assert len(fingerprints | {some.fingerprint}) == 4


def test_a_sample_is_checked_by_its_shape() -> None:
    with pytest.raises(Exception, match="pixels"):
        Sample(np.zeros((3, 4), np.uint8), ("x",), "x")
