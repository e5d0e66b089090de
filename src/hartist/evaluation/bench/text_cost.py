"""What encoding one prompt takes: a given model's encoder, or the released one's sizes with random weights"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from hartist.evaluation.bench.hardware import Peak, peak, reset_peak
from hartist.evaluation.bench.macs import Macs, count_macs
from hartist.evaluation.bench.models import randomise
from hartist.evaluation.bench.timing import PROMPT, Seconds
from hartist.generation.devices import now
from hartist.text.encoder import TextEncoder
from hartist.text.qwen2 import QWEN2_NUM_TOKENS, Qwen2Encoder, released_instruction

RELEASED = {
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "rope_theta": 1e6,
}
"""Qwen2-VL's language model of the released HART: 1.5 B parameters."""


@dataclass(frozen=True)
class TextCost:
    """Encoding one prompt that no cache knows."""

    encoder: str
    seconds: Seconds
    macs: Macs
    memory: Peak | None
    """What an encoder of its own added; None for one that is part of a loaded model."""


def time_text(encoder: TextEncoder, device: torch.device, *, warmup: int, repeats: int) -> TextCost:
    """Encode the same prompt again and again. MACs are counted in a run of their own."""
    seconds = []
    for _ in range(warmup + repeats):
        start = now(device)
        encoder.encode([PROMPT])
        seconds.append(now(device) - start)
    macs = count_macs(lambda: encoder.encode([PROMPT]))
    return TextCost(type(encoder).__name__, Seconds(tuple(seconds[warmup:])), macs, None)


def time_released_text(
    dtype: torch.dtype, device: torch.device, *, warmup: int, repeats: int, sizes: Mapping[str, Any] | None = None
) -> TextCost:
    """The same of the released encoder, with random weights. Its memory is what it adds to the process."""
    reset_peak(device)
    before = peak(device)
    cost = time_text(random_qwen2(sizes or RELEASED, dtype, device), device, warmup=warmup, repeats=repeats)
    after = peak(device)
    on_device = None if after.device is None or before.device is None else after.device - before.device
    return TextCost(cost.encoder, cost.seconds, cost.macs, Peak(after.resident - before.resident, on_device))


def random_qwen2(sizes: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Qwen2Encoder:
    """A Qwen2 encoder with random weights behind the released instruction, whose words are its tokens."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2Model, Qwen2RotaryEmbedding

    config = Qwen2Config(**sizes, attn_implementation="sdpa")
    with torch.device("meta"):
        model = Qwen2Model(config)
    randomise(model, dtype, device)
    model.rotary_emb = Qwen2RotaryEmbedding(config=config).to(device)  # computed, not stored
    # Words and signs instead of the real tokenizer's pieces: about as many, of English.
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(QWEN2_NUM_TOKENS)
    return Qwen2Encoder(model, tokenizer, 1, QWEN2_NUM_TOKENS, released_instruction())
