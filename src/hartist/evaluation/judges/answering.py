"""Answers to questions about pictures by models of the transformers library: BLIP, which writes, ViLT, which chooses

DPG-Bench's own judge, mPLUG-large, is not among them: its figures are not comparable with those of another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from hartist.errors import UserError
from hartist.evaluation.hub import load_image_processor, load_part, load_pretrained

DEFAULT = "Salesforce/blip-vqa-base"
KINDS = ("blip", "vilt")
QUESTIONS = 16
"""At once."""
MAX_ANSWER = 10
"""Tokens."""


@dataclass(frozen=True)
class TransformersAnswerer:
    """A model for visual question answering with its image processor and tokenizer."""

    name: str
    network: Any
    processor: Any
    tokenizer: Any

    @torch.inference_mode()
    def answer(self, picture_HW3: UInt8[Tensor, "h w 3"], questions: Sequence[str]) -> list[str]:
        prepared = self.processor(
            images=[picture_HW3.cpu().numpy()], return_tensors="pt", input_data_format="channels_last"
        )
        pixels = {key: value.to(self.network.device) for key, value in prepared.items()}
        config = self.network.config
        longest = getattr(config, "text_config", config).max_position_embeddings
        answers: list[str] = []
        for start in range(0, len(questions), QUESTIONS):
            some = list(questions[start : start + QUESTIONS])
            tokens = self.tokenizer(some, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(
                self.network.device
            )
            inputs = {key: value.expand(len(some), *value.shape[1:]) for key, value in pixels.items()}
            inputs |= {key: tokens[key] for key in ("input_ids", "attention_mask")}
            if hasattr(self.network, "generate"):
                ids = self.network.generate(**inputs, max_new_tokens=MAX_ANSWER, num_beams=1, do_sample=False)
                answers += self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            else:
                chosen = self.network(**inputs).logits.argmax(1).tolist()
                answers += [config.id2label[i] for i in chosen]
        return [answer.strip() for answer in answers]


def load_answerer(source: str | Path = DEFAULT, device: torch.device | str = "cpu") -> TransformersAnswerer:
    """A model that answers, from a folder or a repository's name.

    Raises UserError with the command that gets it if it is absent, and for other kinds of models.
    """
    import transformers

    what = f"the question answerer {source}"
    config = load_part(transformers.AutoConfig, source, what)
    if config.model_type not in KINDS:
        raise UserError(f"{what} is a {config.model_type}, not one of {', '.join(KINDS)}; give one such as {DEFAULT}")
    blip = config.model_type == "blip"
    kind = transformers.BlipForQuestionAnswering if blip else transformers.ViltForQuestionAnswering
    return TransformersAnswerer(
        Path(source).name,
        load_pretrained(kind, source, what).to(device),
        load_image_processor(source, what),
        load_part(transformers.AutoTokenizer, source, what),
    )
