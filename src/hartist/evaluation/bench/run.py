"""One benchmark: build or load a model, generate a few batches, and put their cost together"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from hartist.errors import UserError
from hartist.evaluation.bench import models
from hartist.evaluation.bench.hardware import Peak, machine, peak, reset_peak
from hartist.evaluation.bench.macs import Work, generation_work
from hartist.evaluation.bench.operators import Kind, profile_kinds
from hartist.evaluation.bench.roofline import MachinePeak, Share, measure_peak, shares
from hartist.evaluation.bench.text_cost import TextCost, time_released_text, time_text
from hartist.evaluation.bench.timing import Timing, requests_for, time_run
from hartist.generation.devices import choose_device, choose_dtype
from hartist.generation.pipeline import Pipeline, override
from hartist.generation.sampling import SamplingSettings
from hartist.precision import computes_bf16
from hartist.transformer.compiled import refuse_both


@dataclass(frozen=True)
class BenchSettings:
    """What is measured, and how often."""

    preset: str = "hart-256"
    model: str | None = None
    """A model to load; None: random weights of the preset."""
    size: int | None = None
    """Pixels along a side; None: the model's own."""
    batch: int = 1
    repeats: int = 3
    """Timed runs."""
    warmup: int = 1
    """Runs before them, which don't count."""
    dtype: str | None = None
    """None: bfloat16 where the device has it, else float32; for a given model what `generate` would take."""
    device: str | None = None
    int8: bool = False
    """The transformer's products in eight bits (CPU)."""
    compile: bool = False
    """The transformer's blocks compiled; the first run, which compiles them, counts as warm-up."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Sampling settings that differ from the model's own; fast mode is some of them."""
    roofline: bool = True
    """Measure the machine's peak too."""
    operators: bool = False
    """One more run under the profiler."""
    text: bool = False
    """Time the released text encoder too (random weights, text models; a given model's own is always timed)."""
    text_model: Path | None = None
    tokenizer: Path | None = None
    """Where a released model's parts are, if not beside it."""


@dataclass(frozen=True)
class BenchResult:
    """Cost of one batch."""

    settings: BenchSettings
    sampling: SamplingSettings
    """As it was in effect."""
    machine: dict[str, Any]
    dtype: str
    parameters: dict[str, int]
    image_size: tuple[int, int]
    grids: tuple[tuple[int, int], ...]
    timing: Timing
    first_run_seconds: float
    """Of the very first run, which warms caches up and runs the unconditional prefix."""
    memory: Peak
    """Building or loading the model, and generating."""
    work: Work
    text: TextCost | None = None
    peak: MachinePeak | None = None
    shares: tuple[Share, ...] = ()
    kinds: tuple[Kind, ...] = ()

    @property
    def images_per_second(self) -> float:
        return self.settings.batch / self.timing.total.median

    @property
    def scale_names(self) -> tuple[str, ...]:
        return scale_names(self.grids)


