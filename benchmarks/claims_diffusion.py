"""HART against a diffusion transformer: equal sizes, equally long training, many ways to draw a picture"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ablation_runs import Sizes, Workshop, say, seconds_per_step, watched
from ablations import BATCH
from claims_judge import DROPPED, Judge, Maker, Pixels, hart_maker
from dit import Dit, DitSize, DitStage, image_noise, load_dit

from hartist.evaluation.bench.macs import generation_work
from hartist.evaluation.bootstrap import percentile_interval
from hartist.evaluation.features import LITE0
from hartist.files import atomic_path
from hartist.generation.loading import find_model, load_tokenizer_of
from hartist.generation.pipeline import Pipeline, Request
from hartist.generation.sampling import SamplingSettings
from hartist.generation.shortcuts import FAST
from hartist.pixels import to_uint8
from hartist.text.encoder import TextEncoder
from hartist.text.loading import load_text_encoder
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.training.config import Phase, RunConfig
from hartist.training.loop import train
from hartist.training.parallel import World
from hartist.training.prepare import prepare_data
from hartist.training.recipes_emoji import emoji_generator

HART, DIFFUSION = "HART", "diffusion transformer"
PROBE_STEPS = 20
"""Steps of both kinds whose seconds say how many steps of one take as long as those of the other."""
DIT_GUIDANCE = (1.0, 2.0, 4.0)
DIT_STEPS = (1, 2, 4, 8, 16)
TRIED_STEPS = 8
"""With which the guidance is chosen."""
HART_GUIDANCE = (0.0, 2.0, 4.0)


@dataclass(frozen=True)
class Rival:
    """The diffusion transformer, its tokenizer and text encoder."""

    dit: Dit
    tokenizer: HybridTokenizer
    encode: Callable[[Sequence[str]], Any]
    text: tuple[int, int]
    """Tokens and width of the text states."""

    def maker(self, steps: int, guidance: float) -> Maker:
        channels, side = latent_of(self.tokenizer)
        shape = (channels, side, side)

        @torch.inference_mode()
        def make(requests: Sequence[Request]) -> Pixels:
            context = self.encode([str(request.prompt) for request in requests])
            noise = image_noise([request.seed for request in requests], shape)
            f_BChw = self.dit.sample(noise, context, steps, guidance)
            return torch.cat([to_uint8(self.tokenizer.decode_latent(f_1Chw)) for f_1Chw in f_BChw.split(1)])

        return make


def dit_size(sizes: Sizes) -> DitSize:
    """As wide and as deep as the generator, which has a residual MLP besides: 5.97 against 5.55 M parameters."""
    return DitSize(sizes.transformer.heads, sizes.transformer.depth, sizes.transformer.width // sizes.transformer.heads)


def train_dit(shop: Workshop, steps: int) -> Path:
    """A diffusion transformer trained so long on the generators' token cache; returns its run."""
    run = shop.out / f"dit-{steps}-of-{shop.budget.tokenizer}-seed{shop.seed}"
    run_config = RunConfig(
        steps=steps,
        batch_size=shop.sizes.generator_batch,
        seed=shop.seed,
        optimizer=replace(emoji_generator().run.optimizer, warmup_steps=min(50, steps // 10), ema_decay=0.99),
        log_every=max(1, steps // 20),
        picture_every=steps,
    )

    def start() -> int:
        tokenizer, encoder = parts_of(shop)
        phase = Phase(shop.sizes.image_size, shop.sizes.transformer.sides)
        prepared = prepare_data(shop.data, shop.tokens, (phase,), tokenizer, encoder, world=World(), progress=watched())
        torch.manual_seed(shop.seed)
        dit = Dit(dit_size(shop.sizes), *latent_of(tokenizer), encoder.dim)
        train_cache, validation = prepared.train[0], prepared.validation[0]
        stage = DitStage(dit, tokenizer.quantizer, train_cache, validation, run_config, prepared.key)
        return train(stage, run_config, run, progress=watched())

    shop.train(run, steps, start)
    return run


def parts_of(shop: Workshop) -> tuple[HybridTokenizer, TextEncoder]:
    """The tokenizer and text encoder of all generators."""
    text = find_model(None) / "text_encoder"
    encoder = load_text_encoder(text, num_tokens=shop.sizes.transformer.context_tokens)
    return load_tokenizer_of(shop.tokenizer(0.5)), encoder


def latent_of(tokenizer: HybridTokenizer) -> tuple[int, int]:
    """Channels and side of a latent."""
    return tokenizer.config.latent_channels, tokenizer.schedule.finest[0]


def rival(shop: Workshop) -> tuple[Rival, str]:
    """Trained for as many seconds as the generator, and what that came to."""

    def probe() -> dict[str, float]:
        brief = replace(shop, budget=replace(shop.budget, generator=PROBE_STEPS))
        batch = shop.sizes.generator_batch
        return {
            "hart": seconds_per_step(brief.generator(DROPPED), batch),
            "dit": seconds_per_step(train_dit(brief, PROBE_STEPS), batch),
        }

    seconds = shop.figures(f"claims: seconds of a step, {shop.generator_name(DROPPED)}", probe)
    steps = round(shop.budget.generator * seconds["hart"] / seconds["dit"])
    run = train_dit(shop, steps)
    tokenizer, encoder = parts_of(shop)
    dit = load_dit(run, dit_size(shop.sizes), *latent_of(tokenizer), encoder.dim)
    words = (
        f"{shop.budget.generator} steps of HART's at {seconds['hart']:.2f} s, "
        f"{steps} of the diffusion transformer's at {seconds['dit']:.2f} s"
    )
    return Rival(dit, tokenizer, encoder.encode, (encoder.num_tokens, encoder.dim)), words


@dataclass(frozen=True)
class Way:
    """A way to make pictures."""

    family: str
    label: str
    make: Maker
    macs: float
    """Of one picture, decoder included."""


def hart_ways(shop: Workshop, pipe: Pipeline, base: SamplingSettings) -> list[Way]:
    settings = {
        "": base,
        "4 diffusion steps": replace(base, diffusion_steps=4),
        "no residual tokens": replace(base, residual=False),
        "no guidance": replace(base, guidance=0.0),
        "fast": replace(base, **FAST),
    }
    tokenizer, transformer = pipe.tokenizer.config, pipe.transformer.config
    return [
        Way(
            HART,
            label,
            hart_maker(pipe, chosen),
            generation_work(tokenizer, transformer, settings=chosen).total.total,
        )
        for label, chosen in settings.items()
    ]


def dit_ways(shop: Workshop, other: Rival, guidance: float) -> list[Way]:
    config = other.tokenizer.config
    decoder = generation_work(config, shop.sizes.transformer).decode.total

    def macs(steps: int) -> float:
        latent = other.dit.sampling_macs(*latent_of(other.tokenizer), other.text, steps, guidance)
        return latent.total + decoder

    return [
        Way(DIFFUSION, f"{steps} step{'s' if steps > 1 else ''}", other.maker(steps, guidance), macs(steps))
        for steps in DIT_STEPS
    ]


def seconds_of(ways: Sequence[Way], requests: Sequence[Request], rounds: int) -> list[float]:
    """Seconds a picture, in batches: medians over turns of all ways."""
    batch = list(requests[:BATCH])
    seconds: list[list[float]] = [[] for _ in ways]
    for turn in range(rounds + 1):
        for way, own in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            way.make(batch)
            if turn:  # the first is a warm-up
                own.append((time.perf_counter() - start) / len(batch))
    return [statistics.median(own) for own in seconds]


def diffusion(shop: Workshop, judge: Judge, rounds: int, plot: Path | None) -> list[dict[str, str]]:
    pipe = Pipeline.from_pretrained(shop.generator(DROPPED) / "model")
    other, words = rival(shop)
    sizes = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (pipe.transformer, other.dit)]
    say(f"equal training: {words}; {sizes[0]:.2f} M and {sizes[1]:.2f} M parameters")
    kinds = {HART: shop.generator_name(DROPPED), DIFFUSION: f"dit, {words}"}

    def name_of(family: str, label: str, guidance: float) -> str:
        return f"{kinds[family]}, {label or 'exact'}, guidance {guidance:g}, {len(judge.prompts)} prompts"

    def best_guidance(family: str, label: str, makers: dict[float, Maker]) -> float:
        found = {g: judge.measure(name_of(family, label, g), make)["frechet"] for g, make in makers.items()}
        return min(found, key=found.__getitem__)

    settings = {g: replace(pipe.model.settings, guidance=g) for g in HART_GUIDANCE}
    hart_guidance = best_guidance(HART, "", {g: hart_maker(pipe, own) for g, own in settings.items()})
    makers = {g: other.maker(TRIED_STEPS, g) for g in DIT_GUIDANCE}
    dit_guidance = best_guidance(DIFFUSION, f"{TRIED_STEPS} steps", makers)
    base = settings[hart_guidance]
    say(f"guidance with the smallest distance: HART {hart_guidance:g}, diffusion transformer {dit_guidance:g}")

    ways = [*hart_ways(shop, pipe, base), *dit_ways(shop, other, dit_guidance)]
    seconds = seconds_of(ways, judge.requests(), rounds)
    rows, points = [], []
    for way, taken in zip(ways, seconds, strict=True):
        name = name_of(way.family, way.label, hart_guidance if way.family == HART else dit_guidance)
        figures = judge.measure(name, way.make)
        interval = percentile_interval(judge.resampled(name))
        label = f"{way.family}{', ' if way.label else ''}{way.label}"
        row = judge.row(label, figures)
        row["Fréchet, 95 %"] = f"{interval.low:.1f} … {interval.high:.1f}"
        row |= {"ms a picture": f"{1000 * taken:.0f}", "GMACs": f"{way.macs / 1e9:.1f}"}
        rows.append(row)
        points.append((way, taken, figures["frechet"], interval))
    if plot is not None:
        draw_curves(points, plot)
    return rows


def draw_curves(points: Sequence[tuple[Way, float, float, Any]], target: Path) -> None:
    """Quality against seconds and against operations."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for family, colour in ((HART, "#4477aa"), (DIFFUSION, "#cc6677")):
        own = [point for point in points if point[0].family == family]
        for axis, values in ((axes[0], [p[1] for p in own]), (axes[1], [p[0].macs / 1e9 for p in own])):
            heights = [p[2] for p in own]
            errors = [[max(0, p[2] - p[3].low) for p in own], [max(0, p[3].high - p[2]) for p in own]]
            style = "o" if family == HART else "o-"
            axis.errorbar(values, heights, yerr=errors, fmt=style, color=colour, label=family, capsize=2)
            for point, x, y in zip(own, values, heights, strict=True):
                text = point[0].label or "exact"
                axis.annotate(text, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=7)
    axes[0].set_xlabel("seconds a picture, batches of 8")
    axes[1].set_xlabel("GMACs a picture")
    axes[0].set_ylabel(f"Fréchet distance ({LITE0})")
    for axis in axes:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
    axes[0].legend(fontsize="small")
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format=target.suffix[1:], dpi=130)
