"""The authors' constructor arguments ↔ our configurations; what a config leaves open, the keys tell.

Where config and keys disagree about the modulation, the keys decide.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hartist.config import ResidualConfig, TokenizerConfig, TransformerConfig
from hartist.errors import UserError
from hartist.scales import SIDES_256, SIDES_512, SIDES_1024

Values = Mapping[str, Any]
Tensors = Mapping[str, Tensor]

SCHEDULES = (SIDES_256, SIDES_512, SIDES_1024)
BLOCKS_PER_LEVEL = 2
"""Fixed in the authors' code."""


# --------------------------------------------------------------------------- tokenizer


def tokenizer_config(values: Values, tensors: Tensors, where: str) -> TokenizerConfig:
    """From the authors' arguments; `tensors` (plain released names) fill in what they don't say.

    Raises UserError for variants that no published weights use.
    """
    _refuse(values, where, using_znorm=(False, None), double_decoder=(False, None))
    kind = values.get("quantizer_type", "var")
    if kind not in ("var", "var_hybrid"):
        raise UserError(f"{where}: quantizer_type {kind!r} is not supported; use 'var' or 'var_hybrid'")
    codebook = tensors.get("quantize.embedding.weight")
    channels = _number(values, "ch", where, _size(tensors, "encoder.conv_in.weight", 0, 160))
    phi_sharing, phi_count = _phi_from_keys(tensors)
    return TokenizerConfig(
        vocab_size=_number(values, "vocab_size", where, 4096 if codebook is None else codebook.shape[0]),
        latent_channels=_number(values, "z_channels", where, 32 if codebook is None else codebook.shape[1]),
        channels=channels,
        channel_multipliers=_numbers(values, "ch_mult", where, _multipliers_from_keys(tensors, channels)),
        blocks_per_level=BLOCKS_PER_LEVEL,
        sides=_numbers(values, "v_patch_nums", where, SIDES_256),
        phi_ratio=_real(values, "quant_resi", where, 0.5),
        phi_sharing=_number(values, "share_quant_resi", where, phi_sharing, minimum=0),
        phi_per_scale_count=_number(values, "default_qresi_counts", where, phi_count, minimum=0),
        beta=_real(values, "beta", where, 0.25),
        quant_conv_kernel=_number(values, "quant_conv_ks", where, _size(tensors, "quant_conv.weight", 2, 3)),
    )


def tokenizer_values(config: TokenizerConfig) -> dict[str, Any]:
    """The authors' arguments for `config`; raises UserError for what they cannot express."""
    if config.stem != 1:
        raise UserError(f"a tokenizer with stem {config.stem} has no released form; only stem 1 can be exported")
    if config.blocks_per_level != BLOCKS_PER_LEVEL:
        raise UserError(
            f"a tokenizer with {config.blocks_per_level} blocks a level has no released form; only 2 can be exported"
        )
    return {
        "model_type": "hart_autoencoder_with_disc",
        "vocab_size": config.vocab_size,
        "z_channels": config.latent_channels,
        "ch": config.channels,
        "ch_mult": list(config.channel_multipliers),
        "v_patch_nums": list(config.sides),
        "quant_resi": config.phi_ratio,
        "share_quant_resi": config.phi_sharing,
        "default_qresi_counts": config.phi_per_scale_count,
        "beta": config.beta,
        "quant_conv_ks": config.quant_conv_kernel,
        "using_znorm": False,
        "double_decoder": False,
        "quantizer_type": "var_hybrid",
    }


