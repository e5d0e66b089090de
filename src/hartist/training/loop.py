"""The training loop, for every stage, on one process or many. To resume, run the same command again

Nothing in a step depends on how the run got there: batches and random numbers are functions of
(seed, step, part), so a resumed run is the uninterrupted one.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hartist.errors import UserError
from hartist.training.batches import MicroBatch, micro_batches
from hartist.training.config import RunConfig
from hartist.training.cost import peak_flops
from hartist.training.optimizer import ExponentialAverage, build_optimizer, learning_rate
from hartist.training.parallel import Parallel, Strategy, World, gathered
from hartist.training.run_log import RunLog
from hartist.training.state import load_state, save_state


@dataclass(frozen=True)
class StepLoss:
    loss: Tensor
    logs: dict[str, float]


@dataclass(frozen=True)
class Part:
    """A network with its own optimiser; its loss is a function of the micro-batch alone."""

    name: str
    module: nn.Module
    loss: Callable[[MicroBatch], StepLoss]
    starts_at: int = 0
    """The first step in which it is trained (a discriminator joins in late)."""
    units: list[nn.Module] = field(default_factory=list)
    """The modules that are gathered one at a time where weights are sharded."""


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

    @property
    def position(self) -> Any:
        """This rank's place in its data, as JSON; None where batches follow from the step."""
        ...

    def seek(self, position: Any) -> None:
        """Go to such a place (None: another number of ranks saved it)."""
        ...

    def batch_at(self, step: int) -> tuple[int, int]:
        """Images in the step's batch, and the first step of the phase it belongs to."""
        ...

    def flops(self, step: int) -> float:
        """Floating-point operations of the step's forward and backward passes, all ranks together."""
        ...

    def after_step(self, step: int) -> dict[str, float]:
        """Called when all parts took their step, on every rank; returns more figures for the log."""
        ...

    def pictures(self, networks: Mapping[str, nn.Module], directory: Path, step: int) -> dict[str, float]:
        """Write pictures made with these networks (averaged weights); returns figures for the log. Main rank only."""
        ...

    def export(self, networks: Mapping[str, nn.Module], directory: Path) -> None:
        """Write these networks (averaged weights) in their shipping form. Main rank only."""
        ...


class StatelessStage:
    """What a stage says whose batches follow from the step, and which gathers nothing on the way."""

    @property
    def gathered(self) -> dict[str, Tensor]:
        return {}

    @property
    def position(self) -> Any:
        return None

    def seek(self, position: Any) -> None:
        pass

    def after_step(self, step: int) -> dict[str, float]:
        return {}


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


