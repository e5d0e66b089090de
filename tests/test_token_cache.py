"""Token caches: what they hold, what they refuse, and how they go on after an interruption."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hartist.cli import main
from hartist.data.records import Broken, Skipped
from hartist.data.stream import Sample
from hartist.errors import UserError
from hartist.pixels import from_uint8
from hartist.scales import ScaleSchedule
from hartist.tokenizer.checkpoint import save_tokenizer
from hartist.training import token_filling
from hartist.training.images import ImageSet
from hartist.training.token_cache import build_token_cache, cache_parts
from hartist.training.token_filling import fill_token_cache
from hartist.training.token_shards import (
    ShardedTokenCache,
    TokenCache,
    open_token_cache,
    read_index,
    read_shard,
    spread_rows,
)
from small import WordEncoder, image_set, random_tokenizer
from tiny import SIZE, tiny_tokenizer, write_tiny_bert

IMAGES = 7


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of two images, shards of three batches at most."""
    monkeypatch.setattr(token_filling, "BATCH", 2)
    monkeypatch.setattr(token_filling, "SHARD_IMAGES", 3)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenCache, ShardedTokenCache]:
    """The same cache of several shards, in memory and mapped."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_filling, "BATCH", 2)
        patch.setattr(token_filling, "SHARD_IMAGES", 3)
        whole = build(path)
    mapped = open_token_cache(path, in_memory=0)
    assert isinstance(mapped, ShardedTokenCache)
    assert [len(shard) for shard in mapped.shards] == [4, 3]
    return whole, mapped


def build(path: Path, images: ImageSet | None = None, **options: Any) -> TokenCache:
    tokenizer, encoder = options.pop("tokenizer", random_tokenizer()), options.pop("encoder", WordEncoder())
    return build_token_cache(path, images or image_set(IMAGES), tokenizer, encoder, progress=False, **options)


def same(a: TokenCache, b: TokenCache) -> bool:
    """Equal images, with equal captions and equal states of each."""
    names = ("ids_NL", "last_scale_NmC", "num_captions_N", "first_caption_N")
    captions = torch.arange(int(a.num_captions_N.sum()))
    return (
        all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)
        and a.captions(captions) == b.captions(captions)
        and torch.equal(a.context(captions).states_BSC, b.context(captions).states_BSC)
        and torch.equal(a.context(captions).mask_BS, b.context(captions).mask_BS)
    )


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def meaning(path: Path) -> dict[str, Any]:
    """The contents of a cache; the library writes a shard's metadata in any order."""
    found: dict[str, Any] = {}
    for file in path.iterdir():
        if file.suffix == ".safetensors":
            tensors, metadata = read_shard(file)
            found[file.name] = {name: tensor.tolist() for name, tensor in tensors.items()} | metadata
        else:
            found[file.name] = file.read_text()
    return found


# --------------------------------------------------------------------- what it holds


def test_it_holds_what_tokenizer_and_encoder_give(tmp_path: Path) -> None:
    tokenizer, images, encoder = random_tokenizer(), image_set(IMAGES), WordEncoder()
    built = build(tmp_path / "cache", images, tokenizer=tokenizer, encoder=encoder)
    read = open_token_cache(tmp_path / "cache")
    assert isinstance(read, TokenCache)
    tokens = tokenizer.encode(from_uint8(images.pixels))
    for cache in (built, read):
        assert len(cache) == IMAGES
        assert torch.equal(cache.ids_NL, torch.cat(tokens.ids, 1).int())
        # float16: at most half a unit in the last of 11 bits
        exact = tokens.last_scale_BlC
        assert ((cache.last_scale_NmC - exact).abs() <= exact.abs() * 2**-11 + 2**-25).all()
        assert cache.num_captions_N.tolist() == [1, 2, 3, 1, 2, 3, 1]
        assert cache.first_caption_N.tolist() == [0, 1, 3, 6, 7, 9, 12]
        for i, item in enumerate(images.items):
            rows = cache.first_caption_N[i] + torch.arange(len(item.captions))
            context, wanted = cache.context(rows), encoder.encode(item.captions)
            torch.testing.assert_close(context.states_BSC, wanted.states_BSC, rtol=2**-11, atol=1e-7)
            assert torch.equal(context.mask_BS, wanted.mask_BS)
            assert torch.equal(context.position_ids_BS, wanted.position_ids_BS)
            assert cache.captions(rows) == list(item.captions)