def _phi_from_keys(tensors: Tensors) -> tuple[int, int]:
    """`share_quant_resi` and `default_qresi_counts` as the names of the φ convolutions tell them."""
    shared = _count(tensors, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.weight")
    per_scale = _count(tensors, r"quantize\.quant_resi\.(\d+)\.weight")
    if per_scale:
        return 0, per_scale
    if "quantize.quant_resi.qresi.weight" in tensors:
        return 1, 0
    return shared or 4, 0


def _multipliers_from_keys(tensors: Tensors, channels: int) -> tuple[int, ...]:
    levels = _count(tensors, r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
    widths = [_size(tensors, f"encoder.down.{i}.block.0.conv1.weight", 0, channels) for i in range(levels)]
    return tuple(width // channels for width in widths) or (1, 1, 2, 2, 4)


# --------------------------------------------------------------------------- transformer


def transformer_config(
    values: Values, tensors: Tensors, tokenizer: TokenizerConfig, where: str
) -> TransformerConfig:
    """From the authors' arguments; vocabulary and latent channels are the tokenizer's.

    Raises UserError for variants that no published weights use.
    """
    _refuse(values, where, use_cross_attn=(False, None), sampler=("iddpm", None))
    text = _is_text(values, tensors)
    width = _number(values, "embed_dim", where, _size(tensors, "word_embed.weight", 0, 1024))
    rope = _choice(values, "attn_type", where, "qkv_proj" if _any(tensors, r"\.attn\.qkv_proj\.") else "mat_qkv")
    swiglu = _choice(values, "mlp_type", where, "gate" if _any(tensors, r"\.ffn\.gate_proj\.") else "fc")
    residual = text or _any(tensors, r"^diffloss\.")
    heads_default = _size(tensors, "blocks.0.attn.scale_mul_1H11", 1, max(1, width // 64))
    sinusoidal = bool(values.get("use_timestep_embed", "lvl_embed.mlp.0.weight" in tensors))
    prefix_default = _size(tensors, "pos_start", 1, 77)
    return TransformerConfig(
        sides=_numbers(values, "patch_nums", where, _sides_from_keys(tensors, text, where)),
        vocab_size=tokenizer.vocab_size,
        latent_channels=tokenizer.latent_channels,
        condition="text" if text else "class",
        context_tokens=_number(values, "context_token", where, prefix_default) if text else 300,
        context_dim=_number(values, "context_dim", where, _size(tensors, "context_embed.weight", 1, 768)),
        num_classes=_number(values, "num_classes", where, _size(tensors, "class_emb.weight", 0, 1001) - 1),
        width=width,
        depth=_number(values, "depth", where, _count(tensors, r"blocks\.(\d+)\.attn\.proj\.weight") or 16),
        heads=_number(values, "num_heads", where, heads_default),
        norm="rms" if rope else "layer",
        norm_eps=_real(values, "norm_eps", where, 1e-6),
        mlp="swiglu" if swiglu else "gelu",
        mlp_ratio=_real(values, "mlp_ratio", where, 4.0),
        modulation=_modulation(values, tensors, text),  # type: ignore[arg-type]
        pooling=_pooling(values, where),  # type: ignore[arg-type]
        l2_norm=bool(values.get("attn_l2_norm", _any(tensors, r"\.attn\.scale_mul_1H11$"))),
        positions="rope" if rope else "absolute",
        rope="released",
        step_embedding="sinusoidal" if sinusoidal else "table",
        context_norm=text and bool(values.get("use_context_norm", "context_norm.weight" in tensors)),
        context_norm_scale=_real(values, "context_norm_scale", where, 1.0),
        residual=_residual(values, tensors, where) if residual else None,
    )


def transformer_values(config: TransformerConfig) -> dict[str, Any]:
    """The authors' arguments for `config`; raises UserError for what they cannot express."""
    rope = config.positions == "rope"
    if rope and config.rope != "released":
        raise UserError("rope='axial' has no released form; only rope='released' can be exported")
    if (config.norm == "rms") != rope:
        raise UserError("the released form ties RMSNorm to RoPE and LayerNorm to absolute positions; neither is mixed")
    if config.attention_scale != 0.25:
        raise UserError(f"attention scale {config.attention_scale} has no released form; only 0.25 can be exported")
    text = config.condition == "text"
    if text and config.modulation == "shared_adaln":
        raise UserError("a text model with shared AdaLN has no released form; its authors never wrote one")
    if not text and (rope or config.modulation not in ("adaln", "shared_adaln")):
        raise UserError("a class model is exported with absolute positions and AdaLN; this one has other parts")
    residual = config.residual
    if residual is not None and residual.target_scale != 0.6:
        raise UserError(f"residual target scale {residual.target_scale} has no released form; only 0.6 has")
    values: dict[str, Any] = {
        "model_type": "hart_transformer_t2i" if text else "hart_transformer_c2i",
        "patch_nums": list(config.sides),
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": config.mlp_ratio,
        "norm_eps": config.norm_eps,
        "mlp_type": "llama" if config.mlp == "swiglu" else "gpt2",
        "attn_type": "llama" if rope else "gpt2",
        "attn_l2_norm": config.l2_norm,
        "disable_aln": config.modulation in ("table", "none"),
        "shared_aln": config.modulation in ("table", "shared_adaln"),
        "sep_aln_pooling_mode": "max" if config.pooling == "max" else "avg",
        "use_timestep_embed": config.step_embedding == "sinusoidal",
        "use_cross_attn": False,
    }
    if text:
        values |= {
            "context_token": config.context_tokens,
            "context_dim": config.context_dim,
            "use_context_norm": config.context_norm,
            "context_norm_scale": config.context_norm_scale,
        }
    else:
        values["num_classes"] = config.num_classes
    if residual is not None:
        values |= {
            "diff_width": residual.width,
            "diff_depth": residual.depth,
            "num_sampling_steps": str(residual.steps),
            "sampler": "iddpm",
        }
    return values


def _is_text(values: Values, tensors: Tensors) -> bool:
    if "context_token" in values:
        return True
    if "num_classes" in values:
        return False
    if "model_type" in values:
        return "t2i" in str(values["model_type"])
    return "class_emb.weight" not in tensors


def _modulation(values: Values, tensors: Tensors, text: bool) -> str:
    """Told by the blocks' keys; by the config if there are no blocks to look at."""
    for pattern, kind in (
        (r"^blocks\.\d+\.ada_gss$", "shared_adaln"),
        (r"^blocks\.\d+\.ada_lin\.", "adaln"),
        (r"^blocks\.\d+\.scale_shift_table$", "table"),
        (r"^blocks\.", "none"),
    ):
        if _any(tensors, pattern):
            return kind
    shared = bool(values.get("shared_aln", False))
    if not text:
        return "shared_adaln" if shared else "adaln"
    if not values.get("disable_aln", False):
        return "adaln"
    return "table" if shared else "none"


def _pooling(values: Values, where: str) -> str:
    mode = values.get("sep_aln_pooling_mode", "max")
    if mode not in ("max", "avg"):
        raise UserError(f"{where}: sep_aln_pooling_mode {mode!r} is not supported; use 'max' or 'avg'")
    return "max" if mode == "max" else "mean"


def _residual(values: Values, tensors: Tensors, where: str) -> ResidualConfig:
    net = "diffloss.net."
    depth = _count(tensors, r"diffloss\.net\.res_blocks\.(\d+)\.in_ln\.weight")
    steps = str(values.get("num_sampling_steps", "8"))
    if not steps.isdecimal() or not 1 <= int(steps) <= 1000:
        raise UserError(f"{where}: num_sampling_steps {steps!r} is not supported; use a number between 1 and 1000")
    return ResidualConfig(
        width=_number(values, "diff_width", where, _size(tensors, net + "input_proj.weight", 0, 1024)),
        depth=_number(values, "diff_depth", where, depth or 6),
        steps=int(steps),
    )


def _sides_from_keys(tensors: Tensors, text: bool, where: str) -> tuple[int, ...]:
    """The published schedule whose number of tokens the position table has."""
    positions = tensors.get("pos_1LC")
    if positions is None or text:
        return SIDES_256
    for sides in SCHEDULES:
        if positions.shape[1] == sum(side**2 for side in sides):
            return sides
    raise UserError(
        f"{where}: 'pos_1LC' has {positions.shape[1]} positions, which is no published schedule; give patch_nums"
    )


# --------------------------------------------------------------------------- reading values


def _refuse(values: Values, where: str, **allowed: tuple[Any, ...]) -> None:
    for name, options in allowed.items():
        if name in values and values[name] not in options:
            raise UserError(f"{where}: {name} = {values[name]!r} is not supported; use {options[0]!r}")


def _number(values: Values, name: str, where: str, default: int, minimum: int = 1) -> int:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise UserError(f"{where}: {name} is {value!r}; it must be a whole number of at least {minimum}")
    return value


def _numbers(values: Values, name: str, where: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value = values.get(name, default)
    if not isinstance(value, list | tuple) or not value or any(not isinstance(n, int) or n < 1 for n in value):
        raise UserError(f"{where}: {name} is {value!r}; it must be a list of whole numbers of at least 1")
    return tuple(value)


def _real(values: Values, name: str, where: str, default: float) -> float:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: {name} is {value!r}; it must be a number")
    return float(value)


def _choice(values: Values, name: str, where: str, default: str) -> bool:
    """Whether a `*_type` argument says llama rather than gpt2."""
    value = values.get(name, "llama" if default in ("qkv_proj", "gate") else "gpt2")
    if value not in ("llama", "gpt2"):
        raise UserError(f"{where}: {name} {value!r} is not supported; use 'llama' or 'gpt2'")
    return value == "llama"


def _size(tensors: Tensors, key: str, axis: int, default: int) -> int:
    tensor = tensors.get(key)
    return default if tensor is None or tensor.ndim <= axis else tensor.shape[axis]


def _count(tensors: Tensors, pattern: str) -> int:
    """1 + the largest number that `pattern` captures in a key; 0 if none fits."""
    matches = (re.fullmatch(pattern, key) for key in tensors)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def _any(tensors: Tensors, pattern: str) -> bool:
    return any(re.search(pattern, key) for key in tensors)
