"""`hartist check`: does this implementation compute what the authors' does?"""

from __future__ import annotations

import argparse

from hartist.commands.output import use_threads
from hartist.interop.check import check_folder, format_report


def run(args: argparse.Namespace) -> int:
    use_threads(args.threads)
    passed = True
    for directory in args.directories:
        report = check_folder(directory)
        print(format_report(report), flush=True)
        passed = passed and report.passed
    return 0 if passed else 1
