"""A server's model on the side that computes: loading it, and batches that fail in words"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hartist.errors import UserError
from hartist.generation.model_options import ModelOptions
from hartist.serving.tasks import Event, Failed, Finished, ModelInfo, Task

log = logging.getLogger("hartist.serving")

MAX_FAILURES = 2
INTERNAL = "the model failed on this request; the server's log says why"


@dataclass(frozen=True)
class WorkerOptions:
    """What a worker loads."""

    model: ModelOptions
    image_filter: float | None = None
    """The score from which a picture is withheld; None: no filter."""


class Hangup(Exception):
    """Whoever asked for a batch is gone, or wants no more: there is nobody to tell what fails."""


class Unfit(Exception):
    """This process can't be trusted with the model any longer: another one has to take its place."""


def load_pipeline(options: WorkerOptions) -> tuple[Any, Any]:
    """The pipeline and its image filter, or None. Raises UserError if they can't be loaded."""
    pipeline = options.model.load()
    if options.model.compile:  # now, and not while somebody waits: text or class, "0" is one
        pipeline("0")
    blocks = None
    if options.image_filter is not None:
        from hartist.serving.image_filter import load_image_filter

        blocks = load_image_filter(options.image_filter)
    return pipeline, blocks


def model_info(pipeline: Any) -> ModelInfo:
    """What clients are told about a model."""
    height, width = pipeline.image_size
    classes = pipeline.transformer.config.num_classes if pipeline.is_class_conditional else 0
    return ModelInfo(
        pipeline.model.name,
        height,
        width,
        len(pipeline.transformer.schedule),
        pipeline.model.settings,
        classes,
        pipeline.transformer.schedule.grids,
    )


@dataclass
class GuardedModel:
    """A loaded model that fails in words."""

    pipeline: Any
    blocks: Any = None
    failures: int = 0
    """Batches in a row that failed for no fault of a request's, and of which nothing was finished."""

    def run(self, tasks: Sequence[Task], cancelled: Callable[[], set[str]], emit: Callable[[Event], None]) -> None:
        """`run_batch`; whatever fails, every task that is still wanted gets an end.

        If a batch fails for no fault of a request's, what is left of it is made again, one task after another, and only
        those that fail again are given up. Raises Hangup, if `cancelled` or `emit` does. Raises Unfit after an error of
        the device, with tasks that have no end yet, and once MAX_FAILURES batches in a row came to nothing.
        """
        over: set[str] = set()
        gone: set[str] = set()
        finished = False

        def asked() -> set[str]:
            gone.update(cancelled())
            return gone

        def told(event: Event) -> None:
            nonlocal finished
            if isinstance(event, Finished | Failed):
                over.add(event.task_id)
                finished |= isinstance(event, Finished)
            emit(event)

        def attempt(some: Sequence[Task]) -> str | None:
            """What they are told if they fail."""
            from hartist.serving.batch import run_batch

            try:
                run_batch(self.pipeline, some, asked, told, self.blocks)
            except Hangup:
                raise
            except UserError as error:
                return str(error)
            except Exception as error:
                log.exception("a batch failed: %s", some)
                if _lost_device(error):
                    raise Unfit("the device failed") from error
                return INTERNAL
            return None

        message = attempt(tasks)
        broken = message == INTERNAL
        for task in tasks:
            if broken and len(tasks) > 1 and task.id not in over | gone:
                message = attempt([task])
            if message is not None and task.id not in over | gone:
                told(Failed(task.id, message))
        self.failures = self.failures + 1 if broken and not finished else 0
        if self.failures >= MAX_FAILURES:
            raise Unfit(f"{self.failures} batches in a row failed")


def _lost_device(error: Exception) -> bool:
    """Whether an accelerator is of no more use to this process; one that is merely out of memory is."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
