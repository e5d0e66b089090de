"""The command line: one parser, one module a command, and errors that a person can read.

Nothing heavy is imported before a command runs, so that every --help answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from hartist import __version__
from hartist.commands.flags import Formatter
from hartist.commands.flags_data import add_data
from hartist.commands.flags_evaluation import add_evaluate
from hartist.commands.flags_models import add_check, add_convert, add_generate, add_info, add_reconstruct
from hartist.commands.flags_report import add_compare, add_report
from hartist.commands.flags_serving import add_serve
from hartist.commands.flags_training import add_bench, add_train
from hartist.errors import UserError

DESCRIPTION = """\
Text-to-image with hybrid autoregressive transformers (HART): a picture grows over a handful of scales,
from one token to a full grid, and a small diffusion network adds what no token can say."""

EXAMPLES = """\
examples:
  hartist generate "a red apple, 3d"                       one image with the bundled model, in out/
  hartist generate "a sleeping cat, flat" -n 4 --seed 7    four images with the seeds 7 to 10
  hartist info                                             what the bundled model consists of
  hartist reconstruct photo.jpg -o out/                    what the tokenizer keeps of a picture
  hartist COMMAND --help                                   flags and examples of one command"""

INTERRUPTED, BROKEN_PIPE = 130, 141
"""Exit codes that shells give for SIGINT and SIGPIPE."""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; `command` in the result names the module that runs it."""
    parser = argparse.ArgumentParser(
        "hartist",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hartist {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (
        add_generate,
        add_reconstruct,
        add_info,
        add_convert,
        add_check,
        add_data,
        add_train,
        add_evaluate,
        add_compare,
        add_report,
        add_bench,
        add_serve,
    ):
        add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. A user's mistake is one line on stderr and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # paths may hold what the terminal's encoding lacks
    try:
        try:
            parsed = build_parser().parse_args(arguments)
            return int(import_module(f"hartist.commands.{parsed.command}").run(parsed))
        finally:
            sys.stdout.flush()  # here, where a closed pipe or a full disk can still be answered
    except BrokenPipeError:
        _drop_stdout()
        return BROKEN_PIPE
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        if error.errno is None:  # not the system's answer but a library's
            raise
        _drop_stdout()
        where = f"{error.filename}: " if error.filename is not None else ""
        return _fail(f"{where}{error.strerror or error}", UserError.exit_code)


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(f"hartist: error: {one_line(message)}", file=sys.stderr)
    return code


def one_line(message: str, limit: int = 600) -> str:
    """`message` with everything that doesn't print spelled as an escape, and cut in the middle if it is long."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in message)
    return line if len(line) <= limit else f"{line[: limit - 203]} … {line[-200:]}"


def _drop_stdout() -> None:
    """If stdout can't be written, send its buffer nowhere: at exit the interpreter would try again."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)


if __name__ == "__main__":
    sys.exit(main())
