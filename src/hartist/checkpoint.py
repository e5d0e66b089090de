"""Reading and writing networks: a directory each, with config.json and safetensors, written atomically."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hartist import config as configs
from hartist.errors import UserError
from hartist.files import atomic_path, read_json, write_json

Module = TypeVar("Module", bound=nn.Module)

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_safetensors(path: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All tensors of one file, floating-point ones converted to `dtype` one by one (memory-mapped before)."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {}
            for key in file.keys():  # noqa: SIM118 - safe_open is not a dict
                tensor = file.get_tensor(key)
                tensors[key] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            return tensors
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a complete safetensors file ({error}); download or write it again") from error


def read_weights(directory: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of a directory: model.safetensors, or shards listed in model.safetensors.index.json."""
    index = directory / INDEX
    if not index.exists():
        return read_safetensors(directory / WEIGHTS, dtype)
    try:
        weight_map: dict[str, str] = read_json(index)["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} has no weight_map; download it again") from error
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise UserError(f"{index} points outside its folder: {shard!r}")
        tensors |= read_safetensors(directory / shard, dtype)
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise UserError(f"{index} lists {absent[0]!r}, which no shard holds")
    return tensors


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors atomically."""
    with atomic_path(path) as temporary:
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)
        except SafetensorError as error:  # how the library reports a full disk
            raise UserError(f"cannot write {path}: {error}") from error


def check_keys(expected: dict[str, Tensor], tensors: dict[str, Tensor], where: str) -> None:
    """Raise a UserError that names the first missing, extra or misshapen key."""
    missing = [key for key in expected if key not in tensors]
    extra = [key for key in tensors if key not in expected]
    misshapen = [key for key in expected if key in tensors and tensors[key].shape != expected[key].shape]
    problems = []
    if missing:
        problems.append(f"missing key {missing[0]!r} ({len(missing)} in all)")
    if extra:
        problems.append(f"unexpected key {extra[0]!r} ({len(extra)} in all)")
    if misshapen:
        key = misshapen[0]
        problems.append(f"{key!r} is {list(tensors[key].shape)}, expected {list(expected[key].shape)}")
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}; the weights do not belong to this configuration")


class _Uninitialised(TorchFunctionMode):
    """Leaves out what fills new parameters: on the meta device it changes nothing, yet imports PyTorch's compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" or func in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextlib.contextmanager
def without_storage() -> Iterator[None]:
    """Modules that are built within have shapes and types, on the meta device, but no values."""
    with torch.device("meta"), _Uninitialised():
        yield


def build_empty(build: Callable[[], Module], where: str) -> Module:
    """A module on the meta device: shapes without storage. UserError naming `where` for impossible sizes."""
    try:
        with without_storage():
            return build()
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{where} describes no possible network ({reason}); correct its sizes") from error


def assign_weights(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Put `tensors` into a module built on the meta device, strictly; nothing is copied."""
    check_keys(module.state_dict(), tensors, where)
    # meta parameters are replaced, not filled: loading needs no memory beyond the tensors themselves
    module.load_state_dict(tensors, assign=True)
    module.requires_grad_(False).eval()


def save_component(
    directory: Path, kind: str, config: Any, tensors: dict[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """Write one network: `directory/config.json` and `directory/model.safetensors`."""
    if dtype is not None:
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    write_safetensors(directory / WEIGHTS, tensors, {"format": "pt"})
    header = {"format": f"hartist-{kind}", "version": FORMAT_VERSION}
    write_json(directory / "config.json", header | configs.to_dict(config))


def read_component_config(directory: Path, kind: str) -> dict[str, Any]:
    """The configuration of one network, checked to be of the kind asked for."""
    path = directory / "config.json"
    values = read_json(path)
    found = values.pop("format", None) if isinstance(values, dict) else None
    if found != f"hartist-{kind}":
        raise UserError(f"{path} does not describe a Hartist {kind} (format {json.dumps(found)})")
    version = values.pop("version", None)
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}; this Hartist reads version {FORMAT_VERSION}")
    return values
