"""The flags of `hartist data`: building, checking and caching datasets"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hartist.commands.flags import add_command, add_threads

SOURCE = "a folder with metadata.jsonl, .tar or .parquet files (a folder or glob), or the id of a dataset on the Hub"


def add_data(commands: Any) -> None:
    parser = add_command(
        commands,
        "data",
        "build, check and cache datasets",
        "Build a dataset to train on, look through one, or turn one into tokens.",
        """\
  hartist data emoji datasets/emoji
  hartist data check --data datasets/emoji
  hartist data cache --data datasets/emoji --tokenizer runs/tokenizer/tokenizer --out caches/emoji""",
    )
    kinds = parser.add_subparsers(dest="dataset", metavar="ACTION", required=True)
    _add_emoji(kinds)
    _add_check(kinds)
    _add_cache(kinds)


def _add_emoji(kinds: Any) -> None:
    emoji = add_command(
        kinds,
        "emoji",
        "captioned emoji in three styles",
        "Emoji in three styles of drawing with captions, as a folder of images with metadata.jsonl.\n"
        "The art comes as four npm packages of fixed versions, verified by their hashes.",
        """\
  hartist data emoji datasets/emoji
  hartist data emoji datasets/emoji-64 --size 64 --source tarballs/    without network""",
    )
    emoji.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    emoji.add_argument("--size", type=int, default=256, metavar="N", help="side in pixels (default: %(default)s)")
    emoji.add_argument("--source", type=Path, metavar="DIR", help="folder of the npm tarballs (default: ask npm)")
    emoji.add_argument(
        "--skin-tones",
        choices=("none", "one", "all"),
        default="one",
        help="how many skin tones of a concept and style to draw beside the plain one (default: %(default)s)",
    )
    emoji.add_argument(
        "--backgrounds",
        type=int,
        default=1,
        metavar="N",
        help="draw each image N times more, on other colours than white (default: %(default)s)",
    )
    emoji.add_argument("--flags", action="store_true", help="with flags")
    emoji.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


def _add_check(kinds: Any) -> None:
    check = add_command(
        kinds,
        "check",
        "look for broken images and missing captions",
        "Read through a dataset as training would: how many images and captions it has and of what sizes,\n"
        "and what training would skip. The exit code is 1 if there is anything to skip.",
        """\
  hartist data check --data datasets/emoji --split validation
  hartist data check --data "shards/*.tar" --caption-column json.caption""",
    )
    _add_source(check)
    check.add_argument("--limit", type=int, metavar="N", help="stop after N images")
    check.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


def _add_cache(kinds: Any) -> None:
    cache = add_command(
        kinds,
        "cache",
        "compute tokens and text states once",
        "Compute the tokens, residual tokens and text states of a dataset and store them, so that training a\n"
        "generator touches no pixels. Broken images are skipped and counted.\n"
        "To resume, run the same command again.",
        """\
  hartist data cache --data datasets/emoji --tokenizer runs/tokenizer/tokenizer --out caches/emoji
  hartist data cache --data "shards/*.tar" --tokenizer tok --out cache --size 64 --sides 1,2,3,4 --workers 8""",
    )
    _add_source(cache)
    cache.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="a trained tokenizer")
    cache.add_argument("--out", type=Path, required=True, metavar="DIR", help="the cache's folder")
    cache.add_argument(
        "--text-encoder", type=Path, metavar="DIR", help="a MiniLM or Qwen2 folder (default: the bundled MiniLM)"
    )
    cache.add_argument("--text-tokens", type=int, metavar="N", help="tokens of a caption (default: the encoder's)")
    cache.add_argument("--size", type=int, metavar="N", help="side in pixels (default: the tokenizer's)")
    cache.add_argument(
        "--sides",
        type=parse_sides,
        metavar="1,2,…",
        help="sides of the scales, coarse to fine (default: the tokenizer's)",
    )
    cache.add_argument(
        "--crop", choices=("centre", "random"), default="centre", help="which square to take (default: %(default)s)"
    )
    cache.add_argument("--flip", action="store_true", help="store every image mirrored too")
    cache.add_argument("--limit", type=int, metavar="N", help="stop after N images")
    cache.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that decode images (default: this one)"
    )
    cache.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    cache.add_argument("--device", help="cpu, cuda, cuda:1, mps, … (default: the best one there is)")
    add_threads(cache)


def _add_source(parser: Any) -> None:
    parser.add_argument("--data", required=True, metavar="SOURCE", help=SOURCE)
    parser.add_argument("--split", default="train", metavar="NAME", help="which part (default: %(default)s)")
    parser.add_argument("--image-column", metavar="NAME", help="the column of images (default: by its name or type)")
    parser.add_argument(
        "--caption-column",
        action="append",
        metavar="NAME",
        help="a column of captions, or several by repeating it (default: by its name)",
    )
    parser.add_argument("--label-column", metavar="NAME", help="a column of class numbers; captions may be missing")


def parse_sides(text: str) -> tuple[int, ...]:
    """`1,2,3` as numbers."""
    try:
        return tuple(int(side) for side in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sides like 1,2,3") from error
