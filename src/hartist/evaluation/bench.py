"""`hartist bench`: where the time and the memory of generation go, on random weights of any preset."""

from __future__ import annotations

import platform
import resource
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hartist.config import TokenizerConfig, TransformerConfig
from hartist.errors import UserError
from hartist.generation.loop import generate_scales
from hartist.generation.noise import ImageNoise
from hartist.generation.pipeline import choose_device, choose_dtype, fast_layout
from hartist.generation.sampling import SamplingSettings
from hartist.precision import computes_bf16
from hartist.presets import PRESETS
from hartist.text.encoder import TextContext, unconditional_context
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.transformer.model import ScaleTransformer


@dataclass(frozen=True)
class BenchSettings:
    preset: str = "hart-256"
    batch: int = 1
    repeats: int = 1
    """Timed runs; medians are reported."""
    warmup: int = 0
    """Runs before them that are reported as the first run, but not counted."""
    dtype: str | None = None
    """None: bfloat16 where the device has it, else float32."""
    device: str | None = None
    guidance: float = 4.5
    threads: int | None = None


@dataclass(frozen=True)
class BenchResult:
    """Seconds are of one batch; memory is the process's peak, bytes."""

    settings: BenchSettings
    machine: dict[str, Any]
    image_size: tuple[int, int]
    scales: list[dict[str, Any]]
    """Per scale: side, tokens, seconds without residual tokens."""
    transformer_seconds: float
    residual_seconds: float
    decode_seconds: float
    total_seconds: float
    first_run_seconds: float
    all_totals: list[float]
    peak_memory_bytes: int
    cuda_peak_bytes: int | None = field(default=None)


def run_bench(settings: BenchSettings) -> BenchResult:
    """Generate images with random weights and take the times. Text states are random.

    Speed does not depend on the values of weights. Raises UserError for an unknown preset or device.
    """
    if settings.preset not in PRESETS:
        raise UserError(f"no preset {settings.preset!r}; there are {', '.join(PRESETS)}")
    if settings.batch < 1 or settings.repeats < 1 or settings.warmup < 0:
        raise UserError("batch and repeats must be at least 1, warmup at least 0")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype or ("bfloat16" if computes_bf16(device) else "float32"), device)
    settings = replace(settings, dtype=str(dtype).removeprefix("torch."))
    tokenizer_config, transformer_config = PRESETS[settings.preset]()
    tokenizer, transformer = random_model(tokenizer_config, transformer_config, dtype, device)
    runs = [_one_run(tokenizer, transformer, settings, device) for _ in range(settings.warmup + settings.repeats)]
    counted = runs[settings.warmup :]
    schedule = transformer.schedule
    scales = [
        {
            "grid": list(schedule.grids[k]),
            "tokens": schedule.lengths[k],
            "seconds": statistics.median(run["scales"][k] for run in counted),
        }
        for k in range(len(schedule))
    ]
    h, w = schedule.finest
    factor = tokenizer_config.downsampling
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return BenchResult(
        settings=settings,
        machine=machine(device),
        image_size=(h * factor, w * factor),
        scales=scales,
        transformer_seconds=statistics.median(sum(run["scales"]) for run in counted),
        residual_seconds=statistics.median(run["residual"] for run in counted),
        decode_seconds=statistics.median(run["decode"] for run in counted),
        total_seconds=statistics.median(run["total"] for run in counted),
        first_run_seconds=runs[0]["total"],
        all_totals=[run["total"] for run in runs],
        peak_memory_bytes=peak if sys.platform == "darwin" else peak * 1024,
        cuda_peak_bytes=torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    )


def random_model(
    tokenizer_config: TokenizerConfig, transformer_config: TransformerConfig, dtype: torch.dtype, device: torch.device
) -> tuple[HybridTokenizer, ScaleTransformer]:
    """Both networks with small random weights, built without ever holding a second copy."""
    modules: list[nn.Module] = []
    with torch.device("meta"):
        built = HybridTokenizer(tokenizer_config), ScaleTransformer(transformer_config)
    for module in built:
        module = module.to(dtype).to_empty(device=device)
        generator = torch.Generator(device).manual_seed(0)
        for parameter in module.parameters():
            if parameter.ndim > 1:
                nn.init.uniform_(parameter, -0.02, 0.02, generator=generator)
            else:
                nn.init.ones_(parameter)
        modules.append(module.requires_grad_(False).eval())
    tokenizer, transformer = modules
    assert isinstance(tokenizer, HybridTokenizer)
    assert isinstance(transformer, ScaleTransformer)
    return fast_layout(tokenizer), transformer


def _one_run(
    tokenizer: HybridTokenizer, transformer: ScaleTransformer, settings: BenchSettings, device: torch.device
) -> dict[str, Any]:
    config = transformer.config
    condition: TextContext | torch.Tensor
    unconditional: TextContext | torch.Tensor
    if config.condition == "text":
        states = torch.randn(settings.batch, config.context_tokens, config.context_dim, device=device)
        mask = torch.ones(settings.batch, config.context_tokens, dtype=torch.bool, device=device)
        condition = TextContext(states, mask, mask.long().cumsum(1) - 1)
        unconditional = unconditional_context(condition)
    else:
        condition = torch.arange(settings.batch, device=device) % config.num_classes
        unconditional = torch.full_like(condition, config.num_classes)
    started = _now(device)
    seconds: list[float] = []
    residual = 0.0
    result = None
    for result in generate_scales(
        transformer,
        tokenizer.quantizer,
        condition,
        unconditional,
        SamplingSettings(guidance=settings.guidance),
        ImageNoise(range(settings.batch), device),
    ):
        seconds.append(result.seconds - result.residual_seconds)
        residual += result.residual_seconds
    assert result is not None
    f_hat = result.f_hat_BChw
    del result  # the logits of the last scale are the largest tensor alive here
    decode_started = _now(device)
    with torch.inference_mode():
        for row in f_hat.split(1):
            tokenizer.decode_latent(row)
    finished = _now(device)
    return {
        "scales": seconds,
        "residual": residual,
        "decode": finished - decode_started,
        "total": finished - started,
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    return {
        "cpu": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }


def format_bench(result: BenchResult) -> str:
    """The result as a table for the terminal."""
    s = result.settings
    h, w = result.image_size
    lines = [
        f"{s.preset}: {h}×{w} px, batch {s.batch}, {s.dtype}, guidance {s.guidance}, random weights",
        "{cpu}, {threads} threads, device {device}, torch {torch}".format(**result.machine),
        "",
        f"{'scale':>8} {'tokens':>8} {'seconds':>9}",
    ]
    lines += [
        f"{row['grid'][0]:>4}×{row['grid'][1]:<3} {row['tokens']:>8} {row['seconds']:>9.3f}" for row in result.scales
    ]
    memory = result.cuda_peak_bytes if result.cuda_peak_bytes is not None else result.peak_memory_bytes
    lines += [
        "",
        f"transformer {result.transformer_seconds:8.3f} s",
        f"residual    {result.residual_seconds:8.3f} s",
        f"decoder     {result.decode_seconds:8.3f} s",
        f"total       {result.total_seconds:8.3f} s   (median of {s.repeats}; all runs: "
        + ", ".join(f"{t:.2f}" for t in result.all_totals)
        + ")",
        f"peak memory {memory / 2**30:8.2f} GiB",
    ]
    return "\n".join(lines)


def to_json(result: BenchResult) -> dict[str, Any]:
    return asdict(result)
