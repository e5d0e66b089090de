"""The training loop, for every stage. To resume, run the same command again.

Nothing in a step depends on how the run got there: batches and random numbers are functions of
(seed, step), so a resumed run is the uninterrupted one.
"""

from __future__ import annotations

import functools
import json
import math
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hartist.errors import UserError
from hartist.files import write_text
from hartist.training.config import RunConfig
from hartist.training.optimizer import ExponentialAverage, build_optimizer, learning_rate, restore
from hartist.training.state import load_state, save_state

Result = TypeVar("Result")


@dataclass(frozen=True)
class StepLoss:
    loss: Tensor
    logs: dict[str, float]


@dataclass(frozen=True)
class Part:
    """A network with its own optimiser; its loss is a function of the step alone."""

    name: str
    module: nn.Module
    loss: Callable[[int], StepLoss | None]
    """None skips the part in this step (a discriminator that has not started)."""


@runtime_checkable
class Stage(Protocol):
    """What the loop needs of a training stage."""

    @property
    def parts(self) -> list[Part]: ...

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be resumed: configurations and data hash."""
        ...

    @property
    def gathered(self) -> dict[str, Tensor]:
        """What `after_step` has gathered for later steps: saved with the networks and restored in place."""
        ...

    def after_step(self, step: int) -> None: ...

    def pictures(self, directory: Path, step: int) -> dict[str, float]:
        """Write pictures with the averaged weights; returns figures for the log."""
        ...

    def export(self, directory: Path) -> None:
        """Write the averaged model in its shipping form."""
        ...


def step_seed(seed: int, step: int, stream: int = 0) -> int:
    """A seed for one step and purpose, far from its neighbours' (SplitMix64 finaliser)."""
    z = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) & (2**63 - 1)


def batch_indices(num_items: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The items of step's batch: epochs are seeded permutations laid end to end."""
    indices: list[int] = []
    position = step * batch_size
    while len(indices) < batch_size:
        epoch, offset = divmod(position, num_items)
        generator = torch.Generator().manual_seed(step_seed(seed, epoch, stream=1))
        order = torch.randperm(num_items, generator=generator)
        taken = order[offset : offset + batch_size - len(indices)].tolist()
        indices += taken
        position += len(taken)
    return indices


class _Interrupt:
    """SIGTERM and SIGINT ask for a clean stop: finish the step, save, exit."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> _Interrupt:
        self._previous = {s: signal.signal(s, self._request) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _request(self, *_: object) -> None:
        self.requested = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _backward_and_step(
    part: Part, loss: Tensor, optimizer: torch.optim.Optimizer, clip_norm: float, rate: float
) -> float:
    """One optimiser step; returns the gradient norm. Not-a-number gradients skip the step."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = float(nn.utils.clip_grad_norm_(part.module.parameters(), clip_norm))
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return norm


def train(stage: Stage, config: RunConfig, run_dir: Path, *, progress: bool = True, max_skipped: int = 20) -> int:
    """Train until `config.steps`; returns the number of finished steps (fewer after SIGTERM or Ctrl-C).

    Writes to run_dir: log.jsonl, pictures/, checkpoint/ (resumable) and whatever the stage exports.
    Raises UserError if more than `max_skipped` steps in a row had no finite gradient.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    parts = {part.name: part for part in stage.parts}
    trained = {
        name: (
            part.module,
            build_optimizer(part.module, config.optimizer),
            ExponentialAverage(part.module, config.optimizer.ema_decay),
        )
        for name, part in parts.items()
    }
    checkpoint = run_dir / "checkpoint"
    start = load_state(checkpoint, trained, stage.identity, stage.gathered)
    log_path = run_dir / "log.jsonl"
    _drop_log_after(log_path, start)

    def save(step: int) -> None:
        save_state(checkpoint, step, trained, stage.identity, stage.gathered)
        _with_average(trained, functools.partial(stage.export, run_dir))

    sums: dict[str, list[float]] = defaultdict(list)
    skipped = dict.fromkeys(parts, 0)
    saved_at = clock = time.monotonic()
    last_logged = start
    step = start
    bar = tqdm(total=config.steps, initial=start, disable=not progress, unit="step", smoothing=0.05)
    with _Interrupt() as interrupt, bar, open(log_path, "a", encoding="utf-8") as log:
        while step < config.steps and not interrupt.requested:
            rate = learning_rate(step, config.steps, config.optimizer)
            for name, part in parts.items():
                torch.manual_seed(step_seed(config.seed, step))
                part.module.train()
                result = part.loss(step)
                if result is None:
                    continue
                module, optimizer, average = trained[name]
                norm = _backward_and_step(part, result.loss, optimizer, config.optimizer.clip_norm, rate)
                skipped[name] = 0 if math.isfinite(norm) else skipped[name] + 1
                if skipped[name] > max_skipped:
                    raise UserError(
                        f"{skipped[name]} steps in a row without finite gradients at step {step}; "
                        "lower the learning rate"
                    )
                average.update(module, step)
                for key, value in {**result.logs, f"{name}_grad_norm": norm}.items():
                    sums[key].append(value)
            stage.after_step(step)
            step += 1
            bar.update(1)

            if step % config.log_every == 0 or step == config.steps:
                now = time.monotonic()
                row = {key: sum(values) / len(values) for key, values in sums.items()}
                row |= {"step": step, "rate": rate}
                row["images_per_second"] = (step - last_logged) * config.batch_size / (now - clock)
                sums.clear()
                clock, last_logged = now, step
                log.write(json.dumps({k: float(f"{v:.6g}") for k, v in row.items()}) + "\n")
                log.flush()
                bar.set_postfix({k: f"{v:.3g}" for k, v in row.items() if k in ("loss", "images_per_second")})
            now = time.monotonic()  # time spent on pictures and checkpoints doesn't count as training
            if step % config.picture_every == 0 or step == config.steps:
                figures = _with_average(trained, functools.partial(stage.pictures, run_dir / "pictures", step))
                log.write(json.dumps({"step": step, **{k: float(f"{v:.6g}") for k, v in figures.items()}}) + "\n")
                log.flush()
                clock += time.monotonic() - now
            now = time.monotonic()
            if now - saved_at > config.checkpoint_seconds and step < config.steps:
                save(step)
                saved_at = time.monotonic()
                clock += saved_at - now
        if step > start:
            save(step)
    return step


def _with_average(trained: dict[str, Any], action: Callable[[], Result]) -> Result:
    """Run `action` with the averaged weights in place and the modules in evaluation mode."""
    saved = {}
    for name, (module, _, average) in trained.items():
        saved[name] = average.swap_into(module)
        module.eval()
    try:
        with torch.no_grad():
            return action()
    finally:
        for name, (module, _, _average) in trained.items():
            restore(module, saved[name])


def _drop_log_after(path: Path, step: int) -> None:
    """Remove log lines of steps that are about to be run again, and one that a crash tore."""
    if not path.exists():
        return

    def is_done(line: str) -> bool:
        try:
            return json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            return False

    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if is_done(line)]
    if len(kept) < len(lines):
        write_text(path, "".join(line + "\n" for line in kept))
