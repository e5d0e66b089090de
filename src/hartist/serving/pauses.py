"""Waiting for events without being silent, or deaf, for long"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, TypeVar

T = TypeVar("T")


async def with_pauses(
    events: AsyncIterator[T], seconds: float, interruption: asyncio.Future[Any] | None = None
) -> AsyncGenerator[T | None, None]:
    """The events, and None whenever none came for so many seconds or once the interruption is done."""
    pending: asyncio.Future[T] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(events))
            awaited: set[asyncio.Future[Any]] = {pending} if interruption is None else {pending, interruption}
            await asyncio.wait(awaited, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if not pending.done():
                yield None
                continue
            try:
                event = pending.result()
            except StopAsyncIteration:
                return
            pending = None
            yield event
    finally:
        if pending is not None:
            pending.cancel()