def test_a_caption_that_many_images_share_is_encoded_once(small_shards: None, tmp_path: Path) -> None:
    images = image_set(IMAGES)
    items = [dataclasses.replace(item, captions=("猫, noto", f"own {i // 2}")) for i, item in enumerate(images.items)]
    encoder = WordEncoder()
    cache = build(tmp_path, dataclasses.replace(images, items=items), encoder=encoder)
    assert len(cache.texts) == 5
    assert cache.captions(torch.arange(14)) == [text for item in items for text in item.captions]
    assert encoder.calls == 4  # one a batch


@pytest.mark.parametrize(("count", "rows"), [(1, [0]), (3, [0, 2, 4]), (7, list(range(7))), (99, list(range(7)))])
def test_some_rows_come_from_all_over_a_cache(tmp_path: Path, count: int, rows: list[int]) -> None:
    assert spread_rows(build(tmp_path), count).tolist() == rows


def test_another_schedule_than_the_tokenizers_own(tmp_path: Path) -> None:
    """A stage at half the size: 16 px are 2 × 2 cells."""
    tokenizer, images = random_tokenizer(), image_set(IMAGES)
    half = dataclasses.replace(images, pixels=images.pixels[:, ::2, ::2].contiguous())
    schedule = ScaleSchedule.from_sides((1, 2))
    cache = build(tmp_path, half, tokenizer=tokenizer, schedule=schedule)
    tokens = tokenizer.encode(from_uint8(half.pixels), schedule)
    assert torch.equal(cache.ids_NL, torch.cat(tokens.ids, 1).int())
    assert cache.ids_NL.shape == (IMAGES, 5)
    build(tmp_path / "whole", images, tokenizer=tokenizer)
    assert read_index(tmp_path / "whole")["key"] != read_index(tmp_path)["key"]
    with pytest.raises(UserError, match="16 px are 2 × 2 cells to this tokenizer, but the last scale is 4 × 4"):
        build(tmp_path, half, tokenizer=tokenizer)


def test_ids_take_two_bytes_where_they_fit(tmp_path: Path) -> None:
    for vocab_size, dtype in ((32, torch.int16), (2**15, torch.int16), (2**15 + 1, torch.int32)):
        path = tmp_path / str(vocab_size)
        cache = build(path, image_set(2), tokenizer=random_tokenizer(vocab_size=vocab_size))
        stored = read_shard(path / "00000.safetensors")[0]["ids_NL"]
        assert stored.dtype == dtype
        assert torch.equal(cache.ids_NL, stored.int())


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    tokenizer = random_tokenizer()
    tokenizer.quant_conv.weight.mul_(1e6)
    with pytest.raises(UserError, match="latents have values that are not finite in float16"):
        build(tmp_path, tokenizer=tokenizer)


def test_a_cache_of_classes_needs_no_text(small_shards: None, tmp_path: Path) -> None:
    images = image_set(5)
    stream = Numbered(images)
    tokenizer = random_tokenizer()
    parts = cache_parts(tokenizer, None, 32)
    index = fill_token_cache(tmp_path, stream, tokenizer, None, parts, progress=False)
    assert (index["images"], index["captions"], index["texts"]) == (5, 0, 0)
    for limit in (0, 1 << 30):
        cache = open_token_cache(tmp_path, parts, in_memory=limit)
        labels = cache.rows(torch.tensor([4, 0, 3])).label_N
        assert labels is not None
        assert labels.tolist() == [40, 0, 30]
    assert build(tmp_path / "text").label_N is None


