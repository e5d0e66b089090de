"""Making one batch of pictures on a worker: scale by scale, with previews, without those that were cancelled"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image

from hartist.generation.pipeline import Generated, Pipeline, Request
from hartist.generation.png import encode_png, metadata
from hartist.serving.reconstruction import reconstruct_pictures
from hartist.serving.tasks import Event, Finished, ImageTask, Preview, ReconstructTask, Task

Blocks = Callable[[Image.Image], bool]
"""Whether the image filter withholds a picture."""


def run_batch(
    pipeline: Pipeline,
    tasks: Sequence[Task],
    cancelled: Callable[[], set[str]],
    emit: Callable[[Event], None],
    blocks: Blocks | None = None,
) -> None:
    """Do a batch of one shape: pictures to make, or pictures to reconstruct."""
    make_pictures(pipeline, [task for task in tasks if isinstance(task, ImageTask)], cancelled, emit, blocks)
    reconstruct_pictures(
        pipeline.tokenizer, [task for task in tasks if isinstance(task, ReconstructTask)], cancelled, emit
    )


def make_pictures(
    pipeline: Pipeline,
    tasks: Sequence[ImageTask],
    cancelled: Callable[[], set[str]],
    emit: Callable[[Event], None],
    blocks: Blocks | None = None,
) -> None:
    """Make the pictures of tasks of one shape; a picture does not depend on what is made beside it.

    `cancelled` is asked after every scale: its tasks cost nothing from there on, and get no further event.
    Previews pass the image filter too; one that it withholds is left out.
    """
    tasks = [task for task in tasks if task.id not in cancelled()]
    if not tasks:
        return
    settings, negative = tasks[0].shape
    scales = pipeline.scales([Request(task.prompt, task.seed) for task in tasks], settings, negative)
    result = next(scales)
    while True:
        gone = cancelled()
        rows = [row for row, task in enumerate(tasks) if task.id not in gone]
        if not rows:
            scales.close()
            return
        last = result.k == result.num_scales - 1
        for row in rows:
            task = tasks[row]
            if last:
                emit(_finished(pipeline, task, pipeline.decode(result.f_hat_BChw[row : row + 1])[0], blocks))
            elif result.k in task.previews:
                image = pipeline.decode(result.f_hat_BChw[row : row + 1])[0]
                if blocks is None or not blocks(image):
                    emit(Preview(task.id, result.k, result.num_scales, encode_png(image)))
        if last:
            return
        if len(rows) < len(tasks):
            tasks = [tasks[row] for row in rows]
            result = scales.send(rows)
        else:
            result = next(scales)


def _finished(pipeline: Pipeline, task: ImageTask, image: Image.Image, blocks: Blocks | None) -> Finished:
    truncated = pipeline.truncated_tokens([task.prompt])[0]
    blocked = blocks is not None and blocks(image)
    if blocked:
        image = Image.new("RGB", image.size)
    generated = Generated(
        image, task.prompt, task.negative_prompt, task.seed, task.settings, pipeline.model.name, (), truncated
    )
    return Finished(task.id, encode_png(image, metadata(generated)), truncated, blocked)
