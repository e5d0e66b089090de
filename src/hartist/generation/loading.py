"""Finding a model and telling its layout: ours, the released HART one, or VAR's files."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import torch

from hartist.checkpoint import read_weights
from hartist.errors import UserError, quoted
from hartist.files import read_json
from hartist.generation.checkpoint import LoadedModel, load_model
from hartist.generation.sampling import SamplingSettings
from hartist.tokenizer.checkpoint import load_tokenizer
from hartist.tokenizer.hybrid import HybridTokenizer

BUNDLED = Path(__file__).resolve().parent.parent / "bundled"
BUNDLED_NAME = "emoji"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_model(model: str | os.PathLike[str] | None) -> Path:
    """The local path of a model: a path, the name of a bundled one, or a Hub id (downloaded, cached).

    Raises UserError if there is no such model.
    """
    if model is None or str(model) == BUNDLED_NAME:
        path = BUNDLED / BUNDLED_NAME
        if not path.is_dir():
            raise UserError(f"the bundled model is missing from {path}; install Hartist again")
        return path
    path = Path(model)
    if str(model) and _exists(path):
        return path
    if HUB_ID.fullmatch(str(model)):
        return _download(str(model))
    raise UserError(
        f"no model {quoted(str(model))}: it is no folder here, not {BUNDLED_NAME!r} (bundled), "
        "and no Hub id like owner/name"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long, or a folder that may not be looked into
        return False


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.bin", "*.pth", "*.md"]
        return Path(snapshot_download(repo_id, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"no model {repo_id!r}: no folder of that name, and the Hub did not give it ({reason})"
        raise UserError(message) from error


def load_any(
    path: Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    text_model: Path | None = None,
    tokenizer: Path | None = None,
    use_ema: bool = True,
) -> LoadedModel:
    """Load a model of any layout we know; `dtype` None keeps what is stored.

    Raises UserError if it is none of them, or damaged.
    """
    if path.is_file():
        return _load_var(path, tokenizer, dtype)
    config = path / "config.json"
    if config.is_file():
        values = read_json(config)
        if isinstance(values, dict) and values.get("format") == "hartist-model":
            if text_model is not None:
                raise UserError(f"{path} has its own text model; leave {text_model} out")
            model = load_model(path, dtype)
            return model if tokenizer is None else with_tokenizer(model, load_tokenizer_of(tokenizer, dtype))
    if (path / "llm").is_dir():
        return _load_release(path, text_model, dtype, use_ema)
    raise UserError(
        f"{path} is not a model: neither Hartist's layout (config.json), nor the released one (llm/, tokenizer/), "
        "nor a VAR .pth"
    )


def with_tokenizer(model: LoadedModel, tokenizer: HybridTokenizer) -> LoadedModel:
    """The model with this decoder of its tokens, be it better or for larger pictures, in place of its own.

    Raises UserError if the tokens mean something else to it: scales, codes and φ must be the model's.
    """
    own = model.tokenizer.quantizer.state_dict()
    other = tokenizer.quantizer.state_dict()
    same = own.keys() == other.keys() and all(torch.equal(own[name].float(), other[name].float()) for name in own)
    if not same or tokenizer.schedule != model.tokenizer.schedule:
        raise UserError(
            f"this tokenizer's scales and codes are not those that {model.name!r} was trained on; take one that was "
            "trained from the model's with losses.frozen_encoder=true, or train a generator for it"
        )
    return replace(model, tokenizer=tokenizer)


def load_tokenizer_of(path: Path, dtype: torch.dtype | None = torch.float32) -> HybridTokenizer:
    """The tokenizer alone: of a model of any layout, of a tokenizer's own folder, or VAR's autoencoder .pth.

    `dtype` None keeps what is stored. Raises UserError if there is none, or it is damaged.
    """
    from hartist.interop.build import build_tokenizer
    from hartist.interop.pickled import read_pickled
    from hartist.interop.release import is_release, read_values

    if path.is_file():
        return build_tokenizer({}, read_pickled(path, ("trainer", "vae_local")), str(path), dtype)
    if is_release(path):
        folder = path / "tokenizer"
        return build_tokenizer(read_values(folder), read_weights(folder), str(folder), dtype)
    return load_tokenizer(path / "tokenizer" if (path / "tokenizer").is_dir() else path, dtype)


def _load_release(path: Path, text_model: Path | None, dtype: torch.dtype | None, use_ema: bool) -> LoadedModel:
    from hartist.interop.release import load_release
    from hartist.text.loading import load_text_encoder

    released = load_release(path, text_model=text_model, dtype=dtype, use_ema=use_ema)
    if released.transformer.config.condition == "class":
        return LoadedModel(released.tokenizer, released.transformer, None, name=path.resolve().name)
    if released.text_encoder_path is None:
        raise UserError(f"{path} has no text model beside llm/; name the Qwen2 folder with --text-model")
    encoder = load_text_encoder(
        released.text_encoder_path, num_tokens=released.transformer.config.context_tokens, dtype=dtype or torch.float32
    )
    if encoder.dim != released.transformer.config.context_dim:
        raise UserError(
            f"{released.text_encoder_path} gives states of width {encoder.dim}, the transformer expects "
            f"{released.transformer.config.context_dim}; pass the text model this release was trained with"
        )
    return LoadedModel(
        released.tokenizer,
        released.transformer,
        encoder,
        name=path.resolve().name,
        text_encoder_dir=released.text_encoder_path,
    )


def _load_var(path: Path, tokenizer: Path | None, dtype: torch.dtype | None) -> LoadedModel:
    from hartist.interop.var import load_var

    if tokenizer is None:
        # VAR's published autoencoder lies beside its transformers; the trainer's checkpoints hold their own.
        tokenizer = next(iter(sorted(path.parent.glob("vae*.pth"))), None)
    loaded = load_var(path, tokenizer, dtype=dtype)
    # VAR's own defaults: guidance 1.5 on ImageNet, all codes kept
    return LoadedModel(loaded.tokenizer, loaded.transformer, None, path.stem, SamplingSettings(guidance=1.5, top_k=0))
