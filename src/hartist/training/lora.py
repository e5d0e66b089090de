"""Low-rank adaptation of a transformer with `peft`: train small matrices, ship plain weights"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hartist.errors import UserError
from hartist.transformer.model import ScaleTransformer

TARGETS = ["qkv", "proj", "gate", "up", "down", "fc1", "fc2", "context_embed", "word_embed"]
"""Attention, feed-forward layers and the two ways in; head and residual MLP stay as they are."""
BASE, DOWN, UP = ".base_layer", ".lora_A.", ".lora_B."


def add_adapters(transformer: ScaleTransformer, rank: int, seed: int = 0) -> None:
    """Freeze the weights and put adapters of this rank beside the target layers, in place.

    A new adapter changes nothing yet. Raises UserError without `peft`, or for a rank below 1.
    """
    if rank < 1:
        raise UserError(f"a rank of {rank} makes no adapter; choose 1 or more")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("low-rank adaptation needs peft: pip install 'hartist[train]'") from error
    torch.manual_seed(seed)
    transformer.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), transformer)


def has_adapters(transformer: nn.Module) -> bool:
    return any(BASE in name for name, _ in transformer.named_modules())


@torch.no_grad()
def merged(transformer: ScaleTransformer) -> ScaleTransformer:
    """A plain transformer that computes what this one does; itself, if it has no adapters."""
    if not has_adapters(transformer):
        return transformer
    weights = {}
    modules: dict[str, Any] = dict(transformer.named_modules())
    for name, tensor in transformer.state_dict().items():
        if DOWN in name or UP in name:
            continue
        if name.endswith(f"{BASE}.weight"):
            layer = name.removesuffix(f"{BASE}.weight")
            tensor = tensor + modules[layer].get_delta_weight("default").to(tensor.dtype)
        weights[name.replace(BASE, "")] = tensor
    with torch.device("meta"):
        plain = ScaleTransformer(transformer.config)
    plain.load_state_dict(weights, assign=True)
    plain.use_schedule(transformer.schedule)
    return plain.requires_grad_(False).eval()
