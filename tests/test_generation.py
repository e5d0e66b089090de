"""The loop over scales: what it yields, what it depends on, and that training sees what generation sees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hartist.config import ResidualConfig
from hartist.generation import loop
from hartist.generation.guidance import guidance_strength, guide
from hartist.generation.loop import ScaleResult, generate_scales, residual_tokens
from hartist.generation.noise import ImageNoise
from hartist.generation.sampling import SamplingSettings, smooth_vectors
from hartist.generation.shortcuts import FAST
from hartist.text.encoder import TextContext, unconditional_context
from hartist.tokenizer.residual_loop import tokens_to_map
from hartist.transformer.model import ScaleTransformer
from hartist.transformer.prefix import run_prefix
from small import RECTANGLES, VAR, normal, random_context, random_quantizer, random_transformer

MODELS: dict[str, dict[str, Any]] = {
    "text": {},
    "text, axial, rectangles": {"rope": "axial", "sides": RECTANGLES},
    "text without residual tokens": {"residual": None, "modulation": "none"},
    "var": VAR,
    "class with residual tokens": VAR | {"residual": ResidualConfig(width=32, depth=1, steps=4), "sides": (2, 3, 4)},
    "one scale": VAR | {"sides": (4,)},
}
SETTINGS = SamplingSettings(guidance=3.0, top_k=0)


def conditions(model: ScaleTransformer, rows: int) -> tuple[Any, Any]:
    if model.config.condition == "text":
        context = random_context(rows)
        return context, unconditional_context(context)
    return torch.arange(rows) % 7, torch.full((rows,), 7)


def generate(
    model: ScaleTransformer,
    settings: SamplingSettings = SETTINGS,
    seeds: tuple[int, ...] = (0, 1),
    condition: TextContext | Tensor | None = None,
    unconditional: TextContext | Tensor | None = None,
) -> list[ScaleResult]:
    quantizer = random_quantizer(sides=model.config.sides)
    own = conditions(model, len(seeds))
    return list(
        generate_scales(
            model,
            quantizer,
            own[0] if condition is None else condition,
            own[1] if unconditional is None else unconditional,
            settings,
            ImageNoise(seeds),
        )
    )


def select(condition: TextContext | Tensor, i: int) -> TextContext | Tensor:
    return condition.select([i]) if isinstance(condition, TextContext) else condition[i : i + 1]


# --------------------------------------------------------------------- what is yielded


@pytest.mark.parametrize("changes", [{"guidance": 0.0}, {}, FAST], ids=["alone", "guided", "fast"])
@pytest.mark.parametrize("name", ["text", "class with residual tokens"])
def test_logits_that_are_computed_part_by_part_are_the_same(
    name: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, settings = random_transformer(**MODELS[name]), replace(SETTINGS, **changes)
    expected = generate(model, settings)
    monkeypatch.setattr(loop, "CHUNK", 3)
    for own, other in zip(generate(model, settings), expected, strict=True):
        torch.testing.assert_close(own.logits_BlV, other.logits_BlV, rtol=0, atol=1e-5)
        assert torch.equal(own.ids_Bl, other.ids_Bl)


@pytest.mark.parametrize("name", MODELS)
def test_every_scale_is_yielded_in_order_and_adds_its_codes(name: str) -> None:
    model = random_transformer(**MODELS[name])
    results = generate(model)
    schedule = model.schedule
    assert [r.k for r in results] == list(range(len(schedule)))
    assert [r.grid for r in results] == list(schedule.grids)
    assert [r.ids_Bl.shape for r in results] == [(2, length) for length in schedule.lengths]
    assert all(r.logits_BlV.shape == (*r.ids_Bl.shape, 32) for r in results)
    assert {r.num_scales for r in results} == {len(schedule)}
    assert all(r.seconds >= r.residual_seconds >= 0 for r in results)
    assert len(results[-1].ids_Bl.unique()) > 5  # or the tests here would see little

    quantizer = random_quantizer(sides=model.config.sides)
    hybrid = model.config.residual is not None
    steps = quantizer.steps_from_ids([r.ids_Bl for r in results], phi_at_last_scale=not hybrid)
    for result, step in zip(results, steps, strict=True):
        torch.testing.assert_close(result.discrete_f_hat_BChw, step.f_hat_BChw, rtol=1e-5, atol=1e-5)
        if not (hybrid and schedule.is_last(result.k)):
            assert torch.equal(result.f_hat_BChw, result.discrete_f_hat_BChw)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "changes", [{"guidance": 0.0}, {}, FAST, {"unguided_scales": 2}], ids=["alone", "", "fast", "2"]
)
def test_images_that_are_dropped_under_way_leave_the_others_as_they_were(name: str, changes: dict[str, Any]) -> None:
    model = random_transformer(**MODELS[name])
    settings = replace(SETTINGS, **changes)
    seeds = (0, 1, 2, 3)
    whole = generate(model, settings, seeds)
    quantizer = random_quantizer(sides=model.config.sides)
    kept = {1: [0, 2, 3], 2: [2, 1]}  # after scale 2 of 0, 2, 3: images 3 and 2
    for drop in ({1}, {2}, {1, 2}):
        scales = generate_scales(model, quantizer, *conditions(model, 4), settings, ImageNoise(seeds))
        images = list(range(4))
        result = next(scales)
        while True:
            assert len(result.ids_Bl) == len(images)
            assert torch.equal(result.ids_Bl, whole[result.k].ids_Bl[images])
            torch.testing.assert_close(result.f_hat_BChw, whole[result.k].f_hat_BChw[images], rtol=0, atol=1e-5)
            rows = kept[result.k] if result.k in drop else None
            images = images if rows is None else [images[row] for row in rows]
            try:
                result = scales.send(rows)
            except StopIteration:
                break
        assert result.k == len(model.schedule) - 1


@pytest.mark.parametrize("name", MODELS)
def test_a_prefix_that_was_run_once_serves_all_images(name: str) -> None:
    """Also under other conditions than the one it was first needed for, and when images are dropped."""
    model = random_transformer(**MODELS[name])
    quantizer = random_quantizer(sides=model.config.sides)
    shared = run_prefix(model, select(conditions(model, 1)[1], 0))
    for count in (1, 3):
        condition, unconditional = conditions(model, count)
        reference = generate_scales(
            model, quantizer, condition, unconditional, SETTINGS, ImageNoise(tuple(range(count)))
        )
        scales = generate_scales(model, quantizer, condition, shared, SETTINGS, ImageNoise(tuple(range(count))))
        expected, result = next(reference), next(scales)
        while True:
            assert torch.equal(result.ids_Bl, expected.ids_Bl)
            torch.testing.assert_close(result.logits_BlV, expected.logits_BlV, rtol=0, atol=1e-5)
            torch.testing.assert_close(result.f_hat_BChw, expected.f_hat_BChw, rtol=0, atol=1e-5)
            rows = [count - 1] if result.k == 1 else None
            try:
                expected, result = reference.send(rows), scales.send(rows)
            except StopIteration:
                break
        assert result.k == len(model.schedule) - 1


def test_the_loop_can_be_left_early_and_works_scale_by_scale() -> None:
    model = random_transformer()
    condition, unconditional = conditions(model, 1)
    scales = generate_scales(model, random_quantizer(), condition, unconditional, SETTINGS, ImageNoise([0]))
    for k in range(2):
        result = next(scales)
        assert result.k == k
        # the mode is the loop's own, not the caller's
        assert result.f_hat_BChw.is_inference()
        assert not torch.is_inference_mode_enabled()
    scales.close()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("name", ["text", "class with residual tokens"])
def test_residual_tokens_are_all_that_tells_hybrid_from_discrete(name: str) -> None:
    model = random_transformer(**MODELS[name])
    hybrid = generate(model)
    discrete = generate(model, SamplingSettings(guidance=3.0, top_k=0, residual=False))
    for a, b in zip(hybrid, discrete, strict=True):
        assert torch.equal(a.ids_Bl, b.ids_Bl)
        assert torch.equal(a.discrete_f_hat_BChw, b.discrete_f_hat_BChw)
        assert torch.equal(b.f_hat_BChw, b.discrete_f_hat_BChw)
    residual = hybrid[-1].f_hat_BChw - hybrid[-1].discrete_f_hat_BChw
    assert residual.abs().max() > 0.01
    assert residual.abs().max() <= 0.6 + 1e-5


# --------------------------------------------------------------------- training sees what generation sees


@pytest.mark.parametrize("guidance", [0.0, 3.0])
@pytest.mark.parametrize("name", MODELS)
def test_teacher_forcing_on_the_generated_ids_gives_the_generations_logits(name: str, guidance: float) -> None:
    model = random_transformer(**MODELS[name])
    quantizer = random_quantizer(sides=model.config.sides)
    results = generate(model, SamplingSettings(guidance=guidance, top_k=0))
    inputs = quantizer.teacher_forcing_input([r.ids_Bl for r in results])

    def logits(condition: TextContext | Tensor) -> tuple[Tensor, ...]:
        prepared = model.prepare(condition)
        hidden = model.forward_all(inputs, prepared).hidden_BTD
        return model.logits(hidden, prepared).split(model.schedule.lengths, 1)

    conditional, unconditional = (logits(condition) for condition in conditions(model, 2))
    for k, result in enumerate(results):
        t = guidance_strength(guidance, k, len(results), hold_last=model.config.residual is not None)
        wanted = guide(conditional[k], unconditional[k], t)
        torch.testing.assert_close(result.logits_BlV, wanted, rtol=1e-4, atol=1e-3)


def test_residual_tokens_are_denoised_from_the_teacher_forced_hidden_states() -> None:
    """Training pairs the kept hidden states with the chosen codes; generation must do the same."""
    model, quantizer = random_transformer(), random_quantizer()
    settings = SamplingSettings(guidance=0.0, top_k=0)
    results = generate(model, settings)
    prepared = model.prepare(conditions(model, 2)[0])
    hidden = model.forward_all(quantizer.teacher_forcing_input([r.ids_Bl for r in results]), prepared).last_scale_BmD
    noise = ImageNoise((0, 1))
    for length in model.schedule.lengths:  # the ids were drawn before
        noise.uniform(length)
    with torch.inference_mode():
        residual = residual_tokens(model, hidden, quantizer.lookup(results[-1].ids_Bl), 0.0, settings, noise)
    wanted = results[-1].f_hat_BChw - results[-1].discrete_f_hat_BChw
    torch.testing.assert_close(tokens_to_map(residual, (4, 4)), wanted, rtol=0, atol=1e-4)


# --------------------------------------------------------------------- what an image depends on

DRAWS = {
    "default": SETTINGS,
    "smoothing": SamplingSettings(guidance=3.0, top_k=0, smoothing=True),
    "unguided": SamplingSettings(guidance=0.0, top_k=0),
    "residual guidance off": SamplingSettings(guidance=1.5, top_k=0),  # 1.5 · (K−2)/(K−1) = 1
    "filtered": SamplingSettings(guidance=3.0, top_k=8, top_p=0.9, temperature=0.7, diffusion_steps=2),
    "greedy": SamplingSettings(guidance=3.0, temperature=0.0),
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("name", ["text", "class with residual tokens", "var"])
def test_an_image_does_not_depend_on_its_batch(name: str, draw: str) -> None:
    model, seeds = random_transformer(**MODELS[name]), (5, 6, 7)
    condition, unconditional = conditions(model, 3)
    together = generate(model, DRAWS[draw], seeds)
    for i, seed in enumerate(seeds):
        alone = generate(model, DRAWS[draw], (seed,), select(condition, i), select(unconditional, i))
        for a, b in zip(alone, together, strict=True):
            assert a.ids_Bl[0].tolist() == b.ids_Bl[i].tolist()
            # a small temperature makes smoothing magnify rounding
            tolerance = 1e-4 if DRAWS[draw].smoothing else 1e-5
            torch.testing.assert_close(a.f_hat_BChw[0], b.f_hat_BChw[i], rtol=0, atol=tolerance)


@pytest.mark.parametrize("draw", ["default", "smoothing"])
def test_the_seed_fixes_the_image(draw: str) -> None:
    model = random_transformer()
    one, same, other = (generate(model, DRAWS[draw], seeds)[-1] for seeds in ((0, 1), (0, 1), (2, 1)))
    assert torch.equal(one.f_hat_BChw, same.f_hat_BChw)
    assert not torch.equal(one.ids_Bl[0], other.ids_Bl[0])
    torch.testing.assert_close(one.f_hat_BChw[1], other.f_hat_BChw[1], rtol=0, atol=1e-5)


def test_the_seed_also_fixes_the_diffusion_noise() -> None:
    model = random_transformer()
    one, other = (generate(model, DRAWS["greedy"], (seed,))[-1] for seed in (0, 1))
    assert torch.equal(one.ids_Bl, other.ids_Bl)
    assert not torch.allclose(one.f_hat_BChw, other.f_hat_BChw)


@pytest.mark.parametrize("name", ["text", "var"])
def test_without_guidance_the_other_branch_is_not_asked(name: str) -> None:
    model = random_transformer(**MODELS[name])
    condition, unconditional = conditions(model, 2)
    other = random_context(2, seed=9) if isinstance(condition, TextContext) else unconditional - 3

    def last(guidance: float, negative: TextContext | Tensor) -> ScaleResult:
        return generate(model, SamplingSettings(guidance=guidance, top_k=0), unconditional=negative)[-1]

    assert torch.equal(last(0.0, unconditional).f_hat_BChw, last(0.0, other).f_hat_BChw)
    assert not torch.equal(last(3.0, unconditional).logits_BlV, last(3.0, other).logits_BlV)
    torch.testing.assert_close(last(1e-6, unconditional).logits_BlV, last(0.0, other).logits_BlV, rtol=0, atol=1e-3)


def test_the_first_scale_is_unguided() -> None:
    model = random_transformer()
    one, other = (generate(model, SamplingSettings(guidance=g, top_k=0))[0] for g in (1.0, 9.0))
    torch.testing.assert_close(one.logits_BlV, other.logits_BlV, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_residual_guidance_of_exactly_one_is_no_guidance() -> None:
    model = random_transformer()
    hidden, codes = normal(4, 16, 32), normal(2, 16, 4)

    def tokens(rows: Tensor, t: float) -> Tensor:
        return residual_tokens(model, rows, codes, t, SETTINGS, ImageNoise((0, 1)))

    torch.testing.assert_close(tokens(hidden, 1.0), tokens(hidden[:2], 0.0), rtol=0, atol=1e-6)
    assert (tokens(hidden, 1.0) - tokens(hidden, 0.99)).abs().max() > 1e-3


def test_smoothing_mixes_codes_by_the_noise_after_the_ids() -> None:
    model, quantizer = random_transformer(), random_quantizer(phi_ratio=0.0)
    condition, unconditional = conditions(model, 2)
    scales = generate_scales(model, quantizer, condition, unconditional, DRAWS["smoothing"], ImageNoise((0, 1)))
    first = next(scales)
    noise = ImageNoise((0, 1))
    noise.uniform(1)
    vectors_B1C = smooth_vectors(first.logits_BlV, 0.0, noise.gumbel(1, 32), quantizer.codebook)
    # a single vector fills the whole latent
    wanted = vectors_B1C[:, 0, :, None, None].expand(-1, -1, 4, 4)
    torch.testing.assert_close(first.f_hat_BChw, wanted, rtol=0, atol=1e-5)
    assert torch.equal(first.ids_Bl, generate(model)[0].ids_Bl)  # nothing mixed was seen before


def test_more_steps_denoise_otherwise() -> None:
    model = random_transformer()
    own = generate(model, SamplingSettings(guidance=3.0, top_k=0))[-1]
    four = generate(model, SamplingSettings(guidance=3.0, top_k=0, diffusion_steps=4))[-1]
    two = generate(model, SamplingSettings(guidance=3.0, top_k=0, diffusion_steps=2))[-1]
    assert torch.equal(own.f_hat_BChw, four.f_hat_BChw)
    assert not torch.allclose(own.f_hat_BChw, two.f_hat_BChw)


def test_residual_guidance_is_separate_from_that_of_the_tokens() -> None:
    model = random_transformer()
    settings = SamplingSettings(guidance=3.0, top_k=0)
    guided = generate(model, settings)[-1]
    unguided = generate(model, SamplingSettings(guidance=3.0, top_k=0, residual_guidance=0.0))[-1]
    same = generate(model, SamplingSettings(guidance=3.0, top_k=0, residual_guidance=3.0))[-1]
    assert torch.equal(guided.ids_Bl, unguided.ids_Bl)
    assert not torch.allclose(guided.f_hat_BChw, unguided.f_hat_BChw)
    assert torch.equal(guided.f_hat_BChw, same.f_hat_BChw)


def test_residual_temperature_scales_the_noise_of_the_steps() -> None:
    model = random_transformer()
    results = [
        generate(model, SamplingSettings(guidance=3.0, top_k=0, residual_temperature=t))[-1] for t in (0.0, 0.5, 1.0)
    ]
    residuals = [result.f_hat_BChw - result.discrete_f_hat_BChw for result in results]
    assert not torch.allclose(residuals[0], residuals[1])
    # halfway noise lies between none and all of it, as the first differences show
    assert (residuals[0] - residuals[1]).norm() < (residuals[0] - residuals[2]).norm()
