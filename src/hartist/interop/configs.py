"""The authors' constructor arguments → our configurations; what they leave open, the keys tell.

Where arguments and keys disagree about the modulation, the keys decide.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from hartist.config import ResidualConfig, TokenizerConfig, TransformerConfig
from hartist.errors import UserError
from hartist.interop.reading import (
    Tensors,
    Values,
    choice,
    contains,
    count,
    flag,
    number,
    numbers,
    real,
    refuse,
    size,
)
from hartist.scales import SIDES_256, SIDES_512, SIDES_1024

SCHEDULES = (SIDES_256, SIDES_512, SIDES_1024)
HEAD_DIM = 64
"""Of every published model; taken where nothing tells the number of heads."""


# --------------------------------------------------------------------------- tokenizer


def tokenizer_config(values: Values, tensors: Tensors, where: str) -> TokenizerConfig:
    """From the authors' arguments; `tensors` (plain released names) fill in what they don't say.

    Raises UserError for unfit values and for variants that no published weights use.
    """
    refuse(values, where, using_znorm=False, double_decoder=False)
    choice(values, "quantizer_type", where, ("var", "var_hybrid"), "var")
    channels = number(values, "ch", where, size(tensors, "encoder.conv_in.weight", 0, 160))
    sides = numbers(values, "v_patch_nums", where, SIDES_256)
    phi_sharing, phi_count = _phi_from_keys(tensors)
    phi_count = number(values, "default_qresi_counts", where, phi_count, minimum=0)
    codebook = "quantize.embedding.weight"
    return TokenizerConfig(
        vocab_size=number(values, "vocab_size", where, size(tensors, codebook, 0, 4096)),
        latent_channels=number(values, "z_channels", where, size(tensors, codebook, 1, 32)),
        channels=channels,
        channel_multipliers=numbers(values, "ch_mult", where, _multipliers_from_keys(tensors, channels)),
        sides=sides,
        phi_ratio=real(values, "quant_resi", where, 0.5),
        phi_sharing=number(values, "share_quant_resi", where, phi_sharing, minimum=0),
        phi_per_scale_count=0 if phi_count == len(sides) else phi_count,
        beta=real(values, "beta", where, 0.25),
        quant_conv_kernel=number(values, "quant_conv_ks", where, size(tensors, "quant_conv.weight", 2, 3)),
    )


def _phi_from_keys(tensors: Tensors) -> tuple[int, int]:
    """`share_quant_resi` and `default_qresi_counts` as the names of the φ convolutions tell them."""
    per_scale = count(tensors, r"quantize\.quant_resi\.(\d+)\.weight")
    if per_scale:
        return 0, per_scale
    if "quantize.quant_resi.qresi.weight" in tensors:
        return 1, 0
    return count(tensors, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.weight") or 4, 0


def _multipliers_from_keys(tensors: Tensors, channels: int) -> tuple[int, ...]:
    key = "encoder.down.{}.block.0.conv1.weight"
    levels = count(tensors, key.format(r"(\d+)").replace(".", r"\."))
    widths = [size(tensors, key.format(i), 0, channels) for i in range(levels)]
    return tuple(max(1, width // channels) for width in widths) or (1, 1, 2, 2, 4)


# --------------------------------------------------------------------------- transformer


def transformer_config(values: Values, tensors: Tensors, tokenizer: TokenizerConfig, where: str) -> TransformerConfig:
    """From the authors' arguments; vocabulary and latent channels are the tokenizer's.

    `tensors` may hold the buffer `lvl_1L`, which tells the scales. Raises UserError for unfit values
    and for variants that no published weights use.
    """
    refuse(values, where, use_cross_attn=False, sampler="iddpm")
    text = _is_text(values, tensors)
    width = number(values, "embed_dim", where, size(tensors, "word_embed.weight", 0, 1024))
    depth = number(values, "depth", where, count(tensors, r"blocks\.(\d+)\.attn\.proj\.weight") or 16)
    heads = size(tensors, "blocks.0.attn.scale_mul_1H11", 1, max(1, width // HEAD_DIM))
    types, llama = ("llama", "gpt2"), contains(tensors, r"\.attn\.qkv_proj\.")
    rope = choice(values, "attn_type", where, types, "llama" if llama else "gpt2") == "llama"
    llama = contains(tensors, r"\.ffn\.gate_proj\.")
    swiglu = choice(values, "mlp_type", where, types, "llama" if llama else "gpt2") == "llama"
    hidden = size(tensors, "blocks.0.ffn.fc1.weight", 0, 4 * width)
    pooling = choice(values, "sep_aln_pooling_mode", where, ("max", "avg"), "max")
    step_mlp, l2_norm = contains(tensors, r"^lvl_embed\.mlp\."), contains(tensors, r"\.attn\.scale_mul_1H11$")
    config = TransformerConfig(
        sides=_sides(values, tensors, text, where),
        vocab_size=tokenizer.vocab_size,
        latent_channels=tokenizer.latent_channels,
        condition="text" if text else "class",
        width=width,
        depth=depth,
        heads=number(values, "num_heads", where, heads),
        norm="rms" if rope else "layer",
        norm_eps=real(values, "norm_eps", where, 1e-6),
        mlp="swiglu" if swiglu else "gelu",
        mlp_ratio=real(values, "mlp_ratio", where, 4.0 if swiglu else hidden / width),
        modulation=_modulation(values, tensors, text, where),  # type: ignore[arg-type]
        pooling="max" if pooling == "max" else "mean",
        l2_norm=flag(values, "attn_l2_norm", where, l2_norm),
        positions="rope" if rope else "absolute",
        step_embedding="sinusoidal" if flag(values, "use_timestep_embed", where, step_mlp) else "table",
        context_norm=text and flag(values, "use_context_norm", where, "context_norm.weight" in tensors),
        residual=_residual(values, tensors, where) if text or contains(tensors, r"^diffloss\.") else None,
    )
    return dataclasses.replace(config, **_condition(values, tensors, text, config, where))


def _is_text(values: Values, tensors: Tensors) -> bool:
    if values.get("context_token") is not None:
        return True
    if values.get("num_classes") is not None:
        return False
    if values.get("model_type") is not None:
        return "t2i" in str(values["model_type"])
    return "class_emb.weight" not in tensors


def _condition(values: Values, tensors: Tensors, text: bool, defaults: TransformerConfig, where: str) -> dict[str, Any]:
    """What concerns text or classes alone; the other kind's fields keep our defaults."""
    if not text:
        known = size(tensors, "class_emb.weight", 0, defaults.num_classes + 1) - 1
        return {"num_classes": number(values, "num_classes", where, known)}
    tokens = size(tensors, "pos_start", 1, _tokens_per_level(tensors)[0] if "lvl_1L" in tensors else 77)
    return {
        "context_tokens": number(values, "context_token", where, tokens),
        "context_dim": number(values, "context_dim", where, size(tensors, "context_embed.weight", 1, 768)),
        "context_norm_scale": real(values, "context_norm_scale", where, defaults.context_norm_scale),
    }


