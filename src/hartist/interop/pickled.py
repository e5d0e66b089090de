"""Reading `.pth` and `.bin` files without running what they may contain: tensors and plain data only."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hartist.errors import UserError

WRAPPERS = ("state_dict", "model_state_dict", "model", "ema", "module")
"""Entries under which training programs keep a network's tensors."""


def read_pickled(path: Path, entries: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, mapped into memory where its format allows.

    Goes down into `entries`, one after the other as far as they are there, and into the usual wrappers.
    Raises UserError if the file is missing, damaged, holds objects that would have to be run, or no tensors.
    """
    value = _load(Path(path))
    for name in entries:
        if isinstance(value, dict) and isinstance(value.get(name), dict):
            value = value[name]
    while isinstance(value, dict) and not any(isinstance(item, Tensor) for item in value.values()):
        inner = next((value[name] for name in WRAPPERS if isinstance(value.get(name), dict)), None)
        if inner is None:
            break
        value = inner
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path} holds no named tensors; give a checkpoint of weights")
    for key, item in value.items():
        if not isinstance(key, str) or not isinstance(item, Tensor):
            raise UserError(f"{path}: {key!r} is not a tensor; give a checkpoint of weights alone")
    return dict(value)


def _load(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        # Files of the old format cannot be mapped; VAR's and HART's are of the new one.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many kinds for damaged and for foreign files
        raise UserError(
            f"{path} is damaged or holds more than plain data; download it again, or save its tensors alone"
        ) from error
