"""`hartist bench`: how fast and how large, scale by scale."""

from __future__ import annotations

import argparse

from hartist.commands.output import require_writable, use_threads
from hartist.evaluation.bench import BenchSettings, format_bench, run_bench, to_json
from hartist.files import write_json


def run(args: argparse.Namespace) -> int:
    use_threads(args.threads)
    if args.json is not None:
        require_writable(args.json, replaced=True)
    result = run_bench(
        BenchSettings(
            preset=args.preset.replace("_", "-"),
            batch=args.batch,
            repeats=args.repeats,
            warmup=args.warmup,
            dtype=args.dtype,
            device=args.device,
            guidance=args.guidance,
            threads=args.threads,
        )
    )
    print(format_bench(result))
    if args.json is not None:
        write_json(args.json, to_json(result))
    return 0
