"""`hartist reconstruct`: what the discrete tokens keep of a picture, and what the residual tokens add."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import fmean

from hartist.commands.output import require_writable, slug, use_threads
from hartist.data.folder import read_image
from hartist.evaluation.side_by_side import Reconstruction, middle, picture_size, reconstruct
from hartist.files import write_bytes
from hartist.generation.devices import choose_device, choose_dtype
from hartist.generation.loading import find_model, load_tokenizer_of
from hartist.pixels import grid_image, png_bytes


def run(args: argparse.Namespace) -> int:
    use_threads(args.threads)
    require_writable(args.out)
    device = choose_device(args.device)
    tokenizer = load_tokenizer_of(find_model(args.model), choose_dtype(args.dtype, device)).to(device)
    height, width = picture_size(tokenizer)
    # All, before anything is written
    pictures = [middle(read_image(path, max(height, width)), height, width) for path in args.images]
    results = []
    for i, (path, picture) in enumerate(zip(args.images, pictures, strict=True)):
        results.append(reconstruct(tokenizer, picture.to(device)))
        row = [results[-1].original, results[-1].discrete, results[-1].hybrid]
        target = args.out / f"{i:03d}_{slug(path.stem)}_reconstructed.png"
        write_bytes(target, png_bytes(grid_image([row])))
        print(target)
    print("\n" + format_table([path.name for path in args.images], results))
    return 0


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
