"""The flags of the commands that train and time models: train, bench"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hartist.commands.flags import MODEL, add_command, add_device, add_precision, add_threads

MANY = """
On several GPUs or machines, start it with torchrun:
  torchrun --nproc-per-node 8 -m hartist train ..."""
RESUME = "To resume, run the same command again."


def add_train(commands: Any) -> None:
    parser = add_command(
        commands,
        "train",
        "train a tokenizer, a generator, or a model on your own pictures",
        f"Train in two stages, or go on from a finished model. {RESUME}{MANY}",
        """\
  hartist train finetune --data my-pictures --out runs/mine
  hartist data emoji datasets/emoji
  hartist train tokenizer --data datasets/emoji --out runs/tokenizer
  hartist train generator --data datasets/emoji --tokenizer runs/tokenizer/tokenizer --out runs/generator
  hartist generate "a red apple, 3d" --model runs/generator/model""",
    )
    stages = parser.add_subparsers(dest="stage", metavar="STAGE", required=True)
    _add_tokenizer(stages)
    _add_generator(stages)
    _add_finetune(stages)


def _add_tokenizer(stages: Any) -> None:
    parser = add_command(
        stages,
        "tokenizer",
        "pixels to hybrid tokens and back",
        f"Train the autoencoder and its quantizer. The result is in RUN/tokenizer.\n{RESUME}{MANY}",
        """\
  hartist train tokenizer --data datasets/emoji --out runs/tokenizer --threads 2
  hartist train tokenizer --data datasets/photos --out runs/photos --recipe published \\
      --start-from vae_ch160v4096z32.pth      the paper's way: only the decoder learns
  hartist train tokenizer --data datasets/emoji --out runs/gan --set losses.adversarial=0.5""",
    )
    parser.add_argument(
        "--start-from",
        metavar="TOKENIZER",
        help="begin with these weights (ours, HART's, VAR's .pth, or emoji)",
    )
    parser.add_argument(
        "--double-stem",
        action="store_true",
        help="--start-from's tokens for pictures of twice its size: 2×2 pixels where there was one",
    )
    parser.add_argument(
        "--scales",
        type=integers,
        default=(),
        metavar="A,B,…",
        help="other sides of --start-from's token grids, coarse to fine (default: its own)",
    )
    images = parser.add_argument_group("images")
    images.add_argument("--flip", action="store_true", help="mirror every other image")
    images.add_argument(
        "--stream", action="store_true", help="read images as they are needed: for more than memory holds"
    )
    images.add_argument(
        "--crop", choices=("centre", "random"), default="centre", help="of a stream (default: %(default)s)"
    )
    images.add_argument("--workers", type=int, default=0, metavar="N", help="processes that decode a stream")
    parser.add_argument(
        "--perceptual-weights",
        type=Path,
        metavar="FILE",
        help="VGG-16 weights of the perceptual network (for recipes with LPIPS)",
    )
    parser.add_argument(
        "--discriminator",
        type=Path,
        metavar="TOKENIZER",
        help="begin with the PatchGAN in a released tokenizer's folder or file (losses.adversary.kind=patchgan)",
    )
    _add_common(parser, recipe="emoji")


def _add_generator(stages: Any) -> None:
    parser = add_command(
        stages,
        "generator",
        "text or classes to hybrid tokens",
        "Train the transformer and its residual diffusion on a tokenizer's tokens, which are computed once.\n"
        f"The result is in RUN/model. {RESUME}{MANY}",
        """\
  hartist train generator --data datasets/emoji --tokenizer runs/tokenizer/tokenizer --out runs/generator
  hartist train generator --data datasets/emoji --start-from emoji --out runs/longer --steps 2000
  torchrun --nproc-per-node 8 -m hartist train generator --recipe imagenet-d16 \\
      --tokenizer runs/published/tokenizer --cache caches/imagenet --out runs/d16""",
    )
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="a trained tokenizer (default: --start-from's)")
    parser.add_argument(
        "--text-encoder",
        type=Path,
        metavar="DIR",
        help="a MiniLM or Qwen2 folder (default: --start-from's, else the bundled MiniLM)",
    )
    parser.add_argument(
        "--start-from", metavar="MODEL", help='begin with the weights of this model, "emoji" being the bundled one'
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="where the tokens are kept, in train-SIZE and validation-SIZE (default: RUN/cache); without --data they "
        "are only read from there",
    )
    _add_strategy(parser)
    _add_common(parser, recipe="emoji", data_needed=False)


def _add_finetune(stages: Any) -> None:
    parser = add_command(
        stages,
        "finetune",
        "teach a finished model your own pictures",
        "Go on training a finished model on a folder of captioned pictures: images beside a metadata.jsonl with\n"
        'lines like {"file_name": "cat.jpg", "text": "my cat Miso"}, or any dataset that `hartist data check` reads.\n'
        f"The result is in RUN/model. {RESUME}",
        """\
  hartist train finetune --data my-pictures --out runs/mine
  hartist generate "my cat Miso, 3d" --model runs/mine/model
  hartist train finetune --data my-pictures --out runs/small --lora 8      adapters, not all weights""",
    )
    parser.add_argument(
        "--start-from", default="emoji", metavar="MODEL", help="the model to go on from (default: the bundled one)"
    )
    parser.add_argument(
        "--lora", type=int, default=0, metavar="RANK", help="train low-rank adapters of this rank (needs peft)"
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where the tokens are kept (default: RUN/cache)")
    _add_strategy(parser)
    _add_common(parser, recipe=None)


def _add_strategy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--strategy",
        choices=("ddp", "fsdp"),
        default="ddp",
        help="under torchrun: whole weights on every rank, or sharded ones (default: %(default)s)",
    )


def _add_common(parser: argparse.ArgumentParser, recipe: str | None, data_needed: bool = True) -> None:
    parser.add_argument(
        "--data",
        required=data_needed,
        metavar="DATA",
        help="a captioned image folder, tar or parquet files, or a Hub id",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run's folder")
    settings = parser.add_argument_group("settings")
    if recipe is not None:
        settings.add_argument("--recipe", default=recipe, help="a recipe's name (default: %(default)s)")
    settings.add_argument("--steps", type=int, metavar="N", help="optimiser steps (default: the recipe's)")
    settings.add_argument("--batch-size", type=int, metavar="N", help="images a step (default: the recipe's)")
    settings.add_argument(
        "--micro-batch", type=int, metavar="N", help="images a process takes at once (default: the recipe's)"
    )
    settings.add_argument("--learning-rate", type=float, metavar="R", help="its peak (default: the recipe's)")
    settings.add_argument("--seed", type=int, help="of batches and all noise (default: the recipe's)")
    settings.add_argument("--no-bf16", action="store_true", help="compute in float32 throughout")
    settings.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change any setting of the recipe, as losses.perceptual=0.2; may be given several times",
    )
    settings.add_argument(
        "--dry-run", action="store_true", help="print sizes, memory and time per step, and train nothing"
    )
    place = parser.add_argument_group("where it runs")
    place.add_argument("--device", help="cpu, cuda or mps (default: the best one there is)")
    add_threads(place)
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


def add_bench(commands: Any) -> None:
    parser = add_command(
        commands,
        "bench",
        "measure speed and memory",
        "Time generation part by part, count its operations, and compare it with the fastest matrix products of this\n"
        "machine: with random weights of a preset's sizes (speed does not depend on them), or with a model.",
        """\
  hartist bench --preset hart-1024 --json bench.json --plot bench.png
  hartist bench --preset hart-512 --device cuda --batch 8
  hartist bench --model emoji --operators
  hartist bench --preset hart-256 --sizes 256,512,1024 --batches 1,2,4 --plot growth.svg""",
    )
    parser.add_argument("--preset", default="hart-256", metavar="NAME", help="published sizes (default: %(default)s)")
    parser.add_argument("--model", metavar="MODEL", help=f"instead of random weights: {MODEL.split(' (')[0]}")
    parser.add_argument("--text-model", type=Path, metavar="DIR", help="Qwen2 text model of a released HART model")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="autoencoder .pth of a VAR model")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="along a side (default: the model's own)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images at once (default: %(default)s)")
    parser.add_argument("--sizes", type=integers, default=(), metavar="A,B,…", help="how cost grows with the size")
    parser.add_argument("--batches", type=integers, default=(), metavar="A,B,…", help="how cost grows with the batch")
    how = parser.add_argument_group("how")
    how.add_argument("--repeats", type=int, default=3, metavar="N", help="timed runs (default: %(default)s)")
    how.add_argument("--warmup", type=int, default=1, metavar="N", help="runs before them (default: %(default)s)")
    how.add_argument("--guidance", type=float, metavar="G", help="0 is off (default: the model's, 4.5)")
    how.add_argument("--fast", action="store_true", help="with the shortcuts of fast mode")
    add_precision(how)
    how.add_argument("--text", action="store_true", help="time the released text encoder too (1.5 B, random weights)")
    how.add_argument("--operators", action="store_true", help="one more run, profiled: seconds by kind of operator")
    how.add_argument("--no-roofline", action="store_true", help="don't measure the machine's matrix products")
    out = parser.add_argument_group("what it writes, beside the tables")
    out.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    out.add_argument("--plot", type=Path, metavar="FILE", help="a figure: .png, .svg or .pdf (needs matplotlib)")
    add_device(parser, dtype="bfloat16 where the machine has it, else float32; a model's own as in generate")


def integers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 1,2,4") from None
