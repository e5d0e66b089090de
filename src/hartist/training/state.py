"""Resumable training state: sharded safetensors (torch.distributed.checkpoint) and JSON, written atomically

CHECKPOINT/state.json           step, settings, and what each rank has to remember (its place in a stream)
CHECKPOINT/shard-*.safetensors  weights, averages and moments; any number of ranks reads what any number wrote
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hartist.errors import UserError
from hartist.files import atomic_directory, clear_temporaries, read_json, recover_directory, write_json
from hartist.training.optimizer import ExponentialAverage, moment_names
from hartist.training.parallel import World

Trained = Mapping[str, tuple[nn.Module, torch.optim.Optimizer, ExponentialAverage]]
"""The networks of a run by name, each with its optimiser and average."""


def _weights(parts: Trained, gathered: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights, averages and gathered tensors under their names in the file: the live tensors, not copies."""
    tensors = {f"gathered.{name}": tensor for name, tensor in gathered.items()}
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
    *,
    position: Any = None,
    world: World | None = None,
) -> None:
    """Write the state after `step` finished steps, replacing the one before it in one rename (collective).

    `gathered` and each rank's `position` are what later steps depend on beside the networks.
    Raises UserError if the disk is full or the folder can't be written; the state before it then stays.
    """
    world = world or World()
    tensors = _weights(parts, gathered or {})
    for part, (module, optimizer, _) in parts.items():
        for name, p in module.named_parameters():
            for key, value in optimizer.state.get(p, {}).items():
                tensors[f"optimizer.{part}.{name}.{key}"] = torch.as_tensor(value)
    positions = world.gather(position)
    with _shared_directory(directory, world) as temporary:
        # Ranks share the writing of whole tensors as well. The writer stores them as they lie in memory.
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        try:
            with _quiet():
                dcp.save(
                    contiguous,
                    storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True),
                    no_dist=world.size == 1,
                )
        except (Exception, CheckpointException) as error:
            raise UserError(f"cannot write {directory} ({_reason(error)}); free some space and run it again") from error
        if world.main:
            write_json(temporary / "state.json", {"step": step, "positions": positions, **info})


@contextlib.contextmanager
def _shared_directory(directory: Path, world: World) -> Iterator[Path]:
    """`atomic_directory` on the main rank, which all ranks write into."""
    if not world.main:
        yield Path(world.broadcast(""))
        world.barrier()
        world.barrier()
        return
    with atomic_directory(directory) as temporary:
        world.broadcast(str(temporary))
        yield temporary
        world.barrier()
    world.barrier()


def load_state(
    directory: Path,
    parts: Trained,
    info: dict[str, Any],
    gathered: Mapping[str, Tensor] | None = None,
    *,
    world: World | None = None,
) -> tuple[int, Any]:
    """Restore the state in `directory` in place (collective).

    Returns the number of finished steps (0 if there is none) and this rank's position (None if another
    number of ranks saved it). Raises UserError if it belongs to a run with other settings, or is damaged.
    """
    world = world or World()
    if world.main:
        recover_directory(directory)
        clear_temporaries(directory)
    world.barrier()
    if not (directory / "state.json").exists():
        return 0, None
    meta = read_json(directory / "state.json")
    if not isinstance(meta, dict) or not isinstance(meta.get("step"), int):
        raise UserError(f"{directory / 'state.json'} is damaged (no step in it); delete the folder to start over")
    for key, value in info.items():
        if meta.get(key) != value:
            raise UserError(
                f"{directory} holds a run with another {_difference(key, meta.get(key), value)}; "
                "resume it with its own settings or choose another --out"
            )
    try:
        _load_tensors(directory, parts, gathered or {}, world)
    except UserError:
        raise
    except (Exception, CheckpointException) as error:  # a damaged file shows itself in many ways
        raise UserError(f"{directory} is damaged ({_reason(error)}); delete the folder to start over") from error
    positions = meta.get("positions")
    fits = isinstance(positions, list) and len(positions) == world.size
    return meta["step"], positions[world.rank] if fits else None  # type: ignore[index]


def _reason(error: BaseException) -> str:
    """What a rank's disk said; the library wraps it in an exception that is no Exception."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _difference(key: str, saved: Any, wanted: Any) -> str:
    """The setting that differs, as deep as it can be named."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for name in sorted(set(saved) | set(wanted)):
            if saved.get(name) != wanted.get(name):
                return _difference(f"{key}.{name}", saved.get(name), wanted.get(name))
    if isinstance(saved, dict | list | None) or isinstance(wanted, dict | list):
        return key
    return f"{key} ({saved}, not {wanted})"


def _load_tensors(directory: Path, parts: Trained, gathered: Mapping[str, Tensor], world: World) -> None:
    reader = HuggingFaceStorageReader(str(directory))
    stored = {
        name: _stored_shape(entry)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    expected = _weights(parts, gathered)
    targets = dict(expected)
    moments: dict[nn.Parameter, dict[str, Tensor]] = {}
    optimizers: dict[nn.Parameter, torch.optim.Optimizer] = {}
    for part, (module, optimizer, _) in parts.items():
        for name, p in module.named_parameters():
            prefix = f"optimizer.{part}.{name}."
            names = moment_names(optimizer, p)
            if not any(prefix + key in stored for key in names):
                continue  # this parameter had no gradient yet
            own = {
                key: torch.zeros((), device=p.device) if key == "step" else torch.zeros_like(p).detach()
                for key in names
            }
            targets |= {prefix + key: value for key, value in own.items()}
            moments[p], optimizers[p] = own, optimizer
    for name, tensor in targets.items():
        if stored.get(name) != tuple(tensor.shape):
            found = f"shape {stored[name]}" if name in stored else "no such tensor"
            raise UserError(f"{directory} is damaged ({name}: {found}); delete the folder to start over")
    # Read into contiguous tensors, then copy: networks may lie in another memory layout.
    buffers = {name: torch.empty_like(t, memory_format=torch.contiguous_format) for name, t in targets.items()}
    with _quiet():
        dcp.load(buffers, storage_reader=reader, no_dist=world.size == 1)
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(buffers[name])
    for p, own in moments.items():
        # The fused optimiser walks through a parameter and its moments side by side: same layout.
        optimizers[p].state[p] = own


def _stored_shape(entry: TensorStorageMetadata) -> tuple[int, ...] | str:
    """Its shape, if the shards hold all of it: a lost one leaves a gap between the others."""
    whole = sum(chunk.sizes.numel() for chunk in entry.chunks) == entry.size.numel()
    return tuple(entry.size) if whole else "with a part missing"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's remark that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
