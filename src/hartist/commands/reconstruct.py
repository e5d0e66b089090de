"""`hartist reconstruct`: what the discrete tokens keep of a picture, and what the residual tokens add."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from jaxtyping import UInt8
from torch import Tensor

from hartist.commands.output import require_writable, slug, use_threads
from hartist.data.folder import read_image
from hartist.evaluation.image_metrics import psnr
from hartist.files import write_bytes
from hartist.generation.loading import find_model, load_tokenizer_of
from hartist.generation.pipeline import choose_device, choose_dtype
from hartist.pixels import from_uint8, grid_image, png_bytes, to_uint8
from hartist.tokenizer.hybrid import HybridTokenizer


@dataclass(frozen=True)
class Reconstruction:
    """One picture by both paths; PSNR in dB."""

    original: UInt8[Tensor, "h w 3"]
    discrete: UInt8[Tensor, "h w 3"]
    hybrid: UInt8[Tensor, "h w 3"]
    discrete_psnr: float
    hybrid_psnr: float


def run(args: argparse.Namespace) -> int:
    use_threads(args.threads)
    require_writable(args.out)
    device = choose_device(args.device)
    tokenizer = load_tokenizer_of(find_model(args.model), choose_dtype(args.dtype, device)).to(device)
    pictures = [read_picture(path, tokenizer) for path in args.images]  # all, before anything is written
    results = []
    for i, (path, picture) in enumerate(zip(args.images, pictures, strict=True)):
        results.append(reconstruct(tokenizer, picture.to(device)))
        row = [results[-1].original, results[-1].discrete, results[-1].hybrid]
        target = args.out / f"{i:03d}_{slug(path.stem)}_reconstructed.png"
        write_bytes(target, png_bytes(grid_image([row])))
        print(target)
    print("\n" + format_table([path.name for path in args.images], results))
    return 0


def read_picture(path: Path, tokenizer: HybridTokenizer) -> UInt8[Tensor, "h w 3"]:
    """A picture cropped to its centre and resized to what the tokenizer takes; UserError if it is broken."""
    cells_h, cells_w = tokenizer.schedule.finest
    height, width = cells_h * tokenizer.config.downsampling, cells_w * tokenizer.config.downsampling
    side = max(height, width)
    square = torch.from_numpy(read_image(path, side))
    top, left = (side - height) // 2, (side - width) // 2
    return square[top : top + height, left : left + width].clone()


@torch.inference_mode()
def reconstruct(tokenizer: HybridTokenizer, picture: UInt8[Tensor, "h w 3"]) -> Reconstruction:
    """Encode one picture, decode it by the discrete and by the hybrid path."""
    image = from_uint8(picture)[None]
    tokens = tokenizer.encode(image)
    discrete, hybrid = tokenizer.decode_discrete(tokens.ids), tokenizer.decode(tokens)
    return Reconstruction(
        picture,
        to_uint8(discrete)[0],
        to_uint8(hybrid)[0],
        psnr(discrete, image).item(),
        psnr(hybrid, image).item(),
    )


def format_table(names: Sequence[str], results: Sequence[Reconstruction]) -> str:
    """PSNR of every picture and their mean."""
    discrete = [result.discrete_psnr for result in results]
    hybrid = [result.hybrid_psnr for result in results]
    shown = [name if len(name) <= 40 else f"{name[:36]} …" for name in names] + ["mean"]
    width = max(len(name) for name in (*shown, "PSNR (dB)"))
    lines = [f"{'PSNR (dB)':<{width}}  discrete  hybrid"]
    for name, d, h in zip(shown, [*discrete, fmean(discrete)], [*hybrid, fmean(hybrid)], strict=True):
        lines.append(f"{name:<{width}}  {d:8.2f}  {h:6.2f}")
    return "\n".join(lines)
