"""A whole model on disk, in a layout that can be pushed to and loaded from the Hugging Face Hub.

MODEL/config.json                        names the format, the image size and where the parts are
MODEL/tokenizer/, MODEL/transformer/     config.json and model.safetensors each
MODEL/text_encoder/                      as the `transformers` library lays it out (text models only)
MODEL/README.md                          the model card
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hartist import config as configs
from hartist.checkpoint import (
    FORMAT_VERSION,
    assign_weights,
    build_empty,
    read_component_config,
    read_weights,
    save_component,
)
from hartist.config import TransformerConfig, from_dict
from hartist.errors import UserError, quoted
from hartist.files import atomic_directory, write_json
from hartist.generation.sampling import SamplingSettings
from hartist.text.encoder import TextEncoder
from hartist.text.loading import load_text_encoder
from hartist.tokenizer.checkpoint import load_tokenizer, save_tokenizer
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.transformer.model import ScaleTransformer


@dataclass(frozen=True)
class LoadedModel:
    """The parts of a pipeline."""

    tokenizer: HybridTokenizer
    transformer: ScaleTransformer
    text_encoder: TextEncoder | None
    name: str
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    """The sampling settings the model was tuned with."""
    text_encoder_dir: Path | None = None


def save_transformer(model: ScaleTransformer, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Write the transformer's config.json and model.safetensors; `dtype` stores weights in fewer bits."""
    save_component(directory, "transformer", model.config, model.state_dict(), dtype)


def load_transformer(directory: Path, dtype: torch.dtype | None = torch.float32) -> ScaleTransformer:
    """`dtype` None keeps what is stored. Raises UserError for a missing, damaged or foreign directory."""
    values = read_component_config(directory, "transformer")
    config = from_dict(TransformerConfig, values, str(directory / "config.json"))
    model = build_empty(lambda: ScaleTransformer(config), str(directory / "config.json"))
    assign_weights(model, read_weights(directory, dtype), str(directory))
    return model


def save_model(model: LoadedModel, directory: Path, dtype: torch.dtype | None = None, card: str | None = None) -> None:
    """Write a whole model, replacing `directory` in one rename."""
    with atomic_directory(directory) as temporary:
        save_tokenizer(model.tokenizer, temporary / "tokenizer", dtype)
        save_transformer(model.transformer, temporary / "transformer", dtype)
        if model.text_encoder_dir is not None:
            shutil.copytree(model.text_encoder_dir, temporary / "text_encoder")
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")
        write_model_config(temporary, model)


def write_model_config(directory: Path, model: LoadedModel) -> None:
    """Write MODEL/config.json."""
    tokens = model.text_encoder.num_tokens if model.text_encoder else None
    values: dict[str, Any] = {
        "format": "hartist-model",
        "version": FORMAT_VERSION,
        "name": model.name,
        "text_tokens": tokens,
        "sampling": configs.to_dict(model.settings),
    }
    write_json(directory / "config.json", values)


def load_model(directory: Path, dtype: torch.dtype | None = torch.float32) -> LoadedModel:
    """Load what `save_model` wrote; `dtype` None keeps what is stored.

    Raises UserError naming what is missing, damaged or foreign.
    """
    values = read_component_config(directory, "model")
    tokenizer = load_tokenizer(directory / "tokenizer", dtype)
    transformer = load_transformer(directory / "transformer", dtype)
    _check_fit(tokenizer, transformer, directory)
    encoder: TextEncoder | None = None
    text_dir = directory / "text_encoder"
    if transformer.config.condition == "text":
        encoder = load_text_encoder(text_dir, num_tokens=_text_tokens(values, transformer, directory))
        if encoder.dim != transformer.config.context_dim:
            raise UserError(
                f"{text_dir} gives states of width {encoder.dim}, "
                f"the transformer expects {transformer.config.context_dim}"
            )
    return LoadedModel(
        tokenizer,
        transformer,
        encoder,
        name=str(values.get("name") or directory.name),
        settings=from_dict(SamplingSettings, values.get("sampling") or {}, f"{directory}/config.json: sampling"),
        text_encoder_dir=text_dir if encoder else None,
    )


def _text_tokens(values: dict[str, Any], transformer: ScaleTransformer, directory: Path) -> int:
    expected = transformer.config.context_tokens
    tokens = values.get("text_tokens", expected)
    if tokens != expected:
        raise UserError(
            f"{directory / 'config.json'}: text_tokens is {quoted(tokens)}, "
            f"the transformer takes {expected}; correct it"
        )
    return expected


def _check_fit(tokenizer: HybridTokenizer, transformer: ScaleTransformer, directory: Path) -> None:
    for name in ("vocab_size", "latent_channels"):
        ours, theirs = getattr(tokenizer.config, name), getattr(transformer.config, name)
        if ours != theirs:
            raise UserError(
                f"{directory}: the tokenizer has {name} {ours}, the transformer {theirs}; they don't belong together"
            )
