"""The one exception that a person, rather than a programmer, is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input (a path, a prompt, a checkpoint, a setting).

    Its message is one line that names the input and the remedy. The command line prints it
    without a traceback and exits with code 2.
    """

    exit_code = 2


def quoted(value: object) -> str:
    """`value` as a message shows it: its repr, cut in the middle where that is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:70]} … {text[-20:]}"
