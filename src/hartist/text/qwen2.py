"""The text encoder of the released weights: Qwen2's last hidden states, behind a fixed instruction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer
from torch import Tensor, nn

from hartist.errors import UserError
from hartist.files import read_json
from hartist.text.encoder import TextContext, context_from_states
from hartist.text.tokens import pad_rows, read_tokenizer, tokenize
from hartist.text.weights import build_with_weights, hash_file, hash_model, read_config, read_weights

QWEN2_NUM_TOKENS = 300
MODEL_TYPES = ("qwen2", "qwen2_vl", "qwen2_vl_text")

# Where a checkpoint may keep the language model's tensors: the longest prefix that fits is taken off.
_LANGUAGE_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
OTHER_PREFIXES = ("visual.", "model.visual.", "lm_head.", "model.lm_head.")

_SHARED_CONFIG_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
)


def released_instruction() -> str:
    """The text in front of every prompt that the released weights were trained with, to the letter."""
    return (resources.files("hartist.text") / "instruction.txt").read_bytes().decode("utf-8")


class Qwen2Encoder:
    """Prompts to the last hidden states (after the final norm) of a Qwen2 language model.

    Each prompt is padded on the right to `num_tokens`. The model reads `[instruction, prompt]`, and
    the states of the instruction are cut away: it only colours the prompt's. Padding is masked inside
    the model, yet the states at padding positions are part of the context: the transformer attends
    to them. One prompt is encoded at a time, so that its states do not depend on its company.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        pad_id: int,
        num_tokens: int = QWEN2_NUM_TOKENS,
        instruction: str | None = None,
        files_hash: str = "",
    ) -> None:
        """`tokenizer` cuts to `num_tokens` (see `read_tokenizer`); no `instruction` means none in front.

        `files_hash` enters the fingerprint for what else the states depend on: configuration, tokenizer.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.pad_id = pad_id
        self.instruction = instruction
        self._num_tokens = num_tokens
        # The authors cut the instruction to the same limit as the prompts.
        self._instruction_ids = tokenize(tokenizer, instruction).ids if instruction else []
        self._files_hash = files_hash
        self._fingerprint: str | None = None

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    @property
    def dim(self) -> int:
        return self.model.get_parameter("norm.weight").shape[0]

    def token_ids(self, prompts: Sequence[str]) -> Int[Tensor, "b s"]:
        """The ids of `prompts`, cut and padded on the right."""
        return pad_rows([tokenize(self.tokenizer, p) for p in prompts], self._num_tokens, self.pad_id)

    def encode(self, prompts: Sequence[str]) -> TextContext:
        """The context of `prompts` (at least one), on the model's device, in float32."""
        device = self.model.get_parameter("norm.weight").device
        ids_BS = self.token_ids(prompts).to(device)
        mask_BS = ids_BS != self.pad_id
        rows = [self._states(ids_BS[i : i + 1], mask_BS[i : i + 1]) for i in range(len(prompts))]
        return context_from_states(torch.cat(rows), mask_BS)

    def to(self, device: torch.device | str) -> Qwen2Encoder:
        """Compute there from now on."""
        self.model.to(device)
        return self

    def count_truncated_tokens(self, prompts: Sequence[str]) -> list[int]:
        return [tokenize(self.tokenizer, prompt).num_dropped for prompt in prompts]

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            settings = f"num_tokens={self._num_tokens} pad_id={self.pad_id} instruction={self.instruction!r}"
            self._fingerprint = hash_model(self.model, f"qwen2 {settings} {self._files_hash}")
        return self._fingerprint

    @torch.no_grad()  # not inference_mode: the states also go into training
    def _states(self, ids_BS: Int[Tensor, "b s"], mask_BS: Bool[Tensor, "b s"]) -> Float[Tensor, "b s c"]:
        prefix = torch.tensor([self._instruction_ids], dtype=torch.long, device=ids_BS.device)
        prefix_BI = prefix.expand(len(ids_BS), -1)
        attention_mask = torch.cat([torch.ones_like(prefix_BI), mask_BS.long()], dim=1)
        with torch.autocast(ids_BS.device.type, enabled=False):
            output = self.model(
                input_ids=torch.cat([prefix_BI, ids_BS], dim=1),
                attention_mask=attention_mask,
                use_cache=False,
            )
        return output.last_hidden_state[:, prefix_BI.shape[1] :].float()


def load_qwen2(
    directory: Path | str,
    *,
    num_tokens: int = QWEN2_NUM_TOKENS,
    use_instruction: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Qwen2Encoder:
    """Load a Qwen2 model, or the language model of a Qwen2-VL one, from local files alone.

    The directory holds `config.json`, `model.safetensors` (or its shards), `tokenizer.json` and
    `tokenizer_config.json`. `dtype` is that of the weights and of the arithmetic.
    Raises UserError that names the file at fault.
    """
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Model, Qwen2RotaryEmbedding

    directory = Path(directory)
    config_path, tokenizer_path = directory / "config.json", directory / "tokenizer.json"
    config = _language_config(read_config(directory), config_path)
    weights = {name: tensor.to(dtype) for name, tensor in _language_weights(read_weights(directory)).items()}
    model = build_with_weights(lambda: Qwen2Model(config), weights, directory)
    # Its frequencies are computed, not stored; in float32 whatever the weights are.
    model.rotary_emb = Qwen2RotaryEmbedding(config=config)
    tokenizer = read_tokenizer(tokenizer_path, num_tokens, config.vocab_size)
    return Qwen2Encoder(
        model.to(device),
        tokenizer,
        _pad_id(tokenizer, directory / "tokenizer_config.json"),
        num_tokens,
        released_instruction() if use_instruction else None,
        files_hash=hash_file(config_path) + hash_file(tokenizer_path),
    )


def _language_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The language model's tensors under Qwen2's own names; vision and the output layer are left out."""
    language = {}
    for name, tensor in weights.items():
        if not name.startswith(OTHER_PREFIXES):
            prefix = next(prefix for prefix in _LANGUAGE_PREFIXES if name.startswith(prefix))
            language[name.removeprefix(prefix)] = tensor
    return language


def _language_config(values: dict[str, Any], path: Path) -> Any:
    """A Qwen2Config from `config.json`, be it Qwen2's or Qwen2-VL's, flat or nested.

    Qwen2-VL's rotary embedding has three axes (time, height, width). For text alone all three count
    the same tokens, which makes it Qwen2's ordinary one.
    """
    from transformers.models.qwen2.configuration_qwen2 import Qwen2Config

    is_vision_language = values.get("model_type") != "qwen2"
    text = values.get("text_config") or values
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "mrope"):
        raise UserError(f"{path} asks for the rotary embedding {rope_type!r}; only the default one is supported")
    theta = rope.get("rope_theta", text.get("rope_theta", 1e6 if is_vision_language else 1e4))
    try:
        fields = {name: text[name] for name in _SHARED_CONFIG_FIELDS if name in text}
        # Given as a plain number: every version of the library understands that.
        return Qwen2Config(**fields, rope_theta=float(theta), attn_implementation="sdpa")
    except Exception as error:  # the library checks the types of the values in its own ways
        raise UserError(f"{path} is not a Qwen2 configuration ({error}); download it again") from error


def _pad_id(tokenizer: Tokenizer, path: Path) -> int:
    token = read_json(path).get("pad_token") if path.is_file() else None
    if isinstance(token, dict):
        token = token.get("content")
    token = token or "<|endoftext|>"
    pad_id = tokenizer.token_to_id(token)
    if pad_id is None:
        raise UserError(f"{path.parent} names {token!r} to pad with, which its tokenizer.json does not have")
    return pad_id
