"""`hartist report`: a page about one run or several, as HTML and as Markdown"""

from __future__ import annotations

import argparse
from pathlib import Path

from hartist.commands.compare import resampling
from hartist.commands.output import require_writable, use_threads
from hartist.errors import UserError
from hartist.evaluation.report.build import build_page
from hartist.evaluation.report.content import Page
from hartist.evaluation.report.html import render_html
from hartist.evaluation.report.markdown import render_markdown
from hartist.evaluation.report.options import Options
from hartist.evaluation.report.runs import read_runs
from hartist.files import atomic_directory, write_text

HTML, MARKDOWN, FILES = "report.html", "report.md", "report_files"


def run(args: argparse.Namespace) -> int:
    use_threads(args.threads)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file; give a folder")
    require_writable(args.out)
    options = Options(resampling(args), args.title, args.samples, args.training, args.network, args.cache)
    write_report(args.out, build_page(read_runs(args.runs), options))
    for name in (HTML, MARKDOWN):
        print(args.out / name)
    return 0


def write_report(out: Path, page: Page) -> None:
    """Write the page in both forms; only the Markdown needs the folder of files."""
    with atomic_directory(out / FILES) as folder:
        for name, content in page.assets.items():
            (folder / name).write_bytes(content)
    write_text(out / MARKDOWN, render_markdown(page, FILES))
    write_text(out / HTML, render_html(page))
