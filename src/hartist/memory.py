"""Freed memory back to the system, before the next large maps ask for theirs"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def give_back_memory() -> None:
    """Have the C library return what it keeps of freed memory. Only glibc keeps much, and elsewhere nothing is done.

    It takes back tensors below 32 MiB for the next ones of their size; those of other sizes come on top of them.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # not glibc; Windows has no library of no name
        return None