class Numbered:
    """Images with class numbers instead of captions, as a stream."""

    def __init__(self, images: ImageSet) -> None:
        self.images, self.done = images, 0
        self.skipped = Skipped()
        self.skipped.add(Broken("a.tar", "known from the start", "shard"))

    def __iter__(self) -> Iterator[Sample]:
        for i in range(self.done, len(self.images.items)):
            self.done = i + 1
            yield Sample(self.images.pixels[i].numpy(), (), str(i), 10 * i)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]


def test_mirrored_images_follow_their_originals(small_shards: None, tmp_path: Path) -> None:
    tokenizer, images, encoder = random_tokenizer(), image_set(5), WordEncoder()
    stream = Numbered(images)
    fill_token_cache(tmp_path, stream, tokenizer, None, {"flip": True, "limit": 3}, progress=False)
    cache = open_token_cache(tmp_path)
    assert isinstance(cache, TokenCache)
    both = torch.stack([images.pixels[:3], images.pixels[:3].flip(2)], 1).flatten(0, 1)
    expected = build(
        tmp_path / "plain", ImageSet(both, images.items[:1] * 6, "x"), tokenizer=tokenizer, encoder=encoder
    )
    assert torch.equal(cache.ids_NL, expected.ids_NL)
    assert cache.label_N is not None
    assert cache.label_N.tolist() == [0, 0, 10, 10, 20, 20]


# --------------------------------------------------------------------- rows


@given(rows=st.lists(st.integers(0, IMAGES - 1), min_size=1, max_size=12))
@settings(max_examples=60)
def test_gathered_rows_are_the_same_from_memory_and_from_shards(
    sharded: tuple[TokenCache, ShardedTokenCache], rows: list[int]
) -> None:
    whole, mapped = sharded
    a, b = whole.rows(torch.tensor(rows)), mapped.rows(torch.tensor(rows))
    assert same(a, b)
    assert (a.ids_NL.dtype, b.last_scale_NmC.dtype) == (torch.int32, torch.float32)
    for place, row in enumerate(rows):
        assert torch.equal(a.ids_NL[place], whole.ids_NL[row])
        own = torch.arange(int(whole.num_captions_N[row]))
        assert a.captions(a.first_caption_N[place] + own) == whole.captions(whole.first_caption_N[row] + own)


def test_all_rows_in_order_are_the_cache(sharded: tuple[TokenCache, ShardedTokenCache]) -> None:
    whole, mapped = sharded
    assert len(whole) == len(mapped) == IMAGES
    assert same(whole, mapped.rows(torch.arange(IMAGES)))
    for rows in ([IMAGES], [-1], []):
        with pytest.raises(IndexError):
            mapped.rows(torch.tensor(rows, dtype=torch.long))


# --------------------------------------------------------------------- refusing


def test_it_is_reused_and_rebuilt_when_anything_changes(tmp_path: Path) -> None:
    tokenizer, encoder = random_tokenizer(), WordEncoder()

    def computed(**options: Any) -> bool:
        text = options.pop("encoder", encoder)
        before = text.calls
        build(tmp_path, encoder=text, **({"tokenizer": tokenizer} | options))
        return text.calls > before

    assert computed()
    assert not computed()
    changed = random_tokenizer()
    changed.decoder.conv_out.bias.add_(1e-3)
    assert computed(tokenizer=changed)
    assert not computed(tokenizer=changed)
    assert computed()
    assert computed(images=image_set(IMAGES, seed=2))
    assert computed(images=image_set(IMAGES, seed=2), encoder=WordEncoder(name="others"))
    assert computed()
    shard = tmp_path / "00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    assert computed()
    assert not computed()
    (tmp_path / "index.json").write_text("{")
    build(tmp_path, tokenizer=tokenizer)
    assert not computed()


