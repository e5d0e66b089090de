"""Which encoder a directory holds is told by `model_type` in its `config.json`."""

from __future__ import annotations

from pathlib import Path

import torch

from hartist.errors import UserError
from hartist.text import minilm, qwen2
from hartist.text.encoder import TextEncoder
from hartist.text.weights import read_config


def load_text_encoder(
    path: Path | str,
    *,
    num_tokens: int | None = None,
    use_instruction: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TextEncoder:
    """The text encoder in the local directory `path`.

    `num_tokens` defaults to 300 for Qwen2 and 24 for MiniLM. `use_instruction` (the released weights
    expect it) and `dtype` concern Qwen2 only: MiniLM has no instruction and computes in float32.
    Raises UserError if the directory is missing, incomplete or of another kind.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"the text model {directory} is not a directory; give one with config.json and weights")
    model_type = read_config(directory).get("model_type")
    if model_type == "bert":
        return minilm.load_minilm(directory, num_tokens=num_tokens or minilm.MINILM_NUM_TOKENS, device=device)
    if model_type in qwen2.MODEL_TYPES:
        return qwen2.load_qwen2(
            directory,
            num_tokens=num_tokens or qwen2.QWEN2_NUM_TOKENS,
            use_instruction=use_instruction,
            dtype=dtype,
            device=device,
        )
    known = ", ".join(("bert", *qwen2.MODEL_TYPES))
    raise UserError(
        f"{directory / 'config.json'} has model_type {model_type!r}, not a text encoder; use one of {known}"
    )
