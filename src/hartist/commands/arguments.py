"""The parser: every command with its flags, their defaults and examples. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hartist import __version__

DESCRIPTION = """\
Text-to-image with hybrid autoregressive transformers (HART): a picture grows over a handful of scales,
from one token to a full grid, and a small diffusion network adds what no token can say."""

EXAMPLES = """\
examples:
  hartist generate "a red apple, 3d"                    one image with the bundled model, in out/
  hartist generate "a sleeping cat, flat" -n 4 --seed 7 four images with the seeds 7 to 10
  hartist info                                          what the bundled model consists of
  hartist reconstruct photo.jpg -o out/                 what the tokenizer keeps of a picture
  hartist COMMAND --help                                flags and examples of one command"""

MODEL = "a model folder, a Hugging Face Hub id, or `emoji`, the bundled model (default: emoji)"


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; `command` in the result names the module that runs it."""
    parser = argparse.ArgumentParser(
        "hartist",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hartist {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (_generate, _reconstruct, _info, _convert, _check, _data, _train, _bench):
        add(commands)
    return parser


def _command(commands: Any, name: str, summary: str, description: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


def _where_it_runs(parser: argparse.ArgumentParser, dtype: str = "bfloat16 on CUDA, else float32") -> None:
    group = parser.add_argument_group("where it runs")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps, … (default: the best one there is)")
    group.add_argument("--dtype", help=f"float32, bfloat16 or float16 (default: {dtype})")
    _threads(group)


def _threads(parser: Any) -> None:
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="MODEL", help=MODEL)


def _out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("out"), metavar="DIR", help="where images go (default: %(default)s)"
    )


def _foreign_parts(parser: Any) -> None:
    parser.add_argument(
        "--text-model", type=Path, metavar="DIR", help="Qwen2 text model of a released HART model, unless beside it"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="autoencoder .pth of a VAR model (default: vae*.pth beside it)"
    )
    parser.add_argument(
        "--no-ema", action="store_true", help="take a released model's plain weights instead of the averaged ones"
    )


def _generate(commands: Any) -> None:
    parser = _command(
        commands,
        "generate",
        "make images from prompts",
        "Make images from prompts, or from class numbers with a class-conditional model.\n"
        "Image i of every prompt has the seed SEED + i and does not depend on what is made beside it;\n"
        "each PNG holds the settings it was made with.",
        """\
  hartist generate "a red apple, 3d" "a sleeping cat, flat" -n 4 --seed 7 -o out/
  hartist generate "a red apple, 3d" --negative-prompt "a green apple" --guidance 6
  hartist generate "a house, noto" --save-scales           every scale on the way, as a strip
  hartist generate --prompts-file prompts.txt --quiet      one prompt a line
  hartist generate 207 88 --model var_d16.pth              classes, with vae*.pth beside it""",
    )
    parser.set_defaults(command="generate")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw (or a class number)")
    parser.add_argument("--prompts-file", metavar="FILE", help="further prompts, one a line; - reads stdin")
    parser.add_argument(
        "-n", "--num-images", type=int, default=1, metavar="N", help="images per prompt (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of each prompt's first image (default: %(default)s)")
    _out(parser)
    parser.add_argument("--save-scales", action="store_true", help="also write each image's scales, coarse to fine")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")

    group = parser.add_argument_group("model")
    _model(group)  # type: ignore[arg-type]
    _foreign_parts(group)

    group = parser.add_argument_group("sampling", "Without a flag, the model's own setting: see `hartist info MODEL`.")
    group.add_argument("--negative-prompt", metavar="PROMPT", help="what to move away from (text models)")
    group.add_argument("--guidance", type=float, metavar="G", help="how closely to follow the prompt; 0 is off")
    group.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest codes; 0 keeps all")
    group.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest codes of share P; 0 keeps all")
    group.add_argument("--temperature", type=float, metavar="T", help="below 1 safer, above 1 wilder; 0 is greedy")
    group.add_argument(
        "--smoothing", action=argparse.BooleanOptionalAction, help="mix code vectors softly instead of choosing one"
    )
    group.add_argument(
        "--no-residual", dest="residual", action="store_const", const=False, help="discrete tokens only"
    )
    group.add_argument("--diffusion-steps", type=int, metavar="N", help="denoising steps of the residual tokens")
    group.add_argument("--size", metavar="N|HxW", help="image size in pixels, if it should be checked")
    group.add_argument(
        "--batch-size", type=int, default=4, metavar="N", help="images made at once (default: %(default)s)"
    )
    _where_it_runs(parser)


def _reconstruct(commands: Any) -> None:
    parser = _command(
        commands,
        "reconstruct",
        "see what a tokenizer keeps of a picture",
        "Encode pictures to hybrid tokens and decode them again: original, discrete tokens alone, and discrete\n"
        "with residual tokens, side by side. Pictures are cropped to their centre and resized.",
        """\
  hartist reconstruct photo.jpg drawing.png -o out/
  hartist reconstruct photo.jpg --model run/tokenizer        a tokenizer folder will do
  hartist reconstruct photo.jpg --model vae_ch160v4096z32.pth""",
    )
    parser.set_defaults(command="reconstruct")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="picture files of any type and size")
    _model(parser)
    _out(parser)
    _where_it_runs(parser)


