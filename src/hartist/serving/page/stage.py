"""What the page shows of a run: every picture as far as it has come, in JSON for `pictures.js`"""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Sequence
from typing import Any

from hartist.generation.shortcuts import is_fast
from hartist.serving.images import encode, size_of
from hartist.serving.page.requests import to_query
from hartist.serving.results import Results
from hartist.serving.tasks import Failed, Finished, ImageTask, ModelInfo, Preview

PREVIEW_QUALITY = 85
_numbers = itertools.count(1)


class Stage:
    """The pictures of one run. `value` is complete each time: Gradio sends the difference."""

    def __init__(self, info: ModelInfo, tasks: Sequence[ImageTask], results: Results) -> None:
        self.info, self.results = info, results
        self.tasks = {task.id: task for task in tasks}
        self.status, self.note = "waiting", "Waiting for a free moment"
        self.pictures: dict[str, dict[str, Any]] = {
            task.id: {"id": task.id, "done": 0, "caption": "", "source": "", "finished": False} for task in tasks
        }

    def value(self) -> dict[str, Any]:
        """Everything, in new containers."""
        return {
            **message(self.status, self.note),
            "width": self.info.width,
            "height": self.info.height,
            "scales": self.info.num_scales,
            "pictures": [dict(picture) for picture in self.pictures.values()],
        }

    def wait(self, waiting: int) -> None:
        """Nothing has come for a while, and so many images wait on the whole server."""
        if self.status == "waiting" and waiting:
            self.note = f"Waiting: {waiting} picture{'s' * (waiting != 1)} in the queue"

    async def add(self, event: Preview | Finished | Failed) -> None:
        """Take in what has become of a picture."""
        self.status, self.note = "running", ""
        picture = self.pictures[event.task_id]
        match event:
            case Preview():
                webp = await encode(event.png, "webp", PREVIEW_QUALITY)
                picture["source"] = "data:image/webp;base64," + base64.b64encode(webp).decode()
                picture["done"] = event.k + 1
                picture["caption"] = self.scale_caption(event.k)
            case Finished(blocked=True):
                picture |= {"source": "", "caption": "Withheld by the image filter", "failed": True}
            case Finished():
                task = self.tasks[event.task_id]
                picture |= {
                    "source": "/v1/images/results/" + self.results.add(event.png, "image/png"),
                    "done": self.info.num_scales,
                    "caption": f"seed {task.seed}",
                    "finished": True,
                    "prompt": task.prompt,
                    "link": to_query(task, self.info.settings),
                    "file": f"{_slug(task.prompt)}-{task.seed}.png",
                    "facts": self.facts(task),
                    "note": truncated_note(event.truncated_tokens),
                }
            case Failed():
                picture |= {"source": "", "caption": event.message, "failed": True}

    def end(self, status: str, note: str = "") -> None:
        """Nothing more comes; what has not begun is not shown any longer."""
        self.status, self.note = status, note
        self.pictures = {name: picture for name, picture in self.pictures.items() if picture["caption"]}

    def scale_caption(self, k: int) -> str:
        """Which scale a preview shows, counted from 1, and its grid of tokens."""
        grid = f": {self.info.grids[k][0]}×{self.info.grids[k][1]}" if self.info.grids else ""
        return f"scale {k + 1} of {self.info.num_scales}{grid}"

    def facts(self, task: ImageTask) -> list[tuple[str, str]]:
        """Names and values of a picture's settings."""
        own = task.settings
        facts = {
            "Seed": task.seed,
            "Guidance": f"{own.guidance:g}",
            "Temperature": f"{own.temperature:g}",
            "Top-k": {0: "all", None: "as released"}.get(own.top_k, own.top_k),
            "Residual tokens": "on" if own.residual else "off",
            "Diffusion steps": "the model's own" if own.diffusion_steps is None else own.diffusion_steps,
            "Mode": "fast" if is_fast(own) else "exact",
            "Model": self.info.name,
            "Size": size_of(self.info),
        }
        return [(name, str(value)) for name, value in facts.items()]


def message(status: str, note: str) -> dict[str, Any]:
    """Words alone; pictures shown stay. Numbers rise: an older run's last words don't cover a newer run."""
    return {"number": next(_numbers), "status": status, "note": note}


def truncated_note(tokens: int) -> str:
    """A word on prompts that are too long."""
    return f"The model did not read the last {tokens} token{'s' * (tokens != 1)} of this prompt." if tokens else ""


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "picture"
