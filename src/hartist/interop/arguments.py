"""Our configurations → the authors' constructor arguments, as their config.json holds them.

What those arguments cannot express is a UserError: an export never loses anything silently.
"""

from __future__ import annotations

from typing import Any

from hartist.config import TokenizerConfig, TransformerConfig
from hartist.errors import UserError
from hartist.scales import Side

BLOCKS_PER_LEVEL, TARGET_SCALE, ATTENTION_SCALE = 2, 0.6, 0.25
"""Fixed in the authors' code."""


def tokenizer_values(config: TokenizerConfig) -> dict[str, Any]:
    """Arguments of the authors' tokenizer. Raises UserError for what they cannot express."""
    _require(config.stem == 1, f"tokenizer stem {config.stem}", "1")
    _require(config.blocks_per_level == BLOCKS_PER_LEVEL, f"{config.blocks_per_level} blocks a level", "2")
    return {
        "architectures": ["HARTAutoEncoderWithDisc"],
        "model_type": "hart_autoencoder_with_disc",
        "vocab_size": config.vocab_size,
        "z_channels": config.latent_channels,
        "ch": config.channels,
        "ch_mult": list(config.channel_multipliers),
        "v_patch_nums": _square_sides(config.sides),
        "quant_resi": config.phi_ratio,
        "share_quant_resi": config.phi_sharing,
        "default_qresi_counts": config.phi_per_scale_count,
        "beta": config.beta,
        "quant_conv_ks": config.quant_conv_kernel,
        "using_znorm": False,
        "double_decoder": False,
        "quantizer_type": "var_hybrid",
    }


def transformer_values(config: TransformerConfig) -> dict[str, Any]:
    """Arguments of the authors' transformer. Raises UserError for what they cannot express."""
    text, rope = config.condition == "text", config.positions == "rope"
    residual = config.residual
    _require(not rope or config.rope == "released", "axial RoPE (rope='axial')", "rope='released'")
    _require((config.norm == "rms") == rope, f"norm={config.norm!r} with these positions", "the usual")
    _require(config.attention_scale == ATTENTION_SCALE, f"attention scale {config.attention_scale}", "0.25")
    _require(text or not rope, "a class model with RoPE", "absolute positions")
    _require(text or "adaln" in config.modulation, f"a class model with {config.modulation!r}", "AdaLN")
    _require(not text or config.modulation != "shared_adaln", "a text model with shared AdaLN", "AdaLN")
    _require(residual is None or residual.target_scale == TARGET_SCALE, "this residual target scale", "0.6")
    values: dict[str, Any] = {
        "architectures": ["HARTForT2I" if text else "HARTForC2I"],
        "model_type": "hart_transformer_t2i" if text else "hart_transformer_c2i",
        "patch_nums": _square_sides(config.sides),
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


def _require(condition: bool, what: str, supported: str) -> None:
    if not condition:
        raise UserError(f"{what} has no form in the authors' layout; only {supported} can be exported")


def _square_sides(sides: tuple[Side, ...]) -> list[int]:
    pairs = [(side, side) if isinstance(side, int) else side for side in sides]
    _require(all(h == w for h, w in pairs), f"the schedule {list(sides)}", "square grids")
    return [h for h, _ in pairs]
