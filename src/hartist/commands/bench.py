"""`hartist bench`: how fast, how large, and how near the machine's limit."""

from __future__ import annotations

import argparse
import sys

from hartist.commands.output import require_writable, use_threads
from hartist.evaluation.bench.growth import Growth, grow, growth_json
from hartist.evaluation.bench.plot import plot_bench, plot_growth, require_plot
from hartist.evaluation.bench.report import format_bench, format_growth, format_head
from hartist.evaluation.bench.run import BenchResult, BenchSettings, run_bench, to_json
from hartist.files import write_json
from hartist.generation.shortcuts import FAST


def run(args: argparse.Namespace) -> int:
    use_threads(args.threads)
    for target in (args.json, args.plot):
        if target is not None:
            require_writable(target, replaced=True)
    if args.plot is not None:
        require_plot(args.plot)
    settings = BenchSettings(
        preset=args.preset.replace("_", "-"),
        model=args.model,
        size=args.size,
        batch=args.batch,
        repeats=args.repeats,
        warmup=args.warmup,
        dtype=args.dtype,
        device=args.device,
        int8=args.int8,
        compile=args.compile,
        sampling=(FAST if args.fast else {}) | ({} if args.guidance is None else {"guidance": args.guidance}),
        roofline=not args.no_roofline,
        operators=args.operators,
        text=args.text,
        text_model=args.text_model,
        tokenizer=args.tokenizer,
    )
    if args.sizes or args.batches:
        return _growth(args, grow(settings, args.sizes, args.batches, _tell))
    result = run_bench(settings)
    print(format_bench(result))
    if args.json is not None:
        write_json(args.json, to_json(result))
    if args.plot is not None:
        plot_bench(result, args.plot)
    return 0


def _growth(args: argparse.Namespace, growths: list[Growth]) -> int:
    print(format_head(growths[0].results[0]))
    for growth in growths:
        print(f"\n{format_growth(growth)}")
    if args.json is not None:
        write_json(args.json, growth_json(growths))
    if args.plot is not None:
        plot_growth(growths, args.plot)
    return 0


def _tell(result: BenchResult) -> None:
    h, w = result.image_size
    seconds = result.timing.total.median
    print(f"{h}×{w} px, batch {result.settings.batch}: {seconds:.3f} s", file=sys.stderr, flush=True)
