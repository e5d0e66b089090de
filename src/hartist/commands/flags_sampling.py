"""The flags of sampling and of its shortcuts, for every command that makes pictures. Imports nothing heavy"""

from __future__ import annotations

import argparse


def add_sampling(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """One flag for each field of SamplingSettings that decides how a picture looks."""
    group = parser.add_argument_group("sampling", "Without a flag, the model's own setting: see `hartist info MODEL`.")
    group.add_argument("--guidance", type=float, metavar="G", help="how closely to follow the prompt; 0 is off")
    group.add_argument(
        "--guidance-by-scale",
        type=_numbers,
        metavar="X,X,…",
        help="shares of --guidance, one a scale, coarse to fine (default: growing linearly from 0 to 1)",
    )
    group.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest codes; 0 keeps all")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="draw among the likeliest codes of share P; 0 keeps all"
    )
    group.add_argument("--temperature", type=float, metavar="T", help="below 1 safer, above 1 wilder; 0 is greedy")
    group.add_argument(
        "--smoothing",
        action=argparse.BooleanOptionalAction,
        help="mix code vectors softly instead of choosing one, as the authors' demo does",
    )
    group.add_argument("--no-residual", dest="residual", action="store_const", const=False, help="discrete tokens only")
    group.add_argument("--diffusion-steps", type=int, metavar="N", help="denoising steps of the residual tokens")
    group.add_argument(
        "--residual-guidance", type=float, metavar="X", help="guidance of the residual tokens alone, 0 for none"
    )
    group.add_argument(
        "--residual-temperature",
        type=float,
        metavar="X",
        help="noise between denoising steps, 1 as trained, 0 for none",
    )
    return group


def add_speed(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The shortcuts."""
    group = parser.add_argument_group(
        "speed",
        "`--preset fast` takes all shortcuts below in a recommended blend; single ones can be set beside it.\n"
        "docs/benchmarks.md tells what each saves and costs.",
    )
    group.add_argument("--preset", choices=("exact", "fast"), default="exact", help="(default: %(default)s)")
    group.add_argument("--unguided-scales", type=int, metavar="N", help="no guidance on the last N scales")
    group.add_argument(
        "--attended-scales", type=int, metavar="N", help="attend to context, coarse scales and the N scales before"
    )
    group.add_argument(
        "--last-scale-share", type=float, metavar="P", help="compute this share of the last scale's cells"
    )
    return group


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0,0.5,1") from None
