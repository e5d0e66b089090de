"""Conversion both ways: released weights and VAR's → our configurations and tensors, and back.

An export holds `model.safetensors` alone, never a pickled `ema_model.bin`: the weights given are the
weights written, and the authors' loader takes them where no EMA file lies beside.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hartist.checkpoint import WEIGHTS, write_safetensors
from hartist.config import TokenizerConfig, TransformerConfig
from hartist.errors import UserError
from hartist.files import atomic_directory, atomic_path, write_json
from hartist.interop.arguments import tokenizer_values, transformer_values
from hartist.interop.configs import HEAD_DIM
from hartist.interop.keys import to_released, tokenizer_rules, transformer_rules
from hartist.interop.release import TEXT_MODEL_NAMES, ReleasedModel, load_release
from hartist.interop.var import load_var
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.transformer.model import ScaleTransformer


@dataclass(frozen=True)
class ConvertedState:
    """Foreign weights in our form: configurations, and tensors under our names, as they were stored."""

    tokenizer_config: TokenizerConfig
    tokenizer: dict[str, Tensor]
    transformer_config: TransformerConfig
    transformer: dict[str, Tensor]
    text_encoder_path: Path | None


def release_to_state(directory: Path, text_model: Path | None = None, use_ema: bool = True) -> ConvertedState:
    """A released folder in our form; raises UserError as `load_release` does."""
    return _state(load_release(directory, text_model, dtype=None, use_ema=use_ema))


def var_to_state(var_pth: Path, vae_pth: Path | None = None) -> ConvertedState:
    """VAR's `.pth` files in our form; raises UserError as `load_var` does."""
    return _state(load_var(var_pth, vae_pth, dtype=None))


def _state(model: ReleasedModel) -> ConvertedState:
    return ConvertedState(
        model.tokenizer.config,
        model.tokenizer.state_dict(),
        model.transformer.config,
        model.transformer.state_dict(),
        model.text_encoder_path,
    )


# --------------------------------------------------------------------------- to the authors' layouts


def export_release(
    tokenizer: HybridTokenizer,
    transformer: ScaleTransformer,
    out_dir: Path,
    text_encoder_dir: Path | None = None,
) -> None:
    """Write `out_dir/llm` and `out_dir/tokenizer` as the authors' classes save them, all or nothing.

    `text_encoder_dir` is copied to `out_dir/text_model`. Raises UserError for what their layout cannot
    express, and if `out_dir` already holds something.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"{out_dir} already exists; choose a new or an empty folder to export to")
    if transformer.config.residual is None:
        raise UserError("a model without residual diffusion has no released form; export it as VAR's .pth files")
    values = {"llm": transformer_values(transformer.config), "tokenizer": tokenizer_values(tokenizer.config)}
    tensors = {
        "llm": released_transformer(transformer),
        "tokenizer": {f"vae.{key}": tensor for key, tensor in released_tokenizer(tokenizer).items()},
    }
    with atomic_directory(out_dir) as temporary:
        for name in ("llm", "tokenizer"):
            write_safetensors(temporary / name / WEIGHTS, tensors[name], {"format": "pt"})
            write_json(temporary / name / "config.json", values[name])
        if text_encoder_dir is not None:
            _copy(Path(text_encoder_dir), temporary / TEXT_MODEL_NAMES[0])


def export_var(tokenizer: HybridTokenizer, transformer: ScaleTransformer, var_pth: Path, vae_pth: Path) -> None:
    """Write a class model as VAR's two `.pth` files: plain dictionaries of tensors, each written atomically.

    Raises UserError for what such files, which hold no configuration, cannot express.
    """
    config, values = transformer.config, transformer_values(transformer.config)
    tokenizer_values(tokenizer.config)
    if config.condition != "class":
        raise UserError("a text model has no form in VAR's layout; export it in the released layout")
    unknowable = {
        "residual diffusion": config.residual is not None,
        "a sinusoidal step embedding": config.step_embedding != "table",
        "SwiGLU": config.mlp != "gelu",
        f"norm_eps {config.norm_eps}": config.norm_eps != 1e-6,
        f"heads of width {config.head_dim}": not config.l2_norm and config.head_dim != HEAD_DIM,
        f"phi ratio {tokenizer.config.phi_ratio}": abs(tokenizer.config.phi_ratio) != 0.5,
    }
    for what, present in unknowable.items():
        if present:
            raise UserError(f"{what} has no form in VAR's layout; export the model in the released layout")
    assert not values["use_cross_attn"]
    _write_pickled(var_pth, released_transformer(transformer))
    _write_pickled(vae_pth, released_tokenizer(tokenizer))


def released_transformer(transformer: ScaleTransformer) -> dict[str, Tensor]:
    """All tensors under the released names, the authors' buffers included."""
    config = transformer.config
    tensors = to_released(transformer.state_dict(), transformer_rules(config))
    weight = transformer.word_embed.weight
    for i in range(config.depth):
        tensors[f"blocks.{i}.attn.zero_k_bias"] = torch.zeros(config.width, dtype=weight.dtype)
    lengths = (config.prefix_tokens, *transformer.schedule.lengths[1:])
    level_T = torch.repeat_interleave(torch.tensor(lengths))
    allowed_TT = level_T[:, None] >= level_T[None, :]
    mask_TT = torch.zeros(allowed_TT.shape).masked_fill_(~allowed_TT, -torch.inf)
    return tensors | {"lvl_1L": level_T[None], "attn_bias_for_masking": mask_TT[None, None]}


def released_tokenizer(tokenizer: HybridTokenizer) -> dict[str, Tensor]:
    """All tensors under the released names without prefix, the usage statistics (zeros) included."""
    tensors = to_released(tokenizer.state_dict(), tokenizer_rules(tokenizer.config))
    usage = torch.zeros(len(tokenizer.schedule), tokenizer.config.vocab_size)
    return tensors | {"quantize.ema_vocab_hit_SV": usage}


def _write_pickled(path: Path, tensors: dict[str, Tensor]) -> None:
    # clones: a tensor that is a view would be saved with all of its storage
    plain: dict[str, Any] = {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}
    with atomic_path(Path(path)) as temporary:
        torch.save(plain, temporary)


def _copy(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise UserError(f"the text model {source} is not a directory; give one with config.json and weights")
    shutil.copytree(source, target)
