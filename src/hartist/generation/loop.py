"""The loop over scales: predict, sample, accumulate, coarse to fine; denoise at the last scale (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hartist.generation.devices import now
from hartist.generation.guidance import guidance_strength, guide
from hartist.generation.noise import Noise
from hartist.generation.sampling import CHUNK, SamplingSettings, sample_ids, smooth_vectors
from hartist.generation.shortcuts import attended_spans, cells_to_compute, plan_guidance
from hartist.memory import give_back_memory
from hartist.residual.denoise import denoise
from hartist.residual.schedule import respaced_schedule
from hartist.text.encoder import TextContext
from hartist.tokenizer.quantizer import Quantizer
from hartist.tokenizer.residual_loop import area_downsample, map_to_tokens, residual_loop, tokens_to_map
from hartist.transformer.model import Condition, ScaleTransformer
from hartist.transformer.prefix import Prefix, forward_prefix, join_prefix


@dataclass(frozen=True)
class ScaleResult:
    """One finished scale of a batch of images."""

    k: int
    num_scales: int
    grid: tuple[int, int]
    ids_Bl: Int[Tensor, "b l"]
    """−1 in cells that were not computed (`last_scale_share`)."""
    logits_BlV: Float[Tensor, "b l v"]
    """After guidance, before filtering; −∞ in cells that were not computed."""
    f_hat_BChw: Float[Tensor, "b c h w"]
    """What the decoder would show now; at the last scale with residual tokens."""
    discrete_f_hat_BChw: Float[Tensor, "b c h w"]
    """The same without residual tokens."""
    seconds: float
    """Time this scale took, residual tokens included."""
    residual_seconds: float


Scales = Generator[ScaleResult, list[int] | None, None]
"""A batch under way: yields finished scales, takes the rows to go on with."""


def generate_scales(
    model: ScaleTransformer,
    quantizer: Quantizer,
    condition: TextContext | Int[Tensor, " b"],
    unconditional: TextContext | Int[Tensor, " b"] | Prefix,
    settings: SamplingSettings,
    noise: Noise,
) -> Scales:
    """Generate a batch, yielding after every scale.

    `condition` has one row an image, `unconditional` (or a negative prompt) as many; or it is a prefix that was run
    before, and serves all rows. With guidance 0 the unconditional branch is not computed. Rows that are sent in
    (`scales.send([0, 2])`, at least one) are those to go on with: the other images cost nothing from there on, and
    these come out as they would have.
    """
    scales = _generate(model, quantizer, condition, unconditional, settings, noise)
    rows: list[int] | None = None
    while True:
        # inference mode while a scale is computed, not while the caller looks at it
        with torch.inference_mode():
            try:
                result = scales.send(rows)
            except StopIteration:
                return
        rows = yield result


def _generate(
    model: ScaleTransformer,
    quantizer: Quantizer,
    condition: TextContext | Int[Tensor, " b"],
    unconditional: TextContext | Int[Tensor, " b"] | Prefix,
    settings: SamplingSettings,
    noise: Noise,
) -> Scales:
    schedule, batch = model.schedule, len(condition)
    hold_last = model.config.residual is not None
    plan = plan_guidance(settings, len(schedule), has_residual=hold_last)
    guided_scales = plan.guided_scales
    shared = unconditional if guided_scales and isinstance(unconditional, Prefix) else None
    if guided_scales and not isinstance(unconditional, Prefix):
        condition = _stack(condition, unconditional)
    own = model.prepare(condition)
    prepared = join_prefix(own, shared) if shared is not None else own
    cache = model.new_cache(2 * batch if guided_scales else batch)
    device = quantizer.codebook.device
    state: dict[str, Tensor | float] = {}

    def choose(k: int, f_hat_BChw: Tensor) -> Tensor:
        nonlocal prepared
        guided = k < guided_scales
        if k == guided_scales and k > 0:
            conditional = list(range(batch))
            prepared = prepared.select(conditional)
            cache.select(conditional)
        if device.type == "cpu" and schedule.is_last(k) and schedule.lengths[k] > CHUNK:
            give_back_memory()  # there is never as much alive as now
        kept_Bm = None
        if schedule.is_last(k) and k > 0 and settings.last_scale_share < 1:
            kept_Bm = cells_to_compute(f_hat_BChw, settings.last_scale_share)
        if k == 0 and shared is not None:
            hidden = forward_prefix(model, own, shared, cache)
        else:
            input_BlC = map_to_tokens(area_downsample(f_hat_BChw, schedule.grids[k])) if k > 0 else None
            hidden = model.forward_scale(
                k,
                torch.cat([input_BlC, input_BlC]) if guided and input_BlC is not None else input_BlC,
                prepared,
                cache,
                spans=attended_spans(schedule, model.config.prefix_tokens, k, settings.attended_scales),
                kept_Bm=torch.cat([kept_Bm, kept_Bm]) if guided and kept_Bm is not None else kept_Bm,
            )
        logits_BlV = guided_logits(model, hidden, prepared, plan.strengths[k] if guided else None)
        uniform_Bl = noise.uniform(schedule.lengths[k])
        if kept_Bm is not None:
            uniform_Bl = uniform_Bl.gather(1, kept_Bm)
        ids_Bl = sample_ids(logits_BlV, settings, k, uniform_Bl)
        vectors_BlC = quantizer.lookup(ids_Bl)
        codes_BlC = vectors_BlC
        if settings.smoothing:
            fraction = guidance_strength(1.0, k, len(schedule), hold_last=hold_last)
            gumbel_BlV = noise.gumbel(schedule.lengths[k], logits_BlV.shape[-1])
            if kept_Bm is not None:
                gumbel_BlV = torch.take_along_dim(gumbel_BlV, kept_Bm[..., None], 1)
            vectors_BlC = smooth_vectors(logits_BlV, fraction, gumbel_BlV, quantizer.codebook)
        state.update(ids=ids_Bl, logits=logits_BlV, residual_seconds=0.0)
        state["vectors"] = _fill_cells(vectors_BlC, kept_Bm, schedule.lengths[k])
        if schedule.is_last(k) and hold_last and settings.residual:
            start = now(device)
            residual_BlC = residual_tokens(model, hidden, codes_BlC, plan.residual, settings, noise, kept_Bm)
            vectors_BlC = vectors_BlC + residual_BlC
            state["residual_seconds"] = now(device) - start
        if kept_Bm is not None:
            state["ids"] = _fill_cells(ids_Bl[..., None], kept_Bm, schedule.lengths[k], -1.0)[..., 0]
            state["logits"] = _fill_cells(logits_BlV, kept_Bm, schedule.lengths[k], -torch.inf)
        return _fill_cells(vectors_BlC, kept_Bm, schedule.lengths[k])

    start = quantizer.empty_latent(batch, schedule)
    before = start
    started = now(device)
    loop = residual_loop(choose, start, schedule, quantizer.phi_function, phi_at_last_scale=not hold_last)
    replacement: Tensor | None = None
    for _ in schedule.grids:
        step = loop.send(replacement)
        replacement = None
        discrete = step.f_hat_BChw
        if schedule.is_last(step.k) and hold_last:
            discrete = before + tokens_to_map(state["vectors"], schedule.finest)  # type: ignore[arg-type]
        ended = now(device)
        rows = yield ScaleResult(
            k=step.k,
            num_scales=len(schedule),
            grid=schedule.grids[step.k],
            ids_Bl=state["ids"],  # type: ignore[arg-type]
            logits_BlV=state["logits"],  # type: ignore[arg-type]
            f_hat_BChw=step.f_hat_BChw,
            discrete_f_hat_BChw=discrete,
            seconds=ended - started,
            residual_seconds=float(state["residual_seconds"]),
        )
        before = step.f_hat_BChw
        if rows is not None and not schedule.is_last(step.k):
            both = rows + [row + batch for row in rows] if step.k < guided_scales else rows
            prepared, batch, before = prepared.select(both), len(rows), before[rows]
            cache.select(both)
            noise.select(rows)
            replacement = before
        started = now(device)


def guided_logits(
    model: ScaleTransformer, hidden: Float[Tensor, "r l d"], condition: Condition, t: float | None
) -> Float[Tensor, "b l v"]:
    """Logits with guidance t of conditional and, behind them, unconditional rows (None: of all rows, without).

    Some cells at a time: both branches of the last scale at 1024 px and what guidance makes of them would be 320 MiB.
    """
    batch = len(hidden) if t is None else len(hidden) // 2

    def logits_of(part: Tensor) -> Tensor:
        logits = model.logits(part, condition)
        return logits if t is None else guide(logits[:batch], logits[batch:], t)

    cells = hidden.shape[1]
    if cells <= CHUNK:
        return logits_of(hidden)
    found_BlV = torch.empty(batch, cells, model.config.vocab_size, device=hidden.device)
    for part, out in zip(hidden.split(CHUNK, 1), found_BlV.split(CHUNK, 1), strict=True):
        out.copy_(logits_of(part))
    return found_BlV


def residual_tokens(
    model: ScaleTransformer,
    hidden: Float[Tensor, "r l d"],
    code_BlC: Float[Tensor, "b l c"],
    t: float,
    settings: SamplingSettings,
    noise: Noise,
    kept_Bl: Int[Tensor, "b l"] | None = None,
) -> Float[Tensor, "b l c"]:
    """Denoise the residual tokens of the last scale, guided with strength t.

    `hidden` holds the conditional rows first, and the unconditional ones too unless t is 0. `kept_Bl`: which cells
    these are, if not all; each gets the noise it would have among all.
    """
    config = model.config.residual
    assert config is not None
    batch, l, C = code_BlC.shape
    cells = l if kept_Bl is None else model.schedule.lengths[-1]

    def normal(_: int) -> Tensor:
        drawn = noise.normal(cells, C)
        return (
            drawn
            if kept_Bl is None
            else torch.take_along_dim(drawn.view(-1, cells, C), kept_Bl[..., None], 1).flatten(0, 1)
        )

    off = t in (0.0, 1.0)  # 1 means "off", as released
    if off:  # unconditional rows would be thrown away
        z_RlD = model.residual_condition(hidden[:batch], code_BlC)
    else:
        z_RlD = model.residual_condition(hidden, torch.cat([code_BlC, code_BlC]))
    tokens_RC = denoise(
        model.residual_mlp,
        z_RlD.flatten(0, 1),
        1.0 if off else t,
        normal,
        respaced_schedule(settings.diffusion_steps or config.steps),
        config.target_scale,
        settings.residual_temperature,
    )
    return tokens_RC[: batch * l].view(batch, l, C)


def _fill_cells(x_BmC: Tensor, kept_Bm: Tensor | None, cells: int, value: float = 0.0) -> Tensor:
    """All cells of a scale: the kept ones, and `value` in the others."""
    if kept_Bm is None:
        return x_BmC
    full_BlC = x_BmC.new_full((len(x_BmC), cells, x_BmC.shape[-1]), value)
    return full_BlC.scatter(1, kept_Bm[..., None].expand_as(x_BmC), x_BmC)


def _stack(condition: TextContext | Tensor, unconditional: TextContext | Tensor) -> TextContext | Tensor:
    if isinstance(condition, TextContext):
        assert isinstance(unconditional, TextContext)
        return TextContext.cat([condition, unconditional])
    assert isinstance(unconditional, Tensor)
    return torch.cat([condition, unconditional])
