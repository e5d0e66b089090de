"""Our parameter names ↔ the names in released checkpoints: tables, nothing but tables.

A rule renames one family of parameters; the first that fits a whole name wins. Going back needs no
second table: a network knows all its own names, so the renaming of those is inverted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from hartist.config import TokenizerConfig, TransformerConfig
from hartist.errors import UserError

IGNORED_BUFFERS = frozenset({"attn_bias_for_masking", "lvl_1L", "zero_k_bias", "ema_vocab_hit_SV"})
"""Buffers of the authors' classes that hold nothing learned; told by the last part of the name."""

TRANSFORMER_ANCHOR = "word_embed.weight"
TOKENIZER_ANCHOR = "quantize.embedding.weight"


@dataclass(frozen=True)
class Rule:
    """`ours` is a regular expression for a whole name, `released` what `re.Match.expand` makes of it."""

    ours: str
    released: str
    leading_ones: int = 0
    """How many axes of length 1 the released tensor has in front."""


@dataclass(frozen=True)
class ReleasedName:
    """Where one of our tensors lies in a released checkpoint."""

    key: str
    leading_ones: int = 0

    def released_shape(self, shape: Iterable[int]) -> tuple[int, ...]:
        return (1,) * self.leading_ones + tuple(shape)


# Everything that isn't listed keeps its name.
_TOKENIZER = (Rule(r"quantizer\.codebook", "quantize.embedding.weight"),)

_PHI = {
    "partial": Rule(r"quantizer\.phi\.(\d+)\.(.+)", r"quantize.quant_resi.qresi_ls.\1.\2"),
    "single": Rule(r"quantizer\.phi\.0\.(.+)", r"quantize.quant_resi.qresi.\1"),
    "per_scale": Rule(r"quantizer\.phi\.(\d+)\.(.+)", r"quantize.quant_resi.\1.\2"),
}

_TRANSFORMER = (
    Rule(r"step_embed\.(.+)", r"lvl_embed.\1"),
    Rule(r"class_embed\.(.+)", r"class_emb.\1"),
    Rule(r"start_position", "pos_start"),
    Rule(r"position_embed", "pos_1LC"),
    Rule(r"shared_modulation\.(.+)", r"shared_ada_lin.1.\1"),
    Rule(r"blocks\.(\d+)\.norm\.(.+)", r"blocks.\1.ln_wo_grad.\2"),
    Rule(r"blocks\.(\d+)\.attn\.log_scale", r"blocks.\1.attn.scale_mul_1H11"),
    Rule(r"blocks\.(\d+)\.mlp\.(gate|up|down)\.(.+)", r"blocks.\1.ffn.\2_proj.\3"),
    Rule(r"blocks\.(\d+)\.mlp\.(fc[12])\.(.+)", r"blocks.\1.ffn.\2.\3"),
    Rule(r"blocks\.(\d+)\.modulation\.linear\.(.+)", r"blocks.\1.ada_lin.1.\2"),
    Rule(r"head\.norm\.(.+)", r"head_nm.ln_wo_grad.\1"),
    Rule(r"head\.modulation\.(.+)", r"head_nm.ada_lin.1.\1"),
    Rule(r"head\.linear\.(.+)", r"head.\1"),
    Rule(r"residual_norm\.(.+)", r"decoder_norm.\1"),
    Rule(r"residual_mlp\.condition_embed\.(.+)", r"diffloss.net.cond_embed.\1"),
    Rule(r"residual_mlp\.blocks\.(\d+)\.norm\.(.+)", r"diffloss.net.res_blocks.\1.in_ln.\2"),
    Rule(r"residual_mlp\.blocks\.(\d+)\.mlp\.(.+)", r"diffloss.net.res_blocks.\1.mlp.\2"),
    Rule(r"residual_mlp\.blocks\.(\d+)\.modulation\.(.+)", r"diffloss.net.res_blocks.\1.adaLN_modulation.1.\2"),
    Rule(r"residual_mlp\.final\.linear\.(.+)", r"diffloss.net.final_layer.linear.\1"),
    Rule(r"residual_mlp\.final\.modulation\.(.+)", r"diffloss.net.final_layer.adaLN_modulation.1.\1"),
    Rule(r"residual_mlp\.(.+)", r"diffloss.net.\1"),
)

