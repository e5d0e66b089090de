"""Where a model computes, in which type, and by which clock: what was asked for, or the best there is"""

from __future__ import annotations

import time

import torch

from hartist.errors import UserError, quoted


def choose_device(device: str | None) -> torch.device:
    """The device asked for, or the best one there is. Raises UserError if it isn't there."""
    if device is None or device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen).tolist()  # the meta device has no values to give
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).splitlines()[0][:80]
        raise UserError(f"device {quoted(device)} is not available here ({reason}); try cpu") from error
    return chosen


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The dtype asked for by name or value; bfloat16 on CUDA and float32 elsewhere by default."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None or dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise UserError(f"dtype {quoted(dtype)} is not one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def now(device: torch.device) -> float:
    """Wall-clock seconds after everything the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
