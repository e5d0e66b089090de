"""What the flags of several commands share. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

MODEL = "a model folder, a Hugging Face Hub id, or `emoji`, the bundled model (default: emoji)"


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions and examples keep their lines; the column of flags is wide enough for ours."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)


def add_command(commands: Any, name: str, summary: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A command under `commands`, which is what `add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    return parser


def add_device(parser: argparse.ArgumentParser, dtype: str = "bfloat16 on CUDA, else float32") -> None:
    group = parser.add_argument_group("where it runs")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps, … (default: the best one there is)")
    group.add_argument("--dtype", help=f"float32, bfloat16 or float16 (default: {dtype})")
    add_threads(group)


def add_threads(parser: Any) -> None:
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")


def add_model(parser: Any) -> None:
    parser.add_argument("--model", metavar="MODEL", help=MODEL)


def add_precision(parser: Any) -> None:
    parser.add_argument(
        "--int8", action="store_true", help="matrix products of the transformer in eight bits (CPU): faster, less exact"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the transformer: slow at the first image, faster from then on (on a CPU it needs g++)",
    )
    parser.add_argument("--text-device", metavar="DEVICE", help="where prompts are encoded (default: --device)")


def add_images_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("out"),
        metavar="DIR",
        help="where images go (default: %(default)s)",
    )


def add_foreign_parts(parser: Any) -> None:
    parser.add_argument(
        "--text-model",
        type=Path,
        metavar="DIR",
        help="Qwen2 text model of a released HART model, unless beside it",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="autoencoder .pth of a VAR model (default: vae*.pth beside it), or another decoder of the model's tokens",
    )
    parser.add_argument(
        "--no-ema",
        action="store_true",
        help="take a released model's plain weights instead of the averaged ones",
    )