_QKV = {
    "rope": Rule(r"blocks\.(\d+)\.attn\.qkv\.(.+)", r"blocks.\1.attn.qkv_proj.\2"),
    "absolute": Rule(r"blocks\.(\d+)\.attn\.qkv\.(.+)", r"blocks.\1.attn.mat_qkv.\2"),
}

_MODULATION_TABLE = {
    "table": Rule(r"blocks\.(\d+)\.modulation\.table", r"blocks.\1.scale_shift_table"),
    "shared_adaln": Rule(r"blocks\.(\d+)\.modulation\.table", r"blocks.\1.ada_gss", leading_ones=2),
}


def tokenizer_rules(config: TokenizerConfig) -> tuple[Rule, ...]:
    sharing = {0: "per_scale", 1: "single"}.get(config.phi_sharing, "partial")
    return (*_TOKENIZER, _PHI[sharing])


def transformer_rules(config: TransformerConfig) -> tuple[Rule, ...]:
    rules: tuple[Rule, ...] = (_QKV[config.positions],)
    if config.modulation in _MODULATION_TABLE:
        rules = (*rules, _MODULATION_TABLE[config.modulation])
    return (*rules, *_TRANSFORMER)


def released_names(ours: Iterable[str], rules: tuple[Rule, ...]) -> dict[str, ReleasedName]:
    """The released name of each of our names, in order."""
    return {name: _released_name(name, rules) for name in ours}


def _released_name(name: str, rules: tuple[Rule, ...]) -> ReleasedName:
    for rule in rules:
        match = re.fullmatch(rule.ours, name)
        if match:
            return ReleasedName(match.expand(rule.released), rule.leading_ones)
    return ReleasedName(name)


def to_released(tensors: Mapping[str, Tensor], rules: tuple[Rule, ...]) -> dict[str, Tensor]:
    """Our tensors under their released names; views, nothing is copied."""
    names = released_names(tensors, rules)
    return {
        names[name].key: tensor.reshape(names[name].released_shape(tensor.shape)) for name, tensor in tensors.items()
    }


def to_ours(tensors: Mapping[str, Tensor], ours: Iterable[str], rules: tuple[Rule, ...]) -> dict[str, Tensor]:
    """Released tensors under our names `ours`, all of which must be there; views, nothing is copied."""
    renamed = {}
    for name, released in released_names(ours, rules).items():
        tensor = tensors[released.key]
        renamed[name] = tensor.reshape(tensor.shape[released.leading_ones :])
    return renamed


def is_ignored(key: str) -> bool:
    return key.rpartition(".")[2] in IGNORED_BUFFERS


@dataclass(frozen=True)
class Unwrapped:
    """Released tensors by their plain names, and what the file called them."""

    tensors: dict[str, Tensor]
    buffers: dict[str, Tensor]
    """What holds nothing learned."""
    prefix: str
    file_keys: dict[str, str]


def unwrap(tensors: Mapping[str, Tensor], anchor: str, where: str) -> Unwrapped:
    """Take off the prefix in front of `anchor` (`vae.`, `module.`, …); set buffers and discriminator apart.

    Keys outside the prefix are kept as they are, so that they are reported as unexpected; the
    discriminator beside a released tokenizer (`disc.`) is left out. Raises UserError if the anchor is
    absent, or for a tokenizer with two decoders.
    """
    found = sorted((key for key in tensors if key == anchor or key.endswith("." + anchor)), key=len)
    if not found:
        raise UserError(f"{where}: missing key {anchor!r}; the file does not hold this kind of network")
    prefix = found[0].removesuffix(anchor)
    plain: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    file_keys: dict[str, str] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(prefix)
        if is_ignored(key):
            buffers[name] = tensor
            continue
        if anchor == TOKENIZER_ANCHOR and key.removeprefix("module.").startswith("disc."):
            continue
        if name.startswith(("decoder2.", "post_quant_conv2.")):
            raise UserError(f"{where}: {key!r} belongs to a second decoder; use a tokenizer with one decoder")
        plain[name] = tensor
        file_keys[name] = key
    return Unwrapped(plain, buffers, prefix, file_keys)
