"""Tiny models with random weights: complete, fast, and sensitive to everything a real one is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers.models.bert import BertConfig, BertModel

from hartist.config import ResidualConfig, TokenizerConfig, TransformerConfig
from hartist.generation.checkpoint import LoadedModel, save_model
from hartist.generation.sampling import SamplingSettings
from hartist.text.loading import load_text_encoder
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.transformer.model import ScaleTransformer

SIDES = (1, 2, 3, 4)
SIZE = 32
"""Pixels along a side of the images."""
NUM_CLASSES = 5
SETTINGS = SamplingSettings(guidance=3.0, top_k=20)
WORDS = ["a", "red", "green", "apple", "cat", "on", "table", "sleeping", "##s", ",", "3d", "flat", "word"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
TEXT_TOKENS = 12


def write_tiny_text_model(directory: Path, name: str = "tiny-text") -> Path:
    """A text-conditional model in Hartist's layout, with a tiny BERT that knows `WORDS`."""
    bert = write_tiny_bert(directory.parent / f"{directory.name}-bert")
    encoder = load_text_encoder(bert, num_tokens=TEXT_TOKENS)
    transformer = TransformerConfig(
        sides=SIDES,
        vocab_size=64,
        latent_channels=8,
        context_tokens=TEXT_TOKENS,
        context_dim=encoder.dim,
        width=32,
        depth=2,
        heads=4,
        rope="axial",
        residual=ResidualConfig(width=32, depth=2, steps=4, target_scale=0.3),
    )
    model = LoadedModel(tiny_tokenizer(), tiny_transformer(transformer), encoder, name, SETTINGS, text_encoder_dir=bert)
    save_model(model, directory)
    return directory


def write_tiny_class_model(directory: Path, name: str = "tiny-class") -> Path:
    """A class-conditional model (VAR's blocks plus residual MLP) in Hartist's layout, five classes."""
    save_model(LoadedModel(tiny_tokenizer(), tiny_transformer(class_config()), None, name, SETTINGS), directory)
    return directory


def class_config(residual: bool = True) -> TransformerConfig:
    """A class model in VAR's form, with or without the residual MLP."""
    return TransformerConfig(
        sides=SIDES,
        vocab_size=64,
        latent_channels=8,
        condition="class",
        num_classes=NUM_CLASSES,
        width=64,
        depth=1,
        heads=1,
        norm="layer",
        mlp="gelu",
        modulation="adaln",
        l2_norm=True,
        positions="absolute",
        step_embedding="table",
        context_norm=False,
        residual=ResidualConfig(width=32, depth=1, steps=4, target_scale=0.6) if residual else None,
    )


def tiny_tokenizer(stem: int = 4) -> HybridTokenizer:
    """32 px → 4×4×8. `stem=1` halves the pixels per cell and is what the authors' layout can express."""
    multipliers = (1, 1) if stem > 1 else (1, 1, 1, 1)
    config = TokenizerConfig(
        vocab_size=64,
        latent_channels=8,
        channels=32,
        channel_multipliers=multipliers,
        blocks_per_level=1 if stem > 1 else 2,
        stem=stem,
        sides=SIDES,
    )
    tokenizer = HybridTokenizer(config)
    fill_randomly(tokenizer, seed=1)
    return tokenizer.eval().requires_grad_(False)


def tiny_transformer(config: TransformerConfig) -> ScaleTransformer:
    transformer = ScaleTransformer(config)
    fill_randomly(transformer, seed=2)
    return transformer.eval().requires_grad_(False)


@torch.no_grad()
def fill_randomly(module: nn.Module, seed: int) -> None:
    """Weights of a size that keeps activations alive: no gate is zero, no output uniform."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            fan_in = math.prod(parameter.shape[1:])
            parameter.copy_(noise / math.sqrt(fan_in) if "codebook" not in name else noise * 0.5)
        elif name.endswith("weight"):
            parameter.copy_(1 + 0.1 * noise)
        else:
            parameter.copy_(0.1 * noise)
    if isinstance(module, ScaleTransformer):
        # what all cells share must not drown what tells them apart, or all tokens would be the same
        module.head.modulation.weight.mul_(0.2)


def write_tiny_bert(directory: Path) -> Path:
    """A random BERT with a WordPiece tokenizer, 24 wide."""
    directory.mkdir(parents=True)
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(directory / "tokenizer.json"))
    values = {
        "vocab_size": len(vocabulary),
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
    }
    (directory / "config.json").write_text(json.dumps({"model_type": "bert", **values}), encoding="utf-8")
    bert = BertModel(BertConfig(**values), add_pooling_layer=False)
    fill_randomly(bert, seed=3)
    save_file(bert.state_dict(), directory / "model.safetensors")
    return directory
