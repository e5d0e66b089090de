"""`hartist generate --prompts`: a file of prompts → a folder of pictures and its manifest, by one process or many"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Generator, Sequence
from typing import Any

from tqdm import tqdm

from hartist.commands.output import require_writable
from hartist.errors import UserError
from hartist.generation.cluster import ray_running
from hartist.generation.loading import find_model
from hartist.generation.model_options import ModelOptions, absolute
from hartist.generation.offline import Batch, Made, Manifest, batches, check_plan, make
from hartist.generation.offline_plan import Defaults, Picture, read_plan

MAX_PROCESSES = 4096


def run(args: argparse.Namespace, changes: dict[str, Any]) -> int:
    """Make what is missing. `changes` are the sampling settings given as flags, for lines that leave them open."""
    _check(args)
    plan = read_plan(args.jobs, Defaults(args.seed, args.num_images, args.negative_prompt, changes))
    require_writable(args.out)
    options = ModelOptions(
        absolute(find_model(args.model)),
        absolute(args.text_model),
        absolute(args.tokenizer),
        args.device,
        args.dtype,
        not args.no_ema,
        args.threads or 1,  # with another number, pictures may differ by rounding
        args.int8,
        args.text_device,
        args.compile,
    )
    model = options.fingerprint()
    with Manifest(args.out) as manifest:
        missing = [picture for picture in plan if not manifest.has(picture, model)]
        with (
            contextlib.closing(_make(args, options, plan, batches(plan, missing, args.batch_size))) as pictures,
            tqdm(
                total=len(plan),
                initial=len(plan) - len(missing),
                unit="picture",
                disable=True if args.quiet else None,
            ) as bar,
        ):
            for made in pictures:
                manifest.add(made, model)
                bar.update()
    print(f"{manifest.path}: {len(missing)} pictures made, {len(plan) - len(missing)} were there")
    return 0


def _make(
    args: argparse.Namespace, options: ModelOptions, plan: Sequence[Picture], work: Sequence[Batch]
) -> Generator[Made, None, None]:
    """The missing pictures; no model is loaded if there are none."""
    if not work:
        return
    if not _needs_ray(args):
        pipe = options.load()
        check_plan(pipe, plan)
        for batch in work:
            yield from make(pipe, batch)
        return
    with ray_running(args.ray_address, args.processes * options.threads):
        from hartist.generation.offline_ray import make_on_ray

        yield from make_on_ray(options, plan, work, args.processes)


def _needs_ray(args: argparse.Namespace) -> bool:
    return args.processes > 1 or args.ray_address is not None


def _check(args: argparse.Namespace) -> None:
    """Raise UserError for flags that don't go together, and numbers out of range."""
    for flag, given in (
        ("prompts as arguments", args.prompts),
        ("--prompts-file", args.prompts_file is not None),
        ("--save-scales", args.save_scales),
        ("--size", args.size is not None),
    ):
        if given:
            raise UserError(f"--prompts makes an offline batch, which takes no {flag}; leave one of them out")
    for flag, value, most in (
        ("--processes", args.processes, MAX_PROCESSES),
        ("--batch-size", args.batch_size, 4096),
        ("--num-images", args.num_images, 10**6),
    ):
        if not 1 <= value <= most:
            raise UserError(f"{flag} {value} is out of range; give 1 to {most}")
