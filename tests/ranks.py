"""What the tests of several ranks run under torchrun: ranks.py FOLDER SCENARIO…; and the same runs on one process."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hartist.training.adversarial_config import AdversarialConfig
from hartist.training.config import GeneratorLossConfig, OptimizerConfig, TokenizerLossConfig
from hartist.training.loop import train
from hartist.training.parallel import Strategy, World, join_world, local
from runs import stop_after
from small import make_generator_stage, make_tokenizer_stage, run_config

TOKENIZER_STEPS, GENERATOR_STEPS = 8, 5
PLAIN = TokenizerLossConfig(revive_every=0)
REVIVING = TokenizerLossConfig(continuous_steps=2, revive_every=3)
ADVERSARIAL = TokenizerLossConfig(
    revive_every=0, adversarial=0.5, adversary=AdversarialConfig(channels=4, layers=2, start=0.25)
)
MUON = OptimizerConfig(kind="muon", learning_rate=2e-3, warmup_steps=2, ema_decay=0.9)
COARSE = GeneratorLossConfig(coarse_share=0.5, coarse_until=0.75)


def train_tokenizer(
    run_dir: Path,
    world: World | None = None,
    *,
    stop: int | None = None,
    losses: TokenizerLossConfig = REVIVING,
    steps: int = TOKENIZER_STEPS,
    **changes: Any,
) -> int:
    """Batches of four in two parts, one for each of two ranks, unless `changes` say otherwise."""
    run = run_config(steps, **({"micro_batch": 2} | changes))
    stage = make_tokenizer_stage(run, losses, world)
    if stop is not None:
        stop_after(stage, stop)
    done = train(stage, run, run_dir, world=world, progress=False)
    if world is not None:
        assert_same_on_all_ranks(world, stage.tokenizer)
    return done


def train_generator(
    run_dir: Path, world: World | None = None, strategy: Strategy = "ddp", *, stop: int | None = None, **changes: Any
) -> int:
    """Two phases, coarse and full steps, activations recomputed; batches of four in four parts: any rank accumulates.

    The token caches are beside the run's folder.
    """
    run = run_config(GENERATOR_STEPS, micro_batch=1, activation_checkpointing=True, **changes)
    stage = make_generator_stage(run, run_dir.parent, COARSE, world, coarse_first=True)
    if stop is not None:
        stop_after(stage, stop)
    whole = sum(p.numel() for p in stage.transformer.parameters())
    done = train(stage, run, run_dir, world=world, strategy=strategy, progress=False)
    if world is not None and strategy == "ddp":
        assert_same_on_all_ranks(world, stage.transformer)
    if world is not None and strategy == "fsdp":
        assert sum(local(p).numel() for p in stage.transformer.parameters()) < 0.6 * whole
    return done


def assert_same_on_all_ranks(world: World, module: nn.Module) -> None:
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    assert len(set(world.gather(digest.hexdigest()))) == 1


def together(world: World, folder: Path) -> None:
    """All that needs no process of its own, one run after the other."""

    def copy(source: str, target: str) -> None:
        if world.main:
            shutil.copytree(folder / source, folder / target)
        world.barrier()

    strategies: tuple[Strategy, ...] = ("ddp", "fsdp")
    last = world.rank == world.size - 1  # a signal may reach any of the ranks, and one alone
    train_tokenizer(folder / "accumulated-ddp", world, losses=PLAIN, steps=4, micro_batch=1)
    for name, losses, steps, stops in (
        ("tokenizer", REVIVING, TOKENIZER_STEPS, (0, 4)),
        ("adversarial", ADVERSARIAL, 4, (1,)),
    ):
        assert train_tokenizer(folder / f"{name}-ddp", world, losses=losses, steps=steps) == steps
        for stop in (*stops, None):
            done = train_tokenizer(
                folder / f"{name}-parts", world, losses=losses, steps=steps, stop=stop if last else None
            )
            assert done == (steps if stop is None else stop + 1)

    for strategy in strategies:
        assert train_generator(folder / f"generator-{strategy}", world, strategy) == GENERATOR_STEPS
        train_generator(folder / f"muon-{strategy}", world, strategy, optimizer=MUON)
    for stop in (0, 3):
        done = train_generator(folder / "generator-parts", world, "fsdp", stop=stop if last else None)
        assert done == stop + 1
    assert train_generator(folder / "generator-parts", world, "fsdp") == GENERATOR_STEPS

    assert train_generator(folder / "fsdp-then-ddp", world, "fsdp", stop=2) == 3
    copy("fsdp-then-ddp", "fsdp-then-one")
    assert train_generator(folder / "ddp-then-fsdp", world, "ddp", stop=2) == 3
    copy("ddp-then-fsdp", "ddp-then-one")
    for first in ("fsdp", "ddp", "one"):
        for second in strategies:
            if first != second:
                assert train_generator(folder / f"{first}-then-{second}", world, second) == GENERATOR_STEPS


def mortal(world: World, folder: Path) -> None:
    """Saves after every step; one rank dies in the fifth, the first time."""
    run = run_config(TOKENIZER_STEPS, micro_batch=2, checkpoint_seconds=0.0)
    stage = make_tokenizer_stage(run, REVIVING, world)
    plain = stage.after_step

    def after_step(step: int) -> dict[str, float]:
        if step == 4 and world.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(step)

    stage.after_step = after_step  # type: ignore[method-assign]
    train(stage, run, folder / "mortal", world=world, progress=False)


def endless(world: World, folder: Path) -> None:
    """Goes on until a signal comes."""
    run = run_config(100_000, micro_batch=1)
    stage = make_generator_stage(run, folder, COARSE, world)
    plain = stage.after_step

    def after_step(step: int) -> dict[str, float]:
        if world.main and step == 2:
            print("under way", flush=True)
        return plain(step)

    stage.after_step = after_step  # type: ignore[method-assign]
    done = train(stage, run, folder / "endless", world=world, strategy="fsdp", progress=False)
    print(f"rank {world.rank} stopped after step {done}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with join_world() as joined:
        for scenario in sys.argv[2:]:
            {"together": together, "mortal": mortal, "endless": endless}[scenario](joined, Path(sys.argv[1]))
