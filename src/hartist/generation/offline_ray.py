"""Offline batches over many processes, by Ray: one that dies is started again and its batch made anew

Import it inside `hartist.generation.cluster.ray_running` only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from hartist.errors import UserError
from hartist.generation.cluster import gpu_share
from hartist.generation.model_options import ModelOptions
from hartist.generation.offline import Batch, Made, check_plan, make
from hartist.generation.offline_plan import Picture
from hartist.generation.pipeline import Pipeline

ATTEMPTS = 3
"""How often a batch is begun before the processes that died over it count against it."""


class Maker:
    """A process with a model, which is loaded when it is first needed."""

    def __init__(self, options: ModelOptions) -> None:
        self.options = options
        self.pipe: Pipeline | None = None

    def check(self, plan: Sequence[Picture]) -> None:
        """Raises UserError for a line which the model can't serve."""
        check_plan(self._loaded(), plan)

    def make(self, batch: Batch) -> list[Made]:
        """The wanted pictures of a batch."""
        return make(self._loaded(), batch)

    def _loaded(self) -> Pipeline:
        if self.pipe is None:
            self.pipe = self.options.load()
        return self.pipe


def make_on_ray(
    options: ModelOptions, plan: Sequence[Picture], batches: Sequence[Batch], processes: int
) -> Iterator[Made]:
    """Pictures as they are finished, in any order.

    Raises UserError for a line which the model can't serve, before anything is made, and if a batch has lost its
    process `ATTEMPTS` times.
    """
    processes = min(processes, len(batches))
    kind: Any = ray.remote(
        num_cpus=options.threads,
        num_gpus=gpu_share(options.device, processes),
        max_restarts=-1,
        max_task_retries=ATTEMPTS - 1,
    )(Maker)
    makers = [kind.remote(options) for _ in range(processes)]
    _result(makers[0].check.remote(plan), plan[0])
    left = iter(batches)
    running: dict[Any, tuple[Any, Batch]] = {}

    def give_work(maker: Any) -> None:
        batch = next(left, None)
        if batch is not None:
            running[maker.make.remote(batch)] = maker, batch

    for maker in makers:
        give_work(maker)
    while running:
        done, _ = ray.wait(list(running), num_returns=1)
        maker, batch = running.pop(done[0])
        made = _result(done[0], batch.pictures[0])
        give_work(maker)
        yield from made


def _result(reference: Any, first: Picture) -> Any:
    """What a process returned. Raises its UserError, or one that says which line it died over."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise UserError(
            f"a process died {ATTEMPTS} times over the batch of line {first.line}; is there enough memory? Try fewer "
            "--processes or a smaller --batch-size (what is finished is kept)"
        ) from error
