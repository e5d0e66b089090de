"""The flags of `hartist evaluate MODEL --benchmark NAME`. Imports nothing heavy"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hartist.commands.flags import add_command, add_device, add_foreign_parts, add_precision
from hartist.commands.flags_sampling import add_sampling, add_speed

BENCHMARKS = """\
benchmarks, and what --data is:
  emoji      a folder by `hartist data emoji`; prompts by kind: train, unseen_pair, unseen_concept
  mjhq       MJHQ-30K: meta_data.json and a folder of pictures for each category (playgroundai/MJHQ-30K)
  imagenet   50 pictures of each class; a folder of real pictures, or a file of their features
  geneval    evaluation_metadata.jsonl (github.com/djghosh13/geneval); a detector judges
  dpg        prompts/*.txt and dpg_bench.csv (github.com/TencentQQGYLab/ELLA); a VQA model judges
  prompts    PartiPrompts.tsv, HPS v2's .json files, or your own .jsonl and .txt"""

RECIPE = """\
the recipe, which is part of the result:
  Every picture has a seed of its own, from (benchmark, prompt, index); smoothing is off; everything else is
  the model's own setting unless a flag changes it. DIR/result.json names the recipe, versions, the
  fingerprints of model and prompts, and each figure with the rows that it was computed from.
  Interrupted? Run the same command again: what is finished stays, and the figures come out the same.
  Several GPUs or machines: start the command by torchrun. Several processes of one machine: --processes N."""

NETWORKS = """\
networks:
  FID, KID and IS are figures of FID's Inception network, CLIP scores of CLIP, and of nothing else. Where
  Inception is not installed, distances are of EfficientNet-Lite0, named so, and comparable with each other
  only; so is agreement with prompts, by heads that `hartist evaluate align` trains (--align)."""

EXAMPLES = """\
  hartist evaluate emoji --benchmark emoji --data datasets/emoji --out runs/emoji-benchmark
  hartist evaluate runs/generator/model --benchmark emoji --data datasets/emoji --align runs/align --out b
  hartist evaluate hart-0.7b --benchmark mjhq --data MJHQ-30K --out runs/mjhq --batch-size 16
  torchrun --nproc-per-node 8 -m hartist evaluate hart-0.7b --benchmark mjhq --data MJHQ-30K --out runs/m
  hartist evaluate var_d16.pth --benchmark imagenet --data imagenet-val --crop --guidance 1.5 --out runs/in
  hartist evaluate emoji --benchmark prompts --data PartiPrompts.tsv --metrics clip --limit 10 --out runs/p2
  hartist evaluate emoji --benchmark emoji --data datasets/emoji --seeds fixed --out runs/one-seed"""


def add_benchmark(parts: Any) -> None:
    parser = add_command(
        parts,
        "benchmark",
        "a model's pictures by a public benchmark: hartist evaluate MODEL --benchmark NAME",
        "Make the pictures of a benchmark, measure them, and write the figures with all that it takes to get\n"
        f"them again.\n\n{BENCHMARKS}\n\n{RECIPE}\n\n{NETWORKS}",
        EXAMPLES,
    )
    parser.usage = "hartist evaluate MODEL --benchmark NAME --data DIR --out DIR [flags]"
    parser.add_argument("model", metavar="MODEL", help="a model folder, a Hub id, or `emoji`, the bundled model")
    parser.add_argument(
        "--benchmark", required=True, metavar="NAME", help="emoji, mjhq, imagenet, geneval, dpg, prompts"
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the benchmark's data, see above")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="pictures, rows and result.json go there"
    )

    group = parser.add_argument_group("what is made")
    group.add_argument("--limit", type=int, metavar="N", help="prompts of each category at most (emoji: 350; else all)")
    group.add_argument(
        "--per-prompt", type=int, metavar="N", help="pictures a prompt (1; geneval, dpg: 4; imagenet: 50 a class)"
    )
    group.add_argument("--classes", type=int, metavar="N", help="classes of a class-conditional model (default: 1000)")
    group.add_argument(
        "--seeds",
        choices=("per-image", "fixed"),
        default="per-image",
        help="fixed: one seed for every prompt, a flaw of other harnesses, to show what it does",
    )

    group = parser.add_argument_group("what is measured")
    group.add_argument("--metrics", metavar="A,B", help="names of metrics (default: the benchmark's; ? lists them)")
    group.add_argument(
        "--network",
        choices=("auto", "inception", "inception-tensorflow", "lite0", "lite2"),
        default="auto",
        help="whose features sets are compared by (default: Inception where it is installed, else lite0)",
    )
    group.add_argument("--align", type=Path, metavar="DIR", help="heads by `evaluate align`, for alignment")
    group.add_argument(
        "--judge", metavar="NAME", help="judge of geneval or dpg: a folder or a Hub id (default: public ones)"
    )
    group.add_argument("--crop", action="store_true", help="real pictures of mixed sizes: compare with their middles")
    group.add_argument("--cache", type=Path, metavar="DIR", help="features of real pictures (default: cache in --out)")

    add_sampling(parser)
    add_precision(add_speed(parser))
    _add_work(parser)
    add_foreign_parts(parser.add_argument_group("released weights"))
    add_device(parser)


def _add_work(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how it is shared out")
    group.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="pictures made at once (default: %(default)s)"
    )
    group.add_argument(
        "--processes", type=int, metavar="N", help="processes with a model (default: on a CPU, one a core)"
    )
    group.add_argument("--ray-address", metavar="HOST:PORT", help="make the pictures on a Ray cluster instead")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


class PartOrModel(argparse.ArgumentParser):
    """`hartist evaluate X`: an X that names no part is a model, to be measured by a benchmark."""

    parts: Any = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The arguments, with the part's name put in front where it is left out."""
        given = list(args or [])
        if given and given[0] not in self.parts.choices and given[0] not in ("-h", "--help"):
            given = ["benchmark", *given]
        return super().parse_known_args(given, namespace)