def _modulation(values: Values, tensors: Tensors, text: bool, where: str) -> str:
    """Told by the blocks' keys; by the arguments if there are no blocks to look at."""
    for pattern, kind in (
        (r"^blocks\.\d+\.ada_gss$", "shared_adaln"),
        (r"^blocks\.\d+\.ada_lin\.", "adaln"),
        (r"^blocks\.\d+\.scale_shift_table$", "table"),
        (r"^blocks\.", "none"),
    ):
        if contains(tensors, pattern):
            return kind
    shared = flag(values, "shared_aln", where, False)
    if not text:
        return "shared_adaln" if shared else "adaln"
    if not flag(values, "disable_aln", where, False):
        return "adaln"
    return "table" if shared else "none"


def _residual(values: Values, tensors: Tensors, where: str) -> ResidualConfig:
    depth = count(tensors, r"diffloss\.net\.res_blocks\.(\d+)\.in_ln\.weight")
    width = size(tensors, "diffloss.net.input_proj.weight", 0, 1024)
    steps = str(values.get("num_sampling_steps") or "8")
    if not steps.isdecimal() or not 1 <= int(steps) <= 1000:
        raise UserError(f"{where}: num_sampling_steps {steps!r} is not supported; use a number between 1 and 1000")
    return ResidualConfig(
        width=number(values, "diff_width", where, width),
        depth=number(values, "diff_depth", where, depth or 6),
        steps=int(steps),
    )


def _sides(values: Values, tensors: Tensors, text: bool, where: str) -> tuple[int, ...]:
    if values.get("patch_nums") is not None or (text and "lvl_1L" not in tensors):
        return numbers(values, "patch_nums", where, SIDES_256)
    return sides_from_keys(tensors, text, where)


def sides_from_keys(tensors: Tensors, text: bool, where: str) -> tuple[int, ...]:
    """The scales as `lvl_1L` lists them, or the published ones with as many tokens as `pos_1LC`."""
    if "lvl_1L" in tensors:
        lengths = _tokens_per_level(tensors)
        sides = tuple(math.isqrt(n) for n in ([1, *lengths[1:]] if text else lengths))
        if not text and [side**2 for side in sides] != lengths:
            raise UserError(f"{where}: 'lvl_1L' counts {lengths} tokens a scale, which are no squares")
        return sides
    tokens = size(tensors, "pos_1LC", 1, 0)
    for schedule in SCHEDULES:
        if tokens == sum(side**2 for side in schedule):
            return schedule
    raise UserError(f"{where}: {tokens} positions in 'pos_1LC' are no published schedule; give the scales' sides")


def _tokens_per_level(tensors: Tensors) -> list[int]:
    return tensors["lvl_1L"].flatten().long().bincount().tolist()
