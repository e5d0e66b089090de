"""Presets: the published sizes, key by key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hartist.config import TokenizerConfig, TransformerConfig
from hartist.interop.convert import released_tokenizer
from hartist.interop.keys import (
    IGNORED_BUFFERS,
    is_ignored,
    released_names,
    to_released,
    tokenizer_rules,
    transformer_rules,
)
from hartist.presets import PRESETS, hart_256, hart_512, hart_1024, hart_class, var_class
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.transformer.model import ScaleTransformer

PARITY = Path(__file__).parent / "parity"


def meta_transformer(config: TransformerConfig) -> ScaleTransformer:
    with torch.device("meta"):
        return ScaleTransformer(config)


def meta_tokenizer(config: TokenizerConfig) -> HybridTokenizer:
    with torch.device("meta"):
        return HybridTokenizer(config)


def millions(tensors: dict[str, Tensor]) -> float:
    return sum(tensor.numel() for tensor in tensors.values()) / 1e6


def shapes(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in tensors.items()}


def listed(name: str) -> dict[str, list[int]]:
    return json.loads((PARITY / name).read_text())


@pytest.mark.parametrize("preset", [hart_256, hart_512, hart_1024])
def test_the_text_models_have_the_papers_sizes(preset) -> None:
    tokenizer, transformer = preset()
    state = meta_transformer(transformer).state_dict()
    assert millions(state) == pytest.approx(732.62, abs=0.005)
    mlp = {key: tensor for key, tensor in state.items() if key.startswith("residual_mlp.")}
    assert millions(mlp) == pytest.approx(36.59, abs=0.005)
    assert millions(meta_tokenizer(tokenizer).state_dict()) == pytest.approx(108.95, abs=0.005)


def test_the_released_transformer_has_exactly_the_listed_keys() -> None:
    _, config = hart_1024()
    expected = listed("release_transformer_keys.json")
    state = to_released(meta_transformer(config).state_dict(), transformer_rules(config))
    assert shapes(state) == {key: shape for key, shape in expected.items() if not is_ignored(key)}
    tokens = config.context_tokens + config.schedule.num_tokens - 1
    assert expected["lvl_1L"] == [1, tokens]


def test_the_released_tokenizer_has_exactly_the_listed_keys() -> None:
    config, _ = hart_1024()
    tokenizer = meta_tokenizer(config)
    assert shapes(released_tokenizer(tokenizer)) == listed("release_tokenizer_keys.json")
    state = to_released(tokenizer.state_dict(), tokenizer_rules(config))
    assert set(listed("release_tokenizer_keys.json")) - set(state) == {"quantize.ema_vocab_hit_SV"}


def test_var_has_its_published_sizes() -> None:
    """310 M, 600 M, 1.0 B and 2.0 B parameters (VAR, table 1)."""
    for depth, size in [(16, 310), (20, 601), (24, 1033), (30, 2010)]:
        _, config = var_class(depth)
        assert millions(meta_transformer(config).state_dict()) == pytest.approx(size, abs=1)
        assert (config.width, config.heads, config.residual) == (64 * depth, depth, None)


def test_class_hart_is_var_with_the_residual_mlp() -> None:
    for depth in (16, 20, 24, 30):
        var = meta_transformer(var_class(depth)[1]).state_dict()
        hart = meta_transformer(hart_class(depth)[1]).state_dict()
        assert set(hart) - set(var) == {key for key in hart if key.startswith("residual_")}
        assert shapes(var).items() <= shapes(hart).items()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_together_and_has_a_released_form(name: str) -> None:
    tokenizer, transformer = PRESETS[name]()
    assert tokenizer.sides == transformer.sides
    assert tokenizer.vocab_size == transformer.vocab_size
    state = meta_transformer(transformer).state_dict()
    names = {found.key for found in released_names(state, transformer_rules(transformer)).values()}
    assert len(names) == len(state)
    assert not {key.rpartition(".")[2] for key in names} & IGNORED_BUFFERS
