"""The flags of the commands that use models: generate, reconstruct, info, convert, check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hartist.commands.flags import (
    MODEL,
    add_command,
    add_device,
    add_foreign_parts,
    add_images_out,
    add_model,
    add_precision,
    add_threads,
)
from hartist.commands.flags_sampling import add_sampling, add_speed


def add_generate(commands: Any) -> None:
    parser = add_command(
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
  hartist generate 207 88 --model var_d16.pth              classes, with vae*.pth beside it
  hartist generate --prompts file.jsonl -o batch/          many; the same command again goes on""",
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw (or a class number)")
    parser.add_argument("--prompts-file", metavar="FILE", help="further prompts, one a line; - reads stdin")
    parser.add_argument(
        "-n",
        "--num-images",
        type=int,
        default=1,
        metavar="N",
        help="images per prompt (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of each prompt's first image (default: %(default)s)")
    add_images_out(parser)
    parser.add_argument("--save-scales", action="store_true", help="also write each image's scales, coarse to fine")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")

    group = parser.add_argument_group(
        "offline batches",
        'FILE holds a JSON object a line: {"prompt": …}, and what differs from the flags among seed, n,\n'
        "negative_prompt and sampling settings (guidance, top_k, …); an id names the files. DIR/manifest.jsonl\n"
        "lists what is made. Run the same command again to make what is missing. Each process computes with one\n"
        "CPU thread, or --threads N: the pictures do not depend on how many processes there are.",
    )
    group.add_argument("--prompts", dest="jobs", type=Path, metavar="FILE", help="a file of prompts, as JSON lines")
    group.add_argument(
        "--processes", type=int, default=1, metavar="N", help="processes with a model (default: 1; more need Ray)"
    )
    group.add_argument("--ray-address", metavar="HOST:PORT", help="a Ray cluster to use (default: start Ray here)")

    group = parser.add_argument_group("model")
    add_model(group)
    add_foreign_parts(group)

    group = add_sampling(parser)
    group.add_argument("--negative-prompt", metavar="PROMPT", help="what to move away from (text models)")
    group.add_argument("--size", metavar="N|HxW", help="pixels of the images; only the model's own size is possible")
    group.add_argument(
        "--batch-size", type=int, default=4, metavar="N", help="images made at once (default: %(default)s)"
    )
    group = add_speed(parser)
    add_precision(group)
    group.add_argument(
        "--unload-text", action="store_true", help="free the text encoder's memory as soon as all prompts are encoded"
    )
    add_device(parser)


def add_reconstruct(commands: Any) -> None:
    parser = add_command(
        commands,
        "reconstruct",
        "see what a tokenizer keeps of a picture",
        "Encode pictures to hybrid tokens and decode them again. Side by side: the original, the discrete\n"
        "tokens alone, discrete and residual tokens. Pictures are cropped to their centre and resized.",
        """\
  hartist reconstruct photo.jpg drawing.png -o out/
  hartist reconstruct photo.jpg --model run/tokenizer        a tokenizer folder will do
  hartist reconstruct photo.jpg --model vae_ch160v4096z32.pth""",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="picture files of any type and size")
    add_model(parser)
    add_images_out(parser)
    add_device(parser)


def add_info(commands: Any) -> None:
    parser = add_command(
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
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"{MODEL}, or a preset's name")
    add_foreign_parts(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_convert(commands: Any) -> None:
    parser = add_command(
        commands,
        "convert",
        "convert between layouts",
        "Convert a model to Hartist's layout, the released HART layout (llm/, tokenizer/, text_model/), or\n"
        "VAR's two .pth files. Foreign pickles are read as plain tensors only.",
        """\
  hartist convert hart-0.7b-1024px model --text-model Qwen2-VL-1.5B-Instruct
  hartist convert var_d16.pth model --tokenizer vae_ch160v4096z32.pth
  hartist convert model released --to release
  hartist convert model smaller --dtype bfloat16
  hartist convert model larger --tokenizer runs/doubled/tokenizer      its tokens, another decoder""",
    )
    parser.add_argument("source", metavar="SOURCE", help="a model folder, a Hub id, or a VAR .pth file")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    parser.add_argument(
        "--to", choices=("hartist", "release", "var"), default="hartist", help="layout (default: %(default)s)"
    )
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored)")
    add_foreign_parts(parser)
    parser.add_argument("--force", action="store_true", help="replace OUT if it holds a model")


def add_check(commands: Any) -> None:
    parser = add_command(
        commands,
        "check",
        "compare with recorded outputs of the authors' code",
        "Compute everything a check set records (weights, inputs, expected outputs) and compare.\n"
        "Exit code 0 if all agree, 1 if something differs, 2 if a folder is no check set.",
        """\
  hartist check tests/parity/hart tests/parity/var""",
    )
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="folders with expected.safetensors")
    add_threads(parser)
