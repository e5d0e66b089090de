"""The public VAR trainer's own step, from a checkout of its repository, on CPU

Nothing in the checkout is changed. What it takes for granted is put in its place from outside: a CUDA device, the
weights of its autoencoder (random ones do for timing), logging, and an option of `print` that its start-up adds.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from hartist.config import TokenizerConfig
from hartist.errors import UserError

RATE, DECAY, CLIP, BATCH = 1e-4, 0.05, 2.0, 256
"""Published: learning rate of a batch of 256, weight decay, gradient clipping."""
TOTAL_STEPS = 1_000_000
"""What the learning rate's schedule is told. No step of a benchmark gets near the end."""


@dataclass(frozen=True)
class VarSizes:
    """Width and heads follow from the depth: 64·depth, depth."""

    depth: int
    batch_size: int
    tokenizer: TokenizerConfig


def require_checkout(folder: Path) -> None:
    """Raise UserError if the folder isn't one."""
    if not all((folder / name).is_file() for name in ("trainer.py", "models/var.py", "utils/lr_control.py")):
        raise UserError(f"{folder} is no checkout of github.com/FoundationVision/VAR; clone it and name its folder")


def make_var_step(checkout: Path, sizes: VarSizes, *, bf16: bool, tokens_given: bool) -> Callable[[], None]:
    """A function that takes the next step of `VARTrainer.train_step`, and sets its learning rate as `train.py` does.

    With `tokens_given` the autoencoder's answer is known beforehand; else it encodes the images, as published.
    Its modules have names like `utils`, so this is for a process of its own.
    """
    modules = _import(checkout)
    tokenizer = sizes.tokenizer
    sides, side = tokenizer.sides, tokenizer.schedule.finest[0] * tokenizer.downsampling
    torch.manual_seed(0)
    vae, var = modules["models"].build_vae_var(
        V=tokenizer.vocab_size,
        Cvae=tokenizer.latent_channels,
        ch=tokenizer.channels,
        share_quant_resi=tokenizer.phi_sharing,
        device="cpu",
        patch_nums=sides,
        num_classes=1000,
        depth=sizes.depth,
        shared_aln=False,
        attn_l2_norm=True,
        init_adaln=0.5,
        init_adaln_gamma=1e-5,
        init_head=0.02,
        init_std=-1,
    )
    _fill(vae)
    names, parameters, groups = modules["utils.lr_control"].filter_params(var)
    rate = RATE * sizes.batch_size / BATCH
    adamw = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True, weight_decay=0)
    optimizer = modules["utils.amp_sc"].AmpOptimizer(0, adamw, names, parameters, CLIP)
    if bf16:
        optimizer.amp_ctx = torch.autocast("cpu", torch.bfloat16)  # its own is CUDA's
    images = torch.rand(sizes.batch_size, 3, side, side) * 2 - 1
    labels = torch.randint(1000, (sizes.batch_size,))
    tokens: Any = vae
    if tokens_given:
        with torch.no_grad():
            ids = vae.img_to_idxBl(images)
        tokens = SimpleNamespace(vocab_size=vae.vocab_size, quantize=vae.quantize, img_to_idxBl=lambda _: ids)
    trainer = modules["trainer"].VARTrainer(
        device="cpu",
        patch_nums=sides,
        resos=tuple(n * tokenizer.downsampling for n in sides),
        vae_local=tokens,
        var_wo_ddp=var,
        var=var,
        var_opt=optimizer,
        label_smooth=0.0,  # the default of its train.py
    )
    var.train()
    anneal = partial(modules["utils.lr_control"].lr_wd_annealing, "lin0", adamw, rate, DECAY, DECAY)
    steps = itertools.count(1)

    def step() -> None:
        anneal(next(steps), TOTAL_STEPS // 50, TOTAL_STEPS, wp0=0.005, wpe=0.01)
        trainer.train_step(
            it=1,  # not one of those that are logged
            g_it=1,
            stepping=True,
            metric_lg=SimpleNamespace(log_iters=()),
            tb_lg=None,
            inp_B3HW=images,
            label_B=labels,
            prog_si=-1,
            prog_wp_it=1,
        )

    return step


def _import(checkout: Path) -> dict[str, ModuleType]:
    """The checkout's modules by name."""
    logging: Any = ModuleType("utils.misc")  # the trainer only mentions the types; the module wants more packages
    logging.MetricLogger = logging.TensorboardLogger = object
    sys.path.insert(0, str(checkout))
    sys.modules["utils.misc"] = logging
    names = ("dist", "models", "trainer", "utils.amp_sc", "utils.lr_control")
    modules = {name: importlib.import_module(name) for name in names}
    modules["dist"].get_device = lambda: "cpu"  # type: ignore[attr-defined]
    modules["utils.lr_control"].print = lambda *_, **__: None  # type: ignore[attr-defined]
    return modules


@torch.no_grad()
def _fill(vae: nn.Module) -> None:
    """Random weights for the autoencoder, whose own initialisation its builder switches off."""
    for name, parameter in vae.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(float("norm" in name and name.endswith("weight")))