@pytest.mark.parametrize(
    ("part", "value", "label"),
    [
        ("tokenizer", "0123", "tokenizer"),
        ("text_encoder", "words-9-9", "text encoder"),
        ("image_size", 64, "image size"),
        ("sides", [[1, 1], [4, 4]], "schedule of scales"),
        ("data", "another", "dataset"),
        ("flip", True, "mirroring"),
    ],
)
def test_the_part_that_differs_is_named(part: str, value: Any, label: str, tmp_path: Path) -> None:
    tokenizer, encoder = random_tokenizer(), WordEncoder()
    build(tmp_path, tokenizer=tokenizer, encoder=encoder)
    parts = cache_parts(tokenizer, encoder, 32)
    open_token_cache(tmp_path, parts)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"made with another {label} .*use the {label} it was made with") as caught:
        open_token_cache(tmp_path, parts | {part: value})
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"another {label}"):
        fill_token_cache(tmp_path, Numbered(image_set(2)), tokenizer, encoder, parts | {part: value})
    assert contents(tmp_path) == before


def test_what_is_no_cache_is_refused_and_left_alone(small_shards: None, tmp_path: Path) -> None:
    tokenizer, encoder = random_tokenizer(), WordEncoder()
    with pytest.raises(UserError, match="is no token cache"):
        open_token_cache(tmp_path / "nowhere")
    (tmp_path / "index.json").write_text('{"key": "of something else"}')
    (tmp_path / "00000.safetensors").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="not of a token cache"):
        open_token_cache(tmp_path)
    with pytest.raises(UserError, match="not of a token cache"):
        fill_token_cache(tmp_path, Numbered(image_set(2)), tokenizer, encoder, {})
    assert contents(tmp_path) == before

    build(tmp_path / "other", tokenizer=tokenizer)
    (tmp_path / "other" / "index.json").unlink()
    with pytest.raises(UserError, match="unfinished token cache; to resume, run the same command again"):
        open_token_cache(tmp_path / "other")
    with pytest.raises(UserError, match="unfinished cache of other settings"):
        fill_token_cache(tmp_path / "other", Numbered(image_set(2)), tokenizer, encoder, {})
    whole = build(tmp_path / "whole", tokenizer=tokenizer)
    (tmp_path / "whole" / "00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"00001\.safetensors is missing or cut off"):
        open_token_cache(tmp_path / "whole")
    assert same(build(tmp_path / "whole", tokenizer=tokenizer), whole)


# --------------------------------------------------------------------- resuming


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_an_interrupted_build_goes_on_after_the_last_whole_shard(small_shards: None, kept: int, tmp_path: Path) -> None:
    images, tokenizer, encoder = image_set(11), random_tokenizer(), WordEncoder()
    build(tmp_path / "whole", images, tokenizer=tokenizer)
    expected = meaning(tmp_path / "whole")
    assert len(expected) == 4  # three shards and the index
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "index.json").unlink()
    for number in range(kept, 3):
        (tmp_path / "cut" / f"{number:05d}.safetensors").unlink()
    (tmp_path / "cut" / ".00002.safetensors.abc.tmp").write_text("torn")
    encoded = encoder.calls
    build(tmp_path / "cut", images, tokenizer=tokenizer, encoder=encoder)
    assert encoder.calls - encoded == 2 * (3 - kept)  # batches
    assert meaning(tmp_path / "cut") == expected


def test_a_build_that_is_killed_can_be_resumed(small_shards: None, tmp_path: Path) -> None:
    images, tokenizer, encoder = image_set(11), random_tokenizer(), WordEncoder()
    parts = cache_parts(tokenizer, encoder, 32) | {"data": images.fingerprint}

    class Killed(Numbered):
        def __iter__(self) -> Iterator[Sample]:
            yield from itertools.islice(super().__iter__(), 9)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill_token_cache(tmp_path, Killed(images), tokenizer, encoder, parts, progress=False)
    assert set(contents(tmp_path)) == {"00000.safetensors", "00001.safetensors"}
    stream = Numbered(images)
    index = fill_token_cache(tmp_path, stream, tokenizer, encoder, parts, progress=False)
    assert (index["images"], index["skipped"]) == (11, 1)
    cache = open_token_cache(tmp_path, parts)
    assert cache.rows(torch.arange(11)).label_N.tolist() == list(range(0, 110, 10))  # type: ignore[union-attr]