def run_bench(settings: BenchSettings) -> BenchResult:
    """Generate images and take their cost. Raises UserError for an unknown preset, model, size or device."""
    if settings.repeats < 1 or settings.warmup < 0:
        raise UserError(
            f"{settings.repeats} repeats after {settings.warmup} runs of warm-up; repeats must be at least 1"
        )
    device = choose_device(settings.device)
    reset_peak(device)
    pipe = open_pipeline(settings, device)
    sampling = override(pipe.model.settings, **settings.sampling)
    requests = requests_for(pipe, settings.batch)
    runs = [time_run(pipe, requests, sampling) for _ in range(settings.warmup + settings.repeats)]
    memory = peak(device)  # before anything else is measured
    timing = Timing.of(runs[settings.warmup :])
    transformer, schedule = pipe.transformer, pipe.transformer.schedule
    work = generation_work(pipe.tokenizer.config, transformer.config, schedule, settings=sampling, batch=settings.batch)
    measured: MachinePeak | None = None
    against_peak: tuple[Share, ...] = ()
    kinds: tuple[Kind, ...] = ()
    if settings.roofline:
        rows = schedule.lengths[-1] * settings.batch * (2 if sampling.guidance > 0 else 1)
        measured = measure_peak(transformer.config, rows, transformer.dtype, device)
        against_peak = tuple(shares(timing, work, measured.flops_per_second, scale_names(schedule.grids)))
    if settings.operators:
        kinds = tuple(profile_kinds(lambda: time_run(pipe, requests, sampling), (transformer, pipe.tokenizer), device))
    return BenchResult(
        settings=settings,
        sampling=sampling,
        machine=machine(device),
        dtype=str(transformer.dtype).removeprefix("torch."),
        parameters={
            "transformer": sum(p.numel() for p in transformer.parameters()),
            "tokenizer": sum(p.numel() for p in pipe.tokenizer.parameters()),
        },
        image_size=pipe.image_size,
        grids=schedule.grids,
        timing=timing,
        first_run_seconds=runs[0].total,
        memory=memory,
        work=work,
        text=_time_text(settings, pipe, device),
        peak=measured,
        shares=against_peak,
        kinds=kinds,
    )


def _time_text(settings: BenchSettings, pipe: Pipeline, device: torch.device) -> TextCost | None:
    warmup, repeats = settings.warmup, settings.repeats
    if settings.model is not None and pipe.model.text_encoder is not None:
        return time_text(pipe.model.text_encoder, device, warmup=warmup, repeats=repeats)
    if settings.model is None and settings.text and not pipe.is_class_conditional:
        return time_released_text(pipe.transformer.dtype, device, warmup=warmup, repeats=repeats)
    return None


def scale_names(grids: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    return tuple(f"{h}×{w}" for h, w in grids)


def open_pipeline(settings: BenchSettings, device: torch.device) -> Pipeline:
    """The model that is measured, at its size."""
    if settings.model is None:
        preset = models.find_preset(settings.preset, settings.size)
        refuse_both(int8=settings.int8, compile=settings.compile)
        dtype = choose_dtype(settings.dtype or ("bfloat16" if computes_bf16(device) else "float32"), device)
        pipe = models.random_pipeline(preset, dtype, device)
        pipe.speed_up(int8=settings.int8, compile=settings.compile)
        return pipe
    pipe = Pipeline.from_pretrained(
        settings.model,
        device=str(device),
        dtype=settings.dtype,
        text_model=settings.text_model,
        tokenizer=settings.tokenizer,
        int8=settings.int8,
        compile=settings.compile,
    )
    if settings.size is not None:
        models.resize(pipe, settings.size)
    return pipe


def to_json(result: BenchResult) -> dict[str, Any]:
    """The figures as plain data: seconds as median, lowest, highest and all runs; MACs; bytes."""
    values = asdict(result)
    values["settings"] = {name: _plain(value) for name, value in values["settings"].items()}
    timing = result.timing
    values["scales"] = [
        {"grid": list(grid), "tokens": grid[0] * grid[1], "seconds": seconds_json(seconds), **asdict(macs)}
        for grid, seconds, macs in zip(result.grids, timing.scales, result.work.scales, strict=True)
    ]
    parts = ("transformer", "residual", "decode", "total")
    values["timing"] = {name: seconds_json(getattr(timing, name)) for name in parts}
    values["macs"] = {name: asdict(getattr(result.work, name)) for name in (*parts, "shared_prefix")}
    values["total_seconds"] = timing.total.median
    values["images_per_second"] = result.images_per_second
    if result.text is not None:
        values["text"]["seconds"] = seconds_json(result.text.seconds)
    if result.peak is not None:
        values["peak"]["flops_per_second"] = result.peak.flops_per_second
        values["peak"]["layers_flops_per_second"] = result.peak.layers_flops_per_second
    del values["work"], values["grids"]
    return values


def seconds_json(seconds: Any) -> dict[str, Any]:
    """Of a `Seconds`."""
    return {"median": seconds.median, "low": seconds.low, "high": seconds.high, "runs": list(seconds.runs)}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
