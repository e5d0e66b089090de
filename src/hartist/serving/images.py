"""`POST /v1/images/generations`: a request becomes tasks, their events a reply or a stream"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Literal

from hartist.generation.pipeline import override
from hartist.generation.png import convert_png
from hartist.generation.prompts import check_prompt, check_text
from hartist.generation.shortcuts import FAST
from hartist.serving.errors import ApiError, as_api_error, body_of
from hartist.serving.metrics import Metrics
from hartist.serving.pauses import with_pauses
from hartist.serving.prompt_filter import PromptFilter
from hartist.serving.results import Results
from hartist.serving.scheduler import Scheduler
from hartist.serving.schemas import ImageData, ImageReply, ImageRequest
from hartist.serving.tasks import Failed, Finished, ImageTask, ModelInfo, Preview
from hartist.serving.tickets import Ticket

SETTINGS = ("guidance", "top_k", "top_p", "temperature", "residual", "diffusion_steps")
Kind = Literal["png", "jpeg", "webp"]
MEDIA: dict[Kind, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
KEEP_ALIVE_SECONDS = 10.0


@dataclass(frozen=True)
class ImageService:
    """What the route needs beside the request."""

    scheduler: Scheduler
    info: ModelInfo
    results: Results
    prompt_filter: PromptFilter
    metrics: Metrics
    max_prompt: int = 4000
    """Characters."""

    def tasks(self, request: ImageRequest) -> list[ImageTask]:
        """The pictures that a request asks for. Raises ApiError or UserError for what can't be made."""
        self._check_model(request.model)
        self._check_size(request.size)
        for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
            if text is not None and len(text) > self.max_prompt:
                raise ApiError(400, f"{name} may have {self.max_prompt} characters", code="string_too_long", param=name)
        self._check_prompt(request)
        changes = {name: getattr(request, name) for name in SETTINGS if getattr(request, name) is not None}
        settings = override(self.info.settings, **({**FAST, **changes} if request.fast else changes))
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        previews = preview_scales(request, self.info.num_scales)
        return [
            ImageTask(
                secrets.token_hex(8), request.prompt, seed + i, settings, request.negative_prompt or None, previews
            )
            for i in range(request.n)
        ]

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.info.name:
            raise ApiError(404, f"this server has the model {self.info.name!r}", code="model_not_found", param="model")

    def _check_size(self, size: str | None) -> None:
        own = size_of(self.info)
        if size not in (None, "auto", own):
            raise ApiError(400, f"this model makes pictures of {own}; ask for that or auto", param="size")

    async def allow(self, request: ImageRequest, arrived: float) -> None:
        """Ask the prompt filter, which may cost time.

        Raises ApiError if it says no, DeadlineExceeded if it doesn't answer by the request's deadline, and QueueFull.
        """
        if self.info.num_classes:
            return
        async with self.scheduler.in_time(arrived):
            allowed = await self.prompt_filter.allows(request.prompt)
        if not allowed:
            raise ApiError(
                400, "the prompt filter does not allow this prompt", code="content_policy_violation", param="prompt"
            )

    def _check_prompt(self, request: ImageRequest) -> None:
        if self.info.num_classes:
            if not (request.prompt.isascii() and request.prompt.isdigit() and len(request.prompt) < 10):
                raise ApiError(400, "this model takes the number of a class as its prompt", param="prompt")
            if int(request.prompt) >= self.info.num_classes:
                raise ApiError(400, f"there are classes 0 to {self.info.num_classes - 1}", param="prompt")
            if request.negative_prompt:
                raise ApiError(400, "a class-conditional model takes no negative prompt", param="negative_prompt")
            return
        check_prompt(request.prompt)
        if request.negative_prompt:
            check_text(request.negative_prompt, "the negative prompt")

    # ----------------------------------------------------------------- the two kinds of answer

    async def whole(self, request: ImageRequest, ticket: Ticket, address: Callable[[str], str]) -> ImageReply:
        """All pictures at once. `address` makes a kept picture's name an URL. Raises ApiError if one failed."""
        started = time.monotonic()
        finished: dict[str, Finished] = {}
        async for event in ticket.events():
            if isinstance(event, Failed):
                raise failure(event)
            if isinstance(event, Finished):
                finished[event.task_id] = event
        self.metrics.latency.observe(time.monotonic() - started)
        kind: Kind = request.output_format or "png"
        data = []
        for task in ticket.tasks:
            event = finished[task.id]
            encoded = await encode(event.png, kind, request.output_compression)
            if request.response_format == "url":
                place = {"url": address(self.results.add(encoded, MEDIA[kind]))}
            else:
                place = {"b64_json": base64.b64encode(encoded).decode()}
            data.append(
                ImageData(**place, seed=task.seed, blocked=event.blocked, truncated_tokens=event.truncated_tokens)
            )
        return ImageReply(created=int(time.time()), data=data, output_format=kind, size=size_of(self.info))

    async def stream(self, request: ImageRequest, ticket: Ticket) -> AsyncIterator[bytes]:
        """Server-sent events: previews as they come, then the pictures; a comment now and then while waiting."""
        started, left = time.monotonic(), len(ticket.tasks)
        index = {task.id: i for i, task in enumerate(ticket.tasks)}
        previews = dict.fromkeys(index, 0)
        kind: Kind = request.output_format or "png"
        try:
            async for event in with_pauses(ticket.events(), KEEP_ALIVE_SECONDS):
                if event is None:
                    yield b": waiting\n\n"
                    continue
                if isinstance(event, Failed):
                    raise failure(event)
                encoded = await encode(event.png, kind, request.output_compression)
                values: dict[str, Any] = {
                    "b64_json": base64.b64encode(encoded).decode(),
                    "created_at": int(time.time()),
                    "size": size_of(self.info),
                    "quality": "auto",
                    "background": "opaque",
                    "output_format": kind,
                    "image_index": index[event.task_id],
                    "seed": ticket.tasks[index[event.task_id]].seed,
                }
                if isinstance(event, Preview):
                    if not any(previews.values()):
                        self.metrics.first_preview.observe(time.monotonic() - started)
                    values |= {"partial_image_index": previews[event.task_id], "scale": event.k}
                    previews[event.task_id] += 1
                    yield sse("image_generation.partial_image", values)
                else:
                    usage = {"total_tokens": 0, "input_tokens": 0, "output_tokens": 0}
                    details = {"text_tokens": 0, "image_tokens": 0}
                    values |= {"blocked": event.blocked, "truncated_tokens": event.truncated_tokens}
                    values |= {"usage": {**usage, "input_tokens_details": details}}
                    left -= 1
                    if not left:
                        self.metrics.latency.observe(time.monotonic() - started)
                    yield sse("image_generation.completed", values)
        except Exception as error:  # the status line is sent: the error has to be an event
            yield sse("error", body_of(as_api_error(error)))
        finally:
            self.scheduler.cancel(ticket)


def preview_scales(request: ImageRequest, num_scales: int) -> tuple[int, ...]:
    """After which scales a picture is shown, spread evenly; none unless a stream was asked for."""
    if not request.stream:
        return ()
    most = num_scales - 1  # the last scale is the picture itself
    wanted = most if request.partial_images is None else min(request.partial_images, most)
    return tuple(sorted({(i + 1) * most // (wanted + 1) if wanted < most else i for i in range(wanted)}))


def failure(event: Failed) -> ApiError:
    """What a client is told about a task that failed."""
    if event.retry:
        return ApiError(503, event.message, code="worker_lost", retry_after=5)
    return ApiError(500, event.message, code="generation_failed")


def size_of(info: ModelInfo) -> str:
    """As OpenAI writes it."""
    return f"{info.width}x{info.height}"


async def encode(png: bytes, kind: Kind, quality: int | None) -> bytes:
    """A PNG in another format."""
    if kind == "png":
        return png
    return await asyncio.to_thread(convert_png, png, kind, 90 if quality is None else quality)


def sse(name: str, values: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **values})}\n\n".encode()