# --------------------------------------------------------------------- the command


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """`hartist data cache` over six images, of which one is broken."""
    pytest.importorskip("datasets")
    rng = np.random.default_rng(0)
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    rows = []
    for n in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / f"{n}.png")
        rows.append({"file_name": f"{n}.png", "text": "red apple" if n % 2 else f"cat on table {n}"})
    (folder / "4.png").write_bytes(b"broken")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save_tokenizer(tiny_tokenizer(), tmp_path / "tokenizer")
    bert = write_tiny_bert(tmp_path / "bert")
    options = ["--data", tmp_path / "data", "--tokenizer", tmp_path / "tokenizer", "--text-encoder", bert]
    return ["data", "cache", *map(str, options), "--text-tokens", "12", "--device", "cpu", "-q"]


def test_the_command_makes_a_cache(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cache"
    assert main([*command, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "5 images, 5 captions (3 different), 1 skipped" in printed.out
    assert "4.png (not an image)" in printed.err
    cache = open_token_cache(out)
    assert isinstance(cache, TokenCache)
    assert cache.captions(torch.arange(5)) == [
        "cat on table 0",
        "red apple",
        "cat on table 2",
        "red apple",
        "red apple",
    ]
    assert json.loads((out / "index.json").read_text())["parts"]["image_size"] == SIZE

    assert main([*command, "--out", str(out)]) == 0  # once more: nothing to do
    assert "complete before" in capsys.readouterr().out
    assert main([*command, "--out", str(out), "--flip"]) == 2
    assert "another mirroring" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "limited"), "--flip", "--limit", "2", "--crop", "random"]) == 0
    assert "4 images, 4 captions (2 different), 0 skipped" in capsys.readouterr().out

    monkeypatch.setattr(token_filling, "BATCH", 1)
    monkeypatch.setattr(token_filling, "SHARD_IMAGES", 2)
    assert main([*command, "--out", str(tmp_path / "shards")]) == 0
    expected = meaning(tmp_path / "shards")
    (tmp_path / "shards" / "index.json").unlink()
    (tmp_path / "shards" / "00002.safetensors").unlink()
    assert main([*command, "--out", str(tmp_path / "shards")]) == 0
    assert meaning(tmp_path / "shards") == expected  # with what was skipped before the interruption


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "64"], "64 px are 8 × 8 cells to this tokenizer"),
        (["--sides", "1,2"], None),
        (["--sides", "1,2", "--size", "32"], "the last scale is 2 × 2"),
        (["--limit", "0"], "--limit 0 is out of range"),
        (["--workers", "-1"], "--workers -1 is out of range"),
        (["--split", "validation"], "no split 'validation'"),
        (["--caption-column", "words"], "no column 'words'"),
    ],
)
def test_the_command_checks_its_flags(
    command: list[str], flags: list[str], message: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--out", str(tmp_path / "cache"), *flags]) == (2 if message else 0)
    assert (message or "") in capsys.readouterr().err


def test_the_check_command_reports(tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    check = ["data", "check", "--data", str(tmp_path / "data"), "-q"]
    assert main(check) == 1
    printed = capsys.readouterr().out
    assert "5 images, 5 captions (3 different), in the columns image, text" in printed
    assert "60×40 (5)" in printed
    assert "broken images: 1\n    train/4.png: not an image" in printed
    assert main([*check, "--limit", "4"]) == 0
    with pytest.raises(SystemExit):
        main([*command, "--out", str(tmp_path / "x"), "--sides", "one"])
    assert "not a list of sides like 1,2,3" in capsys.readouterr().err
