"""Timing a generation part by part: every scale, the residual tokens, the decoder."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from hartist.errors import UserError
from hartist.generation.devices import now
from hartist.generation.loop import ScaleResult
from hartist.generation.pipeline import Pipeline, Request
from hartist.generation.sampling import SamplingSettings


@dataclass(frozen=True)
class Seconds:
    """One quantity over several runs."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def low(self) -> float:
        return min(self.runs)

    @property
    def high(self) -> float:
        return max(self.runs)


@dataclass(frozen=True)
class Run:
    """Seconds of the parts of one batch."""

    scales: tuple[float, ...]
    """Without residual tokens; the first one includes the prefix."""
    residual: float
    decode: float
    total: float


@dataclass(frozen=True)
class Timing:
    """Seconds of the parts of one batch over several runs."""

    scales: tuple[Seconds, ...]
    transformer: Seconds
    """All scales together."""
    residual: Seconds
    decode: Seconds
    total: Seconds

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Timing:
        """Of at least one run."""
        return cls(
            tuple(Seconds(values) for values in zip(*(run.scales for run in runs), strict=True)),
            Seconds(tuple(sum(run.scales) for run in runs)),
            Seconds(tuple(run.residual for run in runs)),
            Seconds(tuple(run.decode for run in runs)),
            Seconds(tuple(run.total for run in runs)),
        )


def time_run(pipe: Pipeline, requests: Sequence[Request], settings: SamplingSettings) -> Run:
    """Make one batch as the pipeline makes it, looking at the clock after every part.

    The time of a part ends when the device is done with it.
    """
    device = pipe.device
    start = before = now(device)
    scales: list[float] = []
    residual = 0.0
    result: ScaleResult | None = None
    for result in pipe.scales(requests, settings):
        after = now(device)
        scales.append(after - before - result.residual_seconds)
        residual += result.residual_seconds
        before = after
    assert result is not None
    f_hat_BChw = result.f_hat_BChw
    del result  # its logits are the largest tensor alive here
    before = now(device)
    pipe.decode(f_hat_BChw)
    end = now(device)
    return Run(tuple(scales), residual, end - before, end - start)


def requests_for(pipe: Pipeline, batch: int) -> list[Request]:
    """Prompts, or labels for a class model. Raises UserError for less than one image."""
    if batch < 1:
        raise UserError(f"a batch of {batch}; it must be at least 1")
    if pipe.is_class_conditional:
        classes = pipe.transformer.config.num_classes
        return [Request(i % classes, i) for i in range(batch)]
    return [Request(PROMPT, i) for i in range(batch)]


PROMPT = "a red fox sitting in fresh snow under tall pine trees, soft morning light, detailed photograph"