def _info(commands: Any) -> None:
    parser = _command(
        commands,
        "info",
        "describe a model",
        "Parameters, sizes, scale schedule and sampling defaults of a model, a tokenizer or a preset.",
        """\
  hartist info                       the bundled model
  hartist info run/tokenizer
  hartist info hart-1024             a preset: the published sizes, without weights
  hartist info MODEL --json""",
    )
    parser.set_defaults(command="info")
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"{MODEL}, or a preset's name")
    _foreign_parts(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _convert(commands: Any) -> None:
    parser = _command(
        commands,
        "convert",
        "convert between layouts",
        "Convert a model to Hartist's layout, the released HART layout (llm/, tokenizer/, text_model/), or\n"
        "VAR's two .pth files. Foreign pickles are read as plain tensors only.",
        """\
  hartist convert hart-0.7b-1024px model --text-model Qwen2-VL-1.5B-Instruct
  hartist convert var_d16.pth model --tokenizer vae_ch160v4096z32.pth
  hartist convert model released --to release
  hartist convert model smaller --dtype bfloat16""",
    )
    parser.set_defaults(command="convert")
    parser.add_argument("source", metavar="SOURCE", help="a model folder, a Hub id, or a VAR .pth file")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    parser.add_argument(
        "--to", choices=("hartist", "release", "var"), default="hartist", help="layout (default: %(default)s)"
    )
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored)")
    _foreign_parts(parser)
    parser.add_argument("--force", action="store_true", help="replace OUT if it holds a model")


def _check(commands: Any) -> None:
    parser = _command(
        commands,
        "check",
        "compare with recorded outputs of the authors' code",
        "Compute everything a check set records (weights, inputs, expected outputs) and compare.\n"
        "Exit code 0 if all agree, 1 if something differs, 2 if a folder is no check set.",
        """\
  hartist check tests/parity/hart tests/parity/var""",
    )
    parser.set_defaults(command="check")
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="folders with expected.safetensors")
    _threads(parser)


def _data(commands: Any) -> None:
    parser = _command(
        commands,
        "data",
        "build a dataset",
        "Build a dataset to train on.",
        """\
  hartist data emoji datasets/emoji""",
    )
    kinds = parser.add_subparsers(dest="dataset", metavar="DATASET", required=True)
    emoji = _command(
        kinds,
        "emoji",
        "captioned emoji in three styles",
        "Emoji in three styles of drawing with captions, as a folder of images with metadata.jsonl.\n"
        "The art comes as four npm packages of fixed versions, verified by their hashes.",
        """\
  hartist data emoji datasets/emoji
  hartist data emoji datasets/emoji-64 --size 64 --source tarballs/    without network""",
    )
    emoji.set_defaults(command="data")
    emoji.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    emoji.add_argument("--size", type=int, default=128, metavar="N", help="side in pixels (default: %(default)s)")
    emoji.add_argument("--source", type=Path, metavar="DIR", help="folder of the npm tarballs (default: ask npm)")
    emoji.add_argument("--skin-tones", action="store_true", help="with every skin tone")
    emoji.add_argument("--flags", action="store_true", help="with flags")
    emoji.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


def _train(commands: Any) -> None:
    parser = _command(
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
    tokenizer = _command(
        stages,
        "tokenizer",
        "pixels to hybrid tokens and back",
        "Train the autoencoder and its quantizer; the result is in OUT/tokenizer.\n"
        "To resume, run the same command again.",
        """\
  hartist train tokenizer --data datasets/emoji --out runs/tokenizer --threads 2""",
    )
    generator = _command(
        stages,
        "generator",
        "text to hybrid tokens",
        "Train the transformer and its residual diffusion on a tokenizer's tokens; the result is in OUT/model.\n"
        "To resume, run the same command again.",
        """\
  hartist train generator --data datasets/emoji --tokenizer runs/tokenizer/tokenizer --out runs/generator""",
    )
    generator.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="a trained tokenizer")
    generator.add_argument(
        "--text-encoder", type=Path, metavar="DIR", help="a MiniLM or Qwen2 folder (default: the installed MiniLM)"
    )
    for stage in (tokenizer, generator):
        stage.set_defaults(command="train")
        stage.add_argument("--data", type=Path, required=True, metavar="DIR", help="a captioned image folder")
        stage.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run's folder")
        stage.add_argument("--recipe", default="emoji", help="a recipe's name (default: %(default)s)")
        stage.add_argument("--steps", type=int, metavar="N", help="optimiser steps (default: the recipe's)")
        stage.add_argument("--batch-size", type=int, metavar="N", help="images a step (default: the recipe's)")
        stage.add_argument("--learning-rate", type=float, metavar="R", help="its peak (default: the recipe's)")
        stage.add_argument("--seed", type=int, help="of batches and all noise (default: the recipe's)")
        stage.add_argument("--no-bf16", action="store_true", help="compute in float32 throughout")
        stage.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
        _threads(stage)


def _bench(commands: Any) -> None:
    parser = _command(
        commands,
        "bench",
        "measure speed and memory",
        "Time generation scale by scale, with a preset's sizes and random weights or with a model.",
        """\
  hartist bench --preset hart-1024 --device cuda --batch 8
  hartist bench --model emoji --device cpu --dtype float32 --json bench.json""",
    )
    parser.set_defaults(command="bench")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--preset", metavar="NAME", help="published sizes with random weights, such as hart-1024")
    source.add_argument("--model", metavar="MODEL", help=MODEL)
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images at once (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed runs (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="runs before them (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=4.5, metavar="G", help="0 is off (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures as JSON")
    _where_it_runs(parser, dtype="bfloat16")
    parser.set_defaults(dtype="bfloat16")


