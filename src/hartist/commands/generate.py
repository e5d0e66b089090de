"""`hartist generate`: prompts → PNG files that say how they were made."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hartist.commands import offline
from hartist.commands.output import ContactSheet, require_writable, slug, use_threads
from hartist.commands.sampling import chosen_settings
from hartist.errors import UserError, quoted
from hartist.files import write_bytes
from hartist.generation.loop import ScaleResult
from hartist.generation.pipeline import Generated, Pipeline, Request, make_requests, override
from hartist.generation.png import encode_png, metadata
from hartist.pixels import grid_image

MAX_IMAGES = 10_000


def run(args: argparse.Namespace) -> int:
    use_threads(args.threads)
    changes = chosen_settings(args)
    if args.jobs is not None:
        return offline.run(args, changes)
    if args.processes != 1 or args.ray_address is not None:
        raise UserError("--processes and --ray-address are for offline batches; name a file of prompts with --prompts")
    prompts = list(args.prompts) + (read_prompts(args.prompts_file) if args.prompts_file is not None else [])
    requests = requests_for(prompts, args.num_images, args.seed)
    require_writable(args.out)
    pipe = Pipeline.from_pretrained(
        args.model,
        device=args.device,
        dtype=args.dtype,
        text_model=args.text_model,
        tokenizer=args.tokenizer,
        use_ema=not args.no_ema,
        int8=args.int8,
        compile=args.compile,
        text_device=args.text_device,
    )
    check_size(args.size, pipe)
    pipe.check(requests, args.negative_prompt, args.batch_size)
    warn_of_truncation(pipe, prompts, args.negative_prompt)
    if args.unload_text:
        pipe.unload_text_encoder([*prompts, *filter(None, [args.negative_prompt])])
    paths = write_images(
        pipe,
        requests,
        args.out,
        per_prompt=args.num_images,
        quiet=args.quiet,
        settings=override(pipe.model.settings, **changes),
        negative_prompt=args.negative_prompt,
        batch_size=args.batch_size,
        save_scales=args.save_scales,
    )
    print("\n".join(map(str, paths)))
    return 0


def write_images(
    pipe: Pipeline, requests: Sequence[Request], out: Path, *, per_prompt: int, quiet: bool, **options: Any
) -> list[Path]:
    """Generate and write image after image, then a contact sheet of several; returns all paths.

    `options` are those of `Pipeline.generate`. A progress bar counts the scales of all images, on a
    terminal and unless `quiet`.
    """
    height, width = pipe.image_size
    sheet = ContactSheet(len(requests) // per_prompt, per_prompt, (width, height))
    paths: list[Path] = []
    num_scales = len(pipe.transformer.schedule)
    with tqdm(total=len(requests) * num_scales, unit="scale", disable=True if quiet else None) as bar:

        def show(result: ScaleResult) -> None:
            grid = f"{result.grid[0]}×{result.grid[1]}"
            bar.set_description(f"scale {result.k + 1} of {num_scales}, {grid}", refresh=False)
            bar.update(len(result.ids_Bl))

        try:
            for i, item in enumerate(pipe.generate(requests, callback=show, **options)):
                paths += write_image(item, out / image_name(i, len(requests), item))
                sheet.add(item.image)
        except torch.OutOfMemoryError as error:
            raise UserError(f"{pipe.device} has too little memory for this batch; lower --batch-size") from error
    if len(requests) > 1:
        paths.append(out / "contact_sheet.png")
        write_bytes(paths[-1], encode_png(sheet.image))
    return paths


def write_image(item: Generated, path: Path) -> list[Path]:
    """Write one image, and the strip of its scales if it has them."""
    values = metadata(item)
    write_bytes(path, encode_png(item.image, values))
    if not item.scale_images:
        return [path]
    strip_path = path.with_name(f"{path.stem}_scales.png")
    strip = grid_image([[torch.from_numpy(np.array(image)) for image in item.scale_images]])
    write_bytes(strip_path, encode_png(strip, values))
    return [path, strip_path]


def image_name(index: int, count: int, item: Generated) -> str:
    """Unlike that of any other image of the call, whatever the prompt: 000_a-red-apple-3d_seed7.png."""
    digits = max(3, len(str(count - 1)))
    return f"{index:0{digits}d}_{slug(str(item.prompt))}_seed{item.seed}.png"


def requests_for(prompts: Sequence[str], num_images: int, seed: int) -> list[Request]:
    """Image i of every prompt has seed + i. Raises UserError for numbers out of range."""
    if len(prompts) * num_images > MAX_IMAGES:
        raise UserError(f"{len(prompts) * num_images} images; ask for at most {MAX_IMAGES} in one call")
    if not -(2**63) <= seed < 2**64 - MAX_IMAGES:
        raise UserError(f"the seed {quoted(seed)} does not fit into 64 bits; choose a smaller one")
    return make_requests(prompts, num_images, seed)


def read_prompts(source: str) -> list[str]:
    """One prompt a line, blank lines skipped; "-" is stdin. Raises UserError for unreadable files."""
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts-file {source} cannot be read as UTF-8 text ({error})") from error
    return [line.strip() for line in text.split("\n") if line.strip()]


def check_size(size: str | None, pipe: Pipeline) -> None:
    """Raise a UserError unless `size` (N or HxW; None is any) is the size of the model's images."""
    if size is None:
        return
    match = re.fullmatch(r"(\d{1,6})(?:[xX×](\d{1,6}))?", size.strip())
    if match is None:
        raise UserError(f"--size {quoted(size)} is no size; write pixels as 256 or as 256x192 (height x width)")
    asked = (int(match[1]), int(match[2] or match[1]))
    if asked != pipe.image_size:
        cell = pipe.tokenizer.config.downsampling
        sizes = ", ".join(f"{h * cell}x{w * cell}" for h, w in pipe.transformer.schedule.grids)
        height, width = pipe.image_size
        raise UserError(
            f"--size {size}: this model's scales are {sizes} pixels, and its images as large as the last; "
            f"use --size {height}x{width} or leave it out"
        )


def warn_of_truncation(pipe: Pipeline, prompts: Sequence[str], negative_prompt: str | None) -> None:
    """Say on stderr which prompts are longer than the text encoder's context."""
    if pipe.text_encoder is None:
        return
    texts = list(dict.fromkeys([*prompts, *filter(None, [negative_prompt])]))
    for text, dropped in zip(texts, pipe.text_encoder.count_truncated_tokens(texts), strict=True):
        if dropped:
            print(
                f"hartist: warning: the last {dropped} tokens of {quoted(text)} do not fit into the model's "
                f"{pipe.text_encoder.num_tokens} and are left out",
                file=sys.stderr,
            )
