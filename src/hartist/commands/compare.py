"""`hartist compare`: two results of one benchmark, and which differences are more than chance"""

from __future__ import annotations

import argparse

from hartist.commands.output import require_writable, use_threads
from hartist.evaluation.report.comparison import compare, format_comparison
from hartist.evaluation.report.intervals import Resampling
from hartist.files import write_json


def run(args: argparse.Namespace) -> int:
    use_threads(args.threads)
    if args.json is not None:
        require_writable(args.json, replaced=True)
    comparison = compare(args.a, args.b, resampling(args))
    print(format_comparison(comparison, str(args.a), str(args.b)))
    if args.json is not None:
        write_json(args.json, comparison.to_json())
    return 0


def resampling(args: argparse.Namespace) -> Resampling:
    """As the flags say."""
    return Resampling(args.resamples, args.seed, args.resample_reference, progress=not args.quiet)
