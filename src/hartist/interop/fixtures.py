"""What a check set holds: weights of some form, inputs, and expected outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hartist.checkpoint import read_safetensors
from hartist.errors import UserError
from hartist.files import read_json
from hartist.interop.build import build_quantizer, build_tokenizer, build_transformer
from hartist.interop.configs import tokenizer_config
from hartist.interop.keys import TOKENIZER_ANCHOR, unwrap
from hartist.interop.release import load_release
from hartist.text.encoder import TextEncoder
from hartist.text.loading import load_text_encoder
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.tokenizer.quantizer import Quantizer
from hartist.transformer.model import ScaleTransformer

GUIDANCE_TEXT, GUIDANCE_CLASS, GUIDANCE_RELEASE = 3.0, 1.5, 4.5


class Fixture:
    """The expected file's tensors; remembers which were read as inputs."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.used: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def has(self, *keys: str) -> bool:
        return all(key in self.tensors for key in keys)

    def wants(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.tensors)

    def read(self, key: str) -> Tensor:
        """One input; integers become int64, which everything here counts in."""
        self.used.add(key)
        tensor = self.tensors[key]
        return tensor if tensor.is_floating_point() else tensor.long()

    def read_list(self, prefix: str) -> list[Tensor]:
        """`prefix.0`, `prefix.1`, … as far as they go."""
        tensors: list[Tensor] = []
        while f"{prefix}.{len(tensors)}" in self.tensors:
            tensors.append(self.read(f"{prefix}.{len(tensors)}"))
        return tensors


@dataclass(frozen=True)
class Subject:
    """The networks of a check set."""

    quantizer: Quantizer
    tokenizer: HybridTokenizer | None
    """None if the set has only the quantizer's weights."""
    transformer: ScaleTransformer
    guidance: float
    prompts: tuple[str, ...] = ()
    text_encoder: TextEncoder | None = None
    plain_text_encoder: TextEncoder | None = None
    """The same without the instruction in front."""
    settings: dict[str, Any] = field(default_factory=dict)


def load_subject(directory: Path) -> Subject:
    """A released layout (`llm/`, `tokenizer/`, `text_model/`) or a set with one config.json for both."""
    return _load_release(directory) if (directory / "llm").is_dir() else _load_set(directory)


def _load_release(directory: Path) -> Subject:
    model = load_release(directory, dtype=torch.float32)
    prompts: tuple[str, ...] = ()
    if (directory / "prompts.json").is_file():
        prompts = _prompts(directory / "prompts.json")
    tokens = model.transformer.config.context_tokens
    encoder = plain = None
    if prompts and model.text_encoder_path is not None:
        encoder = load_text_encoder(model.text_encoder_path, num_tokens=tokens)
        plain = load_text_encoder(model.text_encoder_path, num_tokens=tokens, use_instruction=False)
    return Subject(
        quantizer=model.tokenizer.quantizer,
        tokenizer=model.tokenizer,
        transformer=model.transformer,
        guidance=_guidance(directory, GUIDANCE_RELEASE),
        prompts=prompts,
        text_encoder=encoder,
        plain_text_encoder=plain,
    )


def _load_set(directory: Path) -> Subject:
    path = directory / "config.json"
    values = read_json(path)
    if not isinstance(values, dict) or not all(isinstance(values.get(n), dict) for n in ("tokenizer", "transformer")):
        raise UserError(f"{path} has no entries 'tokenizer' and 'transformer'; give a folder of a check set")
    source = directory / "tokenizer.safetensors"
    tensors = read_safetensors(source)
    plain = unwrap(tensors, TOKENIZER_ANCHOR, str(source)).tensors
    tokenizer = None
    if any(key.startswith(("encoder.", "decoder.")) for key in plain):
        tokenizer = build_tokenizer(values["tokenizer"], tensors, str(source))
        quantizer = tokenizer.quantizer
    else:
        quantizer = build_quantizer(values["tokenizer"], tensors, str(source))
    config = tokenizer_config(values["tokenizer"], plain, str(path))
    source = directory / "transformer.safetensors"
    transformer = build_transformer(values["transformer"], read_safetensors(source), config, str(source))
    text = transformer.config.condition == "text"
    return Subject(
        quantizer=quantizer,
        tokenizer=tokenizer,
        transformer=transformer,
        guidance=_guidance(directory, GUIDANCE_TEXT if text else GUIDANCE_CLASS),
    )


def _guidance(directory: Path, default: float) -> float:
    """The set's own `cfg`, where its config.json gives one."""
    path = directory / "config.json"
    values = read_json(path) if path.is_file() else {}
    value = values.get("cfg", default) if isinstance(values, dict) else default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{path}: cfg is {value!r}; it must be a number")
    return float(value)


def _prompts(path: Path) -> tuple[str, ...]:
    values = read_json(path)
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise UserError(f"{path} is not a list of prompts")
    return tuple(values)
