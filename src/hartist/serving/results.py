"""Finished pictures that are fetched by an address of their own (`response_format: url`), kept for an hour at most"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    data: bytes
    media_type: str
    until: float


class Results:
    """In memory, bounded in bytes and in time; an address can't be guessed. The oldest make room."""

    def __init__(self, max_bytes: int = 256 << 20, seconds: float = 3600.0) -> None:
        self.max_bytes, self.seconds = max_bytes, seconds
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._bytes = 0

    def add(self, data: bytes, media_type: str) -> str:
        """Keep a picture; returns its name."""
        self._drop_old(time.monotonic())
        name = secrets.token_urlsafe(16)
        self._kept[name] = Kept(data, media_type, time.monotonic() + self.seconds)
        self._bytes += len(data)
        while self._bytes > self.max_bytes:
            self._drop_first()
        return name

    def get(self, name: str) -> Kept | None:
        """A picture that is still kept."""
        self._drop_old(time.monotonic())
        return self._kept.get(name)

    def _drop_old(self, now: float) -> None:
        while self._kept and next(iter(self._kept.values())).until < now:
            self._drop_first()

    def _drop_first(self) -> None:
        _, kept = self._kept.popitem(last=False)
        self._bytes -= len(kept.data)
