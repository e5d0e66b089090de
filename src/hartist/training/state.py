"""Resumable training state: weights, averages and optimiser moments as safetensors + JSON, written atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hartist.errors import UserError
from hartist.files import atomic_directory, read_json, write_json
from hartist.training.optimizer import ExponentialAverage


def _moments(module: nn.Module, optimizer: torch.optim.Optimizer, part: str) -> dict[str, Tensor]:
    names = {p: name for name, p in module.named_parameters()}
    return {
        f"optimizer.{part}.{names[p]}.{key}": torch.as_tensor(value)
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def save_state(
    directory: Path,
    step: int,
    parts: dict[str, tuple[nn.Module, torch.optim.Optimizer, ExponentialAverage]],
    info: dict[str, Any],
) -> None:
    """Write the state after `step` finished steps, replacing the one before it in one rename."""
    tensors: dict[str, Tensor] = {}
    for part, (module, optimizer, average) in parts.items():
        tensors |= {f"weights.{part}.{k}": v for k, v in module.state_dict().items()}
        tensors |= {f"average.{part}.{k}": v for k, v in average.shadow.items()}
        tensors |= _moments(module, optimizer, part)
    with atomic_directory(directory) as temporary:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary / "state.safetensors")
        write_json(temporary / "state.json", {"step": step, **info})


def load_state(
    directory: Path,
    parts: dict[str, tuple[nn.Module, torch.optim.Optimizer, ExponentialAverage]],
    info: dict[str, Any],
) -> int:
    """Restore the state in `directory`; returns the number of finished steps (0 if there is none).

    Raises UserError if it belongs to a run with other settings, or is damaged.
    """
    if not (directory / "state.json").exists():
        return 0
    meta = read_json(directory / "state.json")
    for key, value in info.items():
        if meta.get(key) != value:
            raise UserError(
                f"{directory} holds a run with another {key}; resume it with its own settings or choose another --out"
            )
    try:
        tensors = load_file(directory / "state.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory / 'state.safetensors'} is damaged ({error}); delete the folder to start over") from error
    for part, (module, optimizer, average) in parts.items():
        module.load_state_dict({k: tensors[f"weights.{part}.{k}"] for k in module.state_dict()})
        average.shadow = {k: tensors[f"average.{part}.{k}"] for k in average.shadow}
        for name, p in module.named_parameters():
            prefix = f"optimizer.{part}.{name}."
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if state:
                optimizer.state[p] = state  # type: ignore[assignment]
    return int(meta["step"])
