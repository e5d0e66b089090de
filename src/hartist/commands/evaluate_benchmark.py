"""`hartist evaluate MODEL --benchmark NAME`: pictures, figures, result.json"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from hartist.commands.evaluate_tables import format_result
from hartist.commands.output import require_writable
from hartist.commands.sampling import chosen_settings
from hartist.errors import UserError
from hartist.evaluation.benchmarks.names import open_benchmark
from hartist.evaluation.harness.generate import Means, Shard
from hartist.evaluation.harness.metrics import METRICS
from hartist.evaluation.harness.prepare import Choices, prepare
from hartist.evaluation.harness.result import RESULT
from hartist.evaluation.harness.run import Recipe, run_benchmark
from hartist.generation.devices import choose_device
from hartist.generation.loading import find_model
from hartist.generation.model_options import ModelOptions, absolute

SMALL = 1 << 30
"""Bytes of a model's files up to which each core gets a process of its own."""
MAX_PROCESSES = 8
"""That are started without being asked for."""


def run(args: argparse.Namespace) -> int:
    if args.metrics is not None and args.metrics.strip() in ("?", "help"):
        print("\n".join(f"{name:<10} {metric.meaning}" for name, metric in METRICS.items()))
        return 0
    changes = chosen_settings(args)
    for flag, value, most in (
        ("--batch-size", args.batch_size, 4096),
        ("--processes", args.processes, 4096),
        ("--threads", args.threads, 4096),
    ):
        if value is not None and not 1 <= value <= most:
            raise UserError(f"{flag} {value} is out of range; give 1 to {most}")
    require_writable(args.out)
    shard = Shard.from_environment()
    benchmark = open_benchmark(
        args.benchmark, args.data, limit=args.limit, per_prompt=args.per_prompt, classes=args.classes
    )
    items = benchmark.items()
    means = choose_means(args, shard)
    scorers = []
    if shard.main:  # the others only make pictures
        choices = Choices(
            args.metrics, args.network, args.align, args.judge, args.crop, args.cache or args.out / "cache" / "real"
        )
        scorers = prepare(benchmark, items, choices, choose_device(means.options.device))
    recipe = Recipe(args.seeds, changes)
    result = run_benchmark(benchmark, items, args.out, means, recipe, scorers, shard, progress=not args.quiet)
    if result is not None:
        print(format_result(result, benchmark.title))
        print(f"\n{args.out / RESULT}")
    return 0


def choose_means(args: argparse.Namespace, shard: Shard) -> Means:
    """The model, and how many processes make its pictures."""
    path = find_model(args.model).absolute()
    device = args.device
    if shard.size > 1 and device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', shard.rank)}"
    processes = args.processes or (1 if args.ray_address is not None else default_processes(path, device, shard))
    options = ModelOptions(
        str(path),
        absolute(args.text_model),
        absolute(args.tokenizer),
        device,
        args.dtype,
        not args.no_ema,
        args.threads or (1 if choose_device(device).type == "cpu" else 0),
        args.int8,
        compile=args.compile,
    )
    return Means(options, options.fingerprint(), args.batch_size, processes, args.ray_address)


def default_processes(model: Path, device: str | None, shard: Shard) -> int:
    """On a CPU one a core, which is faster than threads, as long as the model is small; else one."""
    if choose_device(device).type != "cpu" or shard.size > 1:
        return 1
    files = [path for path in model.rglob("*") if path.is_file()] if model.is_dir() else [model]
    small = sum(path.stat().st_size for path in files) <= SMALL
    return max(1, min(MAX_PROCESSES, os.cpu_count() or 1)) if small else 1
