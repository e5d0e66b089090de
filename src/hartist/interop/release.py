"""Reading a released HART folder: `llm/`, `tokenizer/` and a text model beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hartist.checkpoint import INDEX, WEIGHTS, read_weights
from hartist.errors import UserError
from hartist.files import read_json
from hartist.interop.build import build_tokenizer, build_transformer
from hartist.interop.pickled import read_pickled
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.transformer.model import ScaleTransformer

EMA_WEIGHTS = "ema_model.bin"
PICKLED_WEIGHTS = "pytorch_model.bin"
TEXT_MODEL_NAMES = ("text_model", "Qwen2-VL-1.5B-Instruct")


@dataclass(frozen=True)
class ReleasedModel:
    """Our networks with released weights, in eval mode."""

    tokenizer: HybridTokenizer
    transformer: ScaleTransformer
    text_encoder_path: Path | None
    """Folder of the text model; None if none was given and none lies beside the weights."""
    ema: bool
    """Whether the transformer has the EMA weights."""


def is_release(directory: Path) -> bool:
    """Whether a folder has the released layout."""
    return all((Path(directory) / name / "config.json").is_file() for name in ("llm", "tokenizer"))


def load_release(
    directory: Path,
    text_model: Path | None = None,
    dtype: torch.dtype | None = torch.float32,
    use_ema: bool = True,
) -> ReleasedModel:
    """Load `directory/llm` and `directory/tokenizer`.

    The EMA weights, `ema_model.bin`, replace the plain ones where they exist. `text_model` defaults to
    a folder of a usual name beside them; `dtype` None keeps what is stored. Raises UserError that names
    the file and the key for anything missing, extra, misshapen, damaged or not supported.
    """
    directory = Path(directory)
    for name in ("llm", "tokenizer"):
        if not (directory / name).is_dir():
            raise UserError(f"{directory} has no folder {name!r}; give the folder that holds llm/ and tokenizer/")
    folder = directory / "tokenizer"
    transformer_values = read_values(directory / "llm")
    values = _with_schedule(read_values(folder), transformer_values.get("patch_nums"))
    tokenizer = build_tokenizer(values, read_weights(folder), str(folder), dtype)
    folder = directory / "llm"
    ema = use_ema and (folder / EMA_WEIGHTS).is_file()
    tensors, where = _transformer_weights(folder, ema)
    transformer = build_transformer(transformer_values, tensors, tokenizer.config, str(where), dtype)
    return ReleasedModel(tokenizer, transformer, _text_model(directory, text_model), ema)


def read_values(folder: Path) -> dict[str, Any]:
    """The authors' constructor arguments in `folder/config.json`."""
    values = read_json(folder / "config.json")
    if not isinstance(values, dict):
        raise UserError(f"{folder / 'config.json'} is not a model configuration; download it again")
    return values


def _with_schedule(values: dict[str, Any], sides: Any) -> dict[str, Any]:
    """The tokenizer's arguments with the transformer's scales: one tokenizer serves several resolutions."""
    own = values.get("v_patch_nums")
    if not isinstance(sides, list) or own == sides:
        return values
    changed = {**values, "v_patch_nums": sides}
    if values.get("share_quant_resi") == 0 and isinstance(own, list):  # as many φ as its own scales
        changed["default_qresi_counts"] = values.get("default_qresi_counts") or len(own)
    return changed


def _transformer_weights(folder: Path, ema: bool) -> tuple[dict[str, Tensor], Path]:
    """Tensors as stored, mapped into memory where the file allows, and the file they come from."""
    if ema:
        return read_pickled(folder / EMA_WEIGHTS), folder / EMA_WEIGHTS
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return read_weights(folder), folder
    if (folder / PICKLED_WEIGHTS).is_file():
        return read_pickled(folder / PICKLED_WEIGHTS), folder / PICKLED_WEIGHTS
    raise UserError(f"{folder} has neither {WEIGHTS} nor {PICKLED_WEIGHTS}; download the weights again")


def _text_model(directory: Path, given: Path | None) -> Path | None:
    if given is not None:
        if not Path(given).is_dir():
            raise UserError(f"the text model {given} is not a directory; give one with config.json and weights")
        return Path(given)
    return next((directory / name for name in TEXT_MODEL_NAMES if (directory / name).is_dir()), None)
