"""Reading an encoder's weights: safetensors only, every name checked, no random state touched."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hartist.checkpoint import without_storage
from hartist.errors import UserError
from hartist.files import read_json


def read_config(directory: Path) -> dict[str, Any]:
    """The values of `config.json`; raises UserError if it is missing or holds no mapping."""
    values = read_json(directory / "config.json")
    if not isinstance(values, dict):
        raise UserError(f"{directory / 'config.json'} is not a model configuration; download it again")
    return values


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists.

    Raises UserError if there are none (pickled weights are not read) or a file is damaged.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        shards = [single]
    elif index.is_file():
        try:
            names = {Path(name).name for name in read_json(index)["weight_map"].values()}
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{index} is not an index of weights; download it again") from error
        shards = [directory / name for name in sorted(names)]  # by bare name: no way out of the directory
    else:
        raise UserError(f"{directory} has no model.safetensors; convert the weights to safetensors first")
    weights: dict[str, Tensor] = {}
    for shard in shards:
        try:
            weights |= load_file(shard)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{shard} cannot be read ({error}); download it again") from error
    return weights


def build_with_weights(build: Callable[[], nn.Module], weights: Mapping[str, Tensor], source: Path) -> nn.Module:
    """Build a module and give it `weights`, which must match it name for name and shape for shape.

    The module is built without storage, so neither time nor random numbers go into an
    initialisation; buffers that no checkpoint holds stay without storage and are the caller's to
    fill in. Raises UserError that names `source` and the first difference.
    """
    with without_storage():
        model = build()
    expected = model.state_dict()
    for problem, names in (
        ("lacks", expected.keys() - weights.keys()),
        ("also has", weights.keys() - expected.keys()),
    ):
        if names:
            raise UserError(
                f"the weights in {source} do not fit its config.json: {problem} {min(names)}"
                f" ({len(names)} in all); use a complete, unmodified model directory"
            )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"the weights in {source} do not fit its config.json: {name} has shape {list(tensor.shape)},"
                f" not {list(expected[name].shape)}; use a complete, unmodified model directory"
            )
    model.load_state_dict(dict(weights), assign=True)
    return model.eval().requires_grad_(False)


def hash_model(model: nn.Module, description: str) -> str:
    """SHA-256 (hex) of `description` and of a model's parameters: names, types, shapes and values."""
    digest = hashlib.sha256(description.encode() + b"\n")
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
