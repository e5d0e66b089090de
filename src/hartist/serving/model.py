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

INTERNAL = "the model failed on this request; the server's log says why"


@dataclass(frozen=True)
class WorkerOptions:
    """What a worker loads."""

    model: ModelOptions
    image_filter: float | None = None
    """The score from which a picture is withheld; None: no filter."""


class Hangup(Exception):
    """Whoever asked for a batch is gone, or wants no more: there is nobody to tell what fails."""


def load_pipeline(options: WorkerOptions) -> tuple[Any, Any]:
    """The pipeline and its image filter, or None. Raises UserError if they can't be loaded."""
    pipeline = options.model.load()
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


def run_guarded(
    pipeline: Any,
    blocks: Any,
    tasks: Sequence[Task],
    cancelled: Callable[[], set[str]],
    emit: Callable[[Event], None],
) -> None:
    """`run_batch`; whatever fails, every task that is still wanted gets an end. Raises Hangup, if one of these does."""
    from hartist.serving.batch import run_batch

    over: set[str] = set()
    gone: set[str] = set()

    def asked() -> set[str]:
        gone.update(cancelled())
        return gone

    def told(event: Event) -> None:
        if isinstance(event, Finished | Failed):
            over.add(event.task_id)
        emit(event)

    try:
        run_batch(pipeline, tasks, asked, told, blocks)
    except Hangup:
        raise
    except Exception as error:
        if isinstance(error, UserError):
            message = str(error)
        else:
            message = INTERNAL
            log.exception("a batch failed: %s", tasks)
        for task in tasks:
            if task.id not in over | gone:
                emit(Failed(task.id, message))
