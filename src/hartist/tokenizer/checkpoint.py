"""A tokenizer on disk: config.json and model.safetensors in one directory."""

from __future__ import annotations

from pathlib import Path

import torch

from hartist.checkpoint import (
    assign_weights,
    build_empty,
    read_component_config,
    read_weights,
    save_component,
)
from hartist.config import TokenizerConfig, from_dict
from hartist.tokenizer.hybrid import HybridTokenizer


def save_tokenizer(tokenizer: HybridTokenizer, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Write atomically; `dtype` stores floating-point weights in fewer bits."""
    save_component(directory, "tokenizer", tokenizer.config, tokenizer.state_dict(), dtype)


def load_tokenizer(directory: Path, dtype: torch.dtype | None = torch.float32) -> HybridTokenizer:
    """`dtype` None keeps what is stored. Raises UserError for a missing, damaged or foreign directory."""
    values = read_component_config(directory, "tokenizer")
    config = from_dict(TokenizerConfig, values, str(directory / "config.json"))
    tokenizer = build_empty(lambda: HybridTokenizer(config), str(directory / "config.json"))
    assign_weights(tokenizer, read_weights(directory, dtype), str(directory))
    return tokenizer
