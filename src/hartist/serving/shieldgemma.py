"""ShieldGemma as a prompt filter: a language model that answers whether a prompt breaks a principle

The score is what the model gives to "Yes" against "No" as its next token, as in the demo of HART's authors, who block
above 0.5 with google/shieldgemma-2b.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from hartist.errors import UserError
from hartist.generation.devices import choose_device
from hartist.serving.tickets import QueueFull

MODEL = "google/shieldgemma-2b"
THRESHOLD = 0.5
MAX_WAITING = 64
"""Prompts; more are refused with 429."""
PRINCIPLES = (
    '"No Sexually Explicit Information": The prompt may not ask for a picture of sexual acts or of nudity meant to '
    "arouse, and nothing sexual about children. Works of art, medicine and sex education are allowed.",
    '"No Dangerous Content": The prompt may not ask for a picture of graphic gore, of suicide or self-harm, or for one '
    "that promotes terrorism or teaches how to make weapons.",
    '"No Hate Speech": The prompt may not ask for a picture that demeans people or calls for violence against them for '
    "their race, ethnicity, religion, disability, age, nationality, sexual orientation or gender.",
    '"No Harassment": The prompt may not ask for a picture that threatens, humiliates or bullies a particular person.',
)
"""One at a time, under the names of the four harms the model was trained to tell apart; the wording is Hartist's."""


class ShieldGemmaFilter:
    """Asks the model once a principle, in a thread of its own: one prompt after another."""

    def __init__(self, model: Any, tokenizer: Any, threshold: float = THRESHOLD) -> None:
        """A transformers model for causal language, and its tokenizer with ShieldGemma's chat template.

        Raises UserError if the tokenizer can't be one of ShieldGemma's.
        """
        self.model, self.tokenizer, self.threshold = model, tokenizer, threshold
        vocabulary = tokenizer.get_vocab()
        if "Yes" not in vocabulary or "No" not in vocabulary or not tokenizer.chat_template:
            raise UserError("the prompt filter's tokenizer lacks Yes, No or a chat template; give a ShieldGemma model")
        self._answers = [vocabulary["Yes"], vocabulary["No"]]
        self._controls = [*tokenizer.all_special_tokens, "<start_of_turn>", "<end_of_turn>"]
        self._thread = ThreadPoolExecutor(1, "hartist-shieldgemma")
        self._waiting = 0

    async def allows(self, prompt: str) -> bool:
        """Whether no principle's score is above the threshold. Raises QueueFull if too many prompts wait."""
        if self._waiting >= MAX_WAITING:
            raise QueueFull(retry_after=10)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._check, prompt)
        finally:
            self._waiting -= 1

    def _check(self, prompt: str) -> bool:
        return all(self.score(prompt, principle) <= self.threshold for principle in PRINCIPLES)

    @torch.inference_mode()
    def score(self, prompt: str, principle: str) -> float:
        """How probable it is that a prompt breaks a principle: softmax over the logits of "Yes" and "No"."""
        for control in self._controls:
            prompt = prompt.replace(control, " ")  # or a prompt could end its turn and go on as the question
        inputs = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.strip()}], guideline=principle, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        logits_V = self.model(**inputs, logits_to_keep=1).logits[0, -1]
        return float(logits_V[self._answers].float().softmax(0)[0])


def load_shieldgemma(model: str = MODEL, device: str | None = None) -> ShieldGemmaFilter:
    """A ShieldGemma model from a folder or the Hugging Face Hub, in bfloat16.

    Raises UserError if it can't be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = choose_device(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        network = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=torch.bfloat16,
            attn_implementation="eager",  # fused attention leaves out the soft cap of Gemma 2's logits
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the prompt filter's model {model} cannot be loaded ({reason}); give its folder with --shieldgemma"
        ) from error
    return ShieldGemmaFilter(network.to(place).eval(), tokenizer)
