"""The flags of `hartist compare` and `hartist report`: what runs of `hartist evaluate` found."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hartist.commands.flags import add_command, add_threads

MOST = 1_000_000
LARGEST_SEED = 2**32


def add_compare(commands: Any) -> None:
    parser = add_command(
        commands,
        "compare",
        "two results side by side, with intervals",
        "Compare two results of one benchmark, figure by figure: the difference, its 95 % interval, and whether it\n"
        "is clear, that is, more than other pictures of the same two models would show. Both runs made pictures of\n"
        "the same items, so they are resampled in pairs. No picture is needed, only result.json and rows/ beside it.",
        """\
  hartist compare runs/a/result.json runs/b/result.json
  hartist compare runs/a runs/b --json comparison.json --resamples 10000""",
    )
    parser.add_argument("a", type=Path, metavar="A.json", help="a result of `hartist evaluate`, or its folder")
    parser.add_argument("b", type=Path, metavar="B.json", help="another of the same benchmark")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the comparison as JSON")
    _add_resampling(parser)


def add_report(commands: Any) -> None:
    parser = add_command(
        commands,
        "report",
        "a page about one run or several",
        "Write report.html, one file that works offline, and report.md with its pictures beside it: figures with\n"
        "intervals, by category, against whatever setting differs between several runs; pictures at random, the\n"
        "best and the worst; settings, versions and hashes. With --training, the training pictures nearest to the\n"
        "generated ones, beside how near held-out real pictures come to them. The plots need matplotlib:\n"
        'pip install "hartist[report]".',
        """\
  hartist report runs/emoji --out reports/emoji
  hartist report runs/emoji --out reports/emoji --training datasets/emoji/train
  hartist report runs/guidance-* --out reports/guidance          several runs: figures against guidance""",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run, or several")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write into")
    parser.add_argument("--title", help="of the page (default: the benchmark and the model)")
    parser.add_argument(
        "--samples", type=_samples, default=24, metavar="N", help="pictures at random (default: %(default)s)"
    )
    parser.add_argument("--training", type=Path, metavar="DIR", help="pictures the model was trained on")
    parser.add_argument(
        "--network", help="whose features tell near pictures (default: the first that the run has features of)"
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep features of the training pictures")
    _add_resampling(parser)


def _add_resampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resamples", type=_resamples, metavar="N", help="resamples of each figure (default: 2000, distances 200)"
    )
    parser.add_argument(
        "--resample-reference",
        action="store_true",
        help="resample the real pictures of distances too: what others of the kind would give (slow)",
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of everything drawn (default: %(default)s)")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    add_threads(parser)


def _resamples(text: str) -> int:
    return _between(text, 20, MOST)


def _seed(text: str) -> int:
    return _between(text, 0, LARGEST_SEED)


def _samples(text: str) -> int:
    return _between(text, 1, 1000)


def _between(text: str, low: int, high: int) -> int:
    value = int(text) if text.isdecimal() else -1
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from {low} to {high}")
    return value
