"""From released tensors and the authors' arguments to our networks, checked key by key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hartist.checkpoint import assign_weights, check_keys, without_storage
from hartist.config import TokenizerConfig
from hartist.interop.configs import tokenizer_config, transformer_config
from hartist.interop.keys import (
    TOKENIZER_ANCHOR,
    TRANSFORMER_ANCHOR,
    Rule,
    Unwrapped,
    released_names,
    to_ours,
    tokenizer_rules,
    transformer_rules,
    unwrap,
)
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.tokenizer.quantizer import Quantizer
from hartist.transformer.model import ScaleTransformer

Module = TypeVar("Module", bound=nn.Module)


def build_tokenizer(
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    where: str,
    dtype: torch.dtype | None = torch.float32,
) -> HybridTokenizer:
    """Raises UserError, naming the file's own key, for anything missing, extra or misshapen."""
    unwrapped = unwrap(tensors, TOKENIZER_ANCHOR, where)
    config = tokenizer_config(values, unwrapped.tensors, where)
    return fill(lambda: HybridTokenizer(config), unwrapped, tokenizer_rules(config), where, dtype)


def build_quantizer(
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    where: str,
    dtype: torch.dtype | None = torch.float32,
) -> Quantizer:
    """The quantizer alone, from a file without autoencoder; strict as `build_tokenizer`."""
    unwrapped = unwrap(tensors, TOKENIZER_ANCHOR, where)
    config = tokenizer_config(values, unwrapped.tensors, where)
    holder = fill(lambda: _QuantizerHolder(config), unwrapped, tokenizer_rules(config), where, dtype)
    return holder.quantizer


class _QuantizerHolder(nn.Module):
    """Gives the quantizer the names it has inside a tokenizer."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.quantizer = Quantizer(config)


def build_transformer(
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tokenizer: TokenizerConfig,
    where: str,
    dtype: torch.dtype | None = torch.float32,
) -> ScaleTransformer:
    """Raises UserError, naming the file's own key, for anything missing, extra or misshapen."""
    unwrapped = unwrap(tensors, TRANSFORMER_ANCHOR, where)
    config = transformer_config(values, unwrapped.buffers | unwrapped.tensors, tokenizer, where)
    return fill(lambda: ScaleTransformer(config), unwrapped, transformer_rules(config), where, dtype)


def fill(
    build: Callable[[], Module],
    unwrapped: Unwrapped,
    rules: tuple[Rule, ...],
    where: str,
    dtype: torch.dtype | None,
) -> Module:
    """Build on the meta device and assign the tensors, in eval mode: memory holds the weights once."""
    with without_storage():
        module = build()
    ours = module.state_dict()
    expected = {
        unwrapped.prefix + name.key: ours[key].reshape(name.released_shape(ours[key].shape))
        for key, name in released_names(ours, rules).items()
    }
    present = {unwrapped.file_keys[key]: tensor for key, tensor in unwrapped.tensors.items()}
    check_keys(expected, present, where)
    renamed = to_ours(unwrapped.tensors, ours, rules)
    assign_weights(module, {key: convert(tensor, dtype) for key, tensor in renamed.items()}, where)
    return module


def convert(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`dtype` None keeps what is stored."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