class Trainer:
    """The networks of a stage with their optimisers and averages, spread over a world of processes."""

    def __init__(self, stage: Stage, config: RunConfig, world: World, strategy: Strategy) -> None:
        self.stage, self.config, self.world = stage, config, world
        self.parts = stage.parts
        self.parallel = {
            part.name: Parallel(part.module, part.loss, world, strategy, units=part.units, bf16=config.bf16)
            for part in self.parts
        }
        self.trained = {
            part.name: (
                part.module,
                build_optimizer(part.module, config.optimizer),
                ExponentialAverage(part.module, config.optimizer.ema_decay),
            )
            for part in self.parts
        }
        self.skipped = dict.fromkeys(self.parallel, 0)

    def step(self, step: int, rate: float) -> tuple[dict[str, float], int]:
        """One optimiser step of every part; returns the figures for the log and the images seen by all ranks."""
        batch_size, first_step = self.stage.batch_at(step)
        parts = micro_batches(step, batch_size, self.config.micro_batch, self.config.seed, first_step)
        mine = self.world.share(parts)
        logs: dict[str, float] = {}
        for part in self.parts:
            if step < part.starts_at:
                continue
            logs |= self._part_step(part, mine, rate)
        return logs | self.stage.after_step(step), batch_size

    def _part_step(self, part: Part, mine: list[MicroBatch], rate: float) -> dict[str, float]:
        parallel, (module, optimizer, average) = self.parallel[part.name], self.trained[part.name]
        module.train()
        optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        for i, micro in enumerate(mine):
            with parallel.accumulate(last=i == len(mine) - 1):
                micro.seed_global_generator()
                result: StepLoss = parallel(micro)
                (result.loss / len(mine)).backward()
            for name, value in result.logs.items():
                sums[name] = sums.get(name, 0.0) + value / len(mine)
        norm = float(gathered(nn.utils.clip_grad_norm_(module.parameters(), self.config.optimizer.clip_norm)))
        if not math.isfinite(norm):  # on all ranks, as the norm is that of the averaged gradients
            self.skipped[part.name] += 1
            return {f"{part.name}_skipped": 1.0}
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        average.update(module, mine[0].step)
        self.skipped[part.name] = 0
        return sums | {f"{part.name}_grad_norm": norm, f"{part.name}_skipped": 0.0}

    def check_skipped(self, step: int, limit: int) -> None:
        """Raise UserError if some part had no finite gradient for more than `limit` steps in a row."""
        for name, count in self.skipped.items():
            if count > limit:
                raise UserError(
                    f"{name}: {count} steps in a row without finite gradients at step {step}; the last good "
                    "checkpoint is kept; lower the learning rate or look for broken data"
                )

    def load(self, directory: Path) -> int:
        step, position = load_state(directory, self.trained, self.stage.identity, self.stage.gathered, world=self.world)
        self.stage.seek(position)
        return step

    def save(self, directory: Path, step: int) -> None:
        save_state(
            directory,
            step,
            self.trained,
            self.stage.identity,
            self.stage.gathered,
            position=self.stage.position,
            world=self.world,
        )

    def with_average(self, action: Callable[[Mapping[str, nn.Module]], Any]) -> Any:
        """Run `action` on the main rank with the averaged networks (collective; None on the others)."""
        with contextlib.ExitStack() as stack:
            for module, _, average in self.trained.values():
                stack.enter_context(average.swapped_into(module))
            networks = {name: parallel.whole() for name, parallel in self.parallel.items()}
            # Pictures come in shapes of their own, for which compiling would not pay.
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                result = action(networks) if self.world.main else None
        self.world.barrier()
        return result


def train(
    stage: Stage,
    config: RunConfig,
    run_dir: Path,
    *,
    world: World | None = None,
    strategy: Strategy = "ddp",
    progress: bool = True,
    max_skipped: int = 20,
) -> int:
    """Train until `config.steps`; returns the number of finished steps (fewer after SIGTERM or Ctrl-C).

    Writes to run_dir: log.jsonl, tensorboard/, pictures/, checkpoint/ (resumable) and whatever the stage
    exports. Raises UserError if more than `max_skipped` steps in a row had no finite gradient.
    """
    world = world or World()
    run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(stage, config, world, strategy)
    checkpoint = run_dir / "checkpoint"
    step = start = trainer.load(checkpoint)

    def save() -> None:
        # At the end the result comes first: a crash between the two must not leave a finished run without it.
        writes = [lambda: trainer.save(checkpoint, step), lambda: trainer.with_average(export)]
        for write in reversed(writes) if step == config.steps else writes:
            write()

    def export(networks: Mapping[str, nn.Module]) -> None:
        stage.export(networks, run_dir)

    log = RunLog(run_dir, start, world)
    peak = peak_flops(world, config.bf16)
    saved_at = time.monotonic()
    bar = tqdm(total=config.steps, initial=start, disable=not (progress and world.main), unit="step", smoothing=0.05)
    with _Interrupt() as interrupt, bar, contextlib.closing(log):
        while step < config.steps and not world.any(interrupt.requested):
            rate = learning_rate(step, config.steps, config.optimizer)
            figures, images = trainer.step(step, rate)
            trainer.check_skipped(step, max_skipped)
            log.add(figures, images, stage.flops(step))
            step += 1
            bar.update(1)
            if step % config.log_every == 0 or step == config.steps:
                row = log.write_means(step, rate, peak)
                bar.set_postfix({k: f"{v:.3g}" for k, v in row.items() if k in ("loss", "images_per_second")})
            if step % config.picture_every == 0 or step == config.steps:
                log.pause()
                draw = functools.partial(stage.pictures, directory=run_dir / "pictures", step=step)
                found = trainer.with_average(draw)
                if found:
                    log.write(step, found)
                log.go_on()
            due = world.broadcast(time.monotonic() - saved_at > config.checkpoint_seconds)
            if due and step < config.steps:
                log.pause()
                save()
                saved_at = time.monotonic()
                log.go_on()
        if step > start:
            save()
    return step
