"""The command line: one parser, one module a command, and errors that a person can read.

Nothing heavy is imported before a command runs, so that every --help answers at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from hartist.commands.arguments import build_parser
from hartist.errors import UserError

INTERRUPTED, BROKEN_PIPE = 130, 141
"""Exit codes that shells give for SIGINT and SIGPIPE."""


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


def one_line(message: str) -> str:
    """`message` with everything that doesn't print, line breaks first of all, spelled as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in message)


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
