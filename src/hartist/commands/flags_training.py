"""The flags of the commands that make and measure models: data, train, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hartist.commands.flags import add_command, add_device, add_threads


def add_data(commands: Any) -> None:
    parser = add_command(
        commands,
        "data",
        "build a dataset",
        "Build a dataset to train on.",
        """\
  hartist data emoji datasets/emoji""",
    )
    kinds = parser.add_subparsers(dest="dataset", metavar="DATASET", required=True)
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
    emoji.add_argument("--size", type=int, default=128, metavar="N", help="side in pixels (default: %(default)s)")
    emoji.add_argument("--source", type=Path, metavar="DIR", help="folder of the npm tarballs (default: ask npm)")
    emoji.add_argument("--skin-tones", action="store_true", help="with every skin tone")
    emoji.add_argument("--flags", action="store_true", help="with flags")
    emoji.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


def add_train(commands: Any) -> None:
    parser = add_command(
        commands,
        "train",
        "train a tokenizer, then a generator",
        "Train in two stages. To resume, run the same command again.",
        """\
  hartist data emoji datasets/emoji
  hartist train tokenizer --data datasets/emoji --out runs/tokenizer
  hartist train generator --data datasets/emoji --tokenizer runs/tokenizer/tokenizer --out runs/generator
  hartist generate "a red apple, 3d" --model runs/generator/model""",
    )
    stages = parser.add_subparsers(dest="stage", metavar="STAGE", required=True)
    tokenizer = add_command(
        stages,
        "tokenizer",
        "pixels to hybrid tokens and back",
        "Train the autoencoder and its quantizer. The result is in RUN/tokenizer.\n"
        "To resume, run the same command again.",
        """\
  hartist train tokenizer --data datasets/emoji --out runs/tokenizer --threads 2""",
    )
    generator = add_command(
        stages,
        "generator",
        "text to hybrid tokens",
        "Train the transformer and its residual diffusion on a tokenizer's tokens.\n"
        "The result is in RUN/model. "
        "To resume, run the same command again.",
        """\
  hartist train generator --data datasets/emoji --tokenizer runs/tokenizer/tokenizer --out runs/generator""",
    )
    generator.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="a trained tokenizer")
    generator.add_argument(
        "--text-encoder",
        type=Path,
        metavar="DIR",
        help="a MiniLM or Qwen2 folder (default: the bundled MiniLM)",
    )
    generator.add_argument(
        "--start-from", metavar="MODEL", help='begin with the weights of this model, "emoji" being the bundled one'
    )
    for stage in (tokenizer, generator):
        stage.add_argument("--data", type=Path, required=True, metavar="DIR", help="a captioned image folder")
        stage.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run's folder")
        stage.add_argument("--recipe", default="emoji", help="a recipe's name (default: %(default)s)")
        stage.add_argument("--steps", type=int, metavar="N", help="optimiser steps (default: the recipe's)")
        stage.add_argument("--batch-size", type=int, metavar="N", help="images a step (default: the recipe's)")
        stage.add_argument("--learning-rate", type=float, metavar="R", help="its peak (default: the recipe's)")
        stage.add_argument("--seed", type=int, help="of batches and all noise (default: the recipe's)")
        stage.add_argument("--no-bf16", action="store_true", help="compute in float32 throughout")
        stage.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
        add_threads(stage)


def add_bench(commands: Any) -> None:
    parser = add_command(
        commands,
        "bench",
        "measure speed and memory",
        "Time generation scale by scale, with the sizes of a preset and random weights.",
        """\
  hartist bench --preset hart-1024 --repeats 3 --json bench.json
  hartist bench --preset hart-512 --device cuda --batch 8 --warmup 1""",
    )
    parser.add_argument("--preset", default="hart-256", metavar="NAME", help="published sizes (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images at once (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="timed runs (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=0, metavar="N", help="runs before them (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=4.5, metavar="G", help="0 is off (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures as JSON")
    add_device(parser, dtype="bfloat16")
    parser.set_defaults(dtype="bfloat16")
