"""Resumable training state: weights, averages and moments as safetensors + JSON, written atomically."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hartist.checkpoint import check_keys
from hartist.errors import UserError
from hartist.files import atomic_directory, read_json, recover_directory, write_json
from hartist.training.optimizer import ExponentialAverage

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of every parameter."""

Trained = Mapping[str, tuple[nn.Module, torch.optim.Optimizer, ExponentialAverage]]
"""The networks of a run by name, each with its optimiser and average."""


def _weights(parts: Trained) -> dict[str, Tensor]:
    """Weights and averages of all parts under their names in the file: the live tensors, not copies."""
    tensors: dict[str, Tensor] = {}
    for part, (module, _, average) in parts.items():
        tensors |= {f"weights.{part}.{k}": v for k, v in module.state_dict().items()}
        tensors |= {f"average.{part}.{k}": v for k, v in average.shadow.items()}
    return tensors


def save_state(
    directory: Path,
    step: int,
    parts: Trained,
    info: dict[str, Any],
    gathered: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the state after `step` finished steps, replacing the one before it in one rename.

    `gathered` is what later steps depend on beside the networks.
    """
    tensors = _weights(parts) | {f"gathered.{k}": v for k, v in (gathered or {}).items()}
    for part, (module, optimizer, _) in parts.items():
        for name, p in module.named_parameters():
            for key, value in optimizer.state.get(p, {}).items():
                tensors[f"optimizer.{part}.{name}.{key}"] = torch.as_tensor(value)
    with atomic_directory(directory) as temporary:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary / "state.safetensors")
        write_json(temporary / "state.json", {"step": step, **info})


def load_state(
    directory: Path, parts: Trained, info: dict[str, Any], gathered: Mapping[str, Tensor] | None = None
) -> int:
    """Restore the state in `directory` in place; returns the number of finished steps (0 if there is none).

    Raises UserError if it belongs to a run with other settings, or is damaged.
    """
    recover_directory(directory)
    if not (directory / "state.json").exists():
        return 0
    meta = read_json(directory / "state.json")
    if not isinstance(meta, dict) or not isinstance(meta.get("step"), int):
        raise UserError(f"{directory / 'state.json'} is damaged (no step in it); delete the folder to start over")
    for key, value in info.items():
        if meta.get(key) != value:
            raise UserError(
                f"{directory} holds a run with another {key}; resume it with its own settings or choose another --out"
            )
    path = directory / "state.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); delete the folder to start over") from error
    expected = _weights(parts)
    check_keys(expected, {k: v for k, v in tensors.items() if k in expected}, str(path))
    with torch.no_grad():
        for key, tensor in expected.items():
            tensor.copy_(tensors[key])
        for key, tensor in (gathered or {}).items():
            if f"gathered.{key}" in tensors:
                tensor.copy_(tensors[f"gathered.{key}"])
    for part, (module, optimizer, _) in parts.items():
        for name, p in module.named_parameters():
            _restore_moments(p, optimizer, f"optimizer.{part}.{name}.", tensors, path)
    return meta["step"]


def _restore_moments(
    p: nn.Parameter, optimizer: torch.optim.Optimizer, prefix: str, tensors: dict[str, Tensor], path: Path
) -> None:
    saved = {key: tensors[prefix + key] for key in MOMENTS if prefix + key in tensors}
    if not saved:
        return  # this parameter had no gradient yet
    wrong = [key for key in MOMENTS if key not in saved or saved[key].shape != (() if key == "step" else p.shape)]
    if wrong:
        raise UserError(f"{path} is damaged (no {prefix}{wrong[0]} that fits); delete the folder to start over")
    # In the parameter's own memory layout: the fused optimiser walks through both side by side.
    moments = {key: torch.empty_like(p).copy_(saved[key]).detach() for key in MOMENTS[1:]}
    optimizer.state[p] = {"step": saved["step"].clone(), **moments}
