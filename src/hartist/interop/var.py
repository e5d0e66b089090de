"""Reading VAR's `.pth` files: two state dicts without any configuration, which their shapes tell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from hartist.interop.build import build_tokenizer, build_transformer
from hartist.interop.configs import sides_from_keys
from hartist.interop.keys import TRANSFORMER_ANCHOR, unwrap
from hartist.interop.pickled import read_pickled
from hartist.interop.release import ReleasedModel


def load_var(
    var_pth: Path,
    vae_pth: Path | None = None,
    dtype: torch.dtype | None = torch.float32,
    sides: Sequence[int] | None = None,
) -> ReleasedModel:
    """A class-conditional model from VAR's `var_*.pth` and `vae_*.pth`.

    One of VAR's training checkpoints holds both: without `vae_pth` the tokenizer is read from it too.
    `sides` is needed only for a file that neither lists its scales (`lvl_1L`) nor has a published
    number of positions. `dtype` None keeps what is stored. Raises UserError that names file and key
    for anything missing, extra, misshapen or damaged.
    """
    var_pth = Path(var_pth)
    vae_pth = var_pth if vae_pth is None else Path(vae_pth)
    weights = read_pickled(var_pth, ("trainer", "var_wo_ddp"))
    unwrapped = unwrap(weights, TRANSFORMER_ANCHOR, str(var_pth))
    if sides is None:
        sides = sides_from_keys(unwrapped.buffers | unwrapped.tensors, False, str(var_pth))
    tokenizer_weights = read_pickled(vae_pth, ("trainer", "vae_local"))
    tokenizer = build_tokenizer({"v_patch_nums": list(sides)}, tokenizer_weights, str(vae_pth), dtype)
    values = {"patch_nums": list(sides), "model_type": "var"}
    transformer = build_transformer(values, weights, tokenizer.config, str(var_pth), dtype)
    return ReleasedModel(tokenizer, transformer, text_encoder_path=None, ema=False)
