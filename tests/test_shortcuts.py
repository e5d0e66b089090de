"""Fast mode: each shortcut is what it says, and left alone it changes nothing."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hartist.config import ResidualConfig
from hartist.errors import UserError
from hartist.generation.guidance import guide
from hartist.generation.loop import ScaleResult, generate_scales
from hartist.generation.noise import ImageNoise
from hartist.generation.pipeline import Pipeline, Request, override
from hartist.generation.sampling import SamplingSettings
from hartist.generation.shortcuts import FAST, attended_spans, cells_to_compute, guidance_strengths
from hartist.scales import SIDES_1024, ScaleSchedule
from hartist.text.encoder import unconditional_context
from hartist.transformer.int8 import Int8Linear, quantize_int8
from hartist.transformer.model import ScaleTransformer
from small import VAR, random_context, random_quantizer, random_transformer
from tiny import write_tiny_text_model

SIDES = (1, 2, 3, 4, 5, 6)
MODELS: dict[str, dict[str, Any]] = {
    "text": {"sides": SIDES},
    "var": VAR | {"sides": SIDES},
    "class with residual tokens": VAR | {"residual": ResidualConfig(width=32, depth=1, steps=4), "sides": SIDES},
}
SETTINGS = SamplingSettings(guidance=3.0, top_k=0)
SCHEDULE = ScaleSchedule.from_sides(SIDES_1024)


def generate(model: ScaleTransformer, seeds: tuple[int, ...] = (0, 1), **changes: Any) -> list[ScaleResult]:
    quantizer = random_quantizer(sides=model.config.sides)
    own: Any
    if model.config.condition == "text":
        own = random_context(len(seeds))
        other: Any = unconditional_context(own)
    else:
        own, other = torch.arange(len(seeds)) % 7, torch.full((len(seeds),), 7)
    return list(generate_scales(model, quantizer, own, other, replace(SETTINGS, **changes), ImageNoise(seeds)))


def assert_same(a: list[ScaleResult], b: list[ScaleResult]) -> None:
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one.ids_Bl, other.ids_Bl)
        torch.testing.assert_close(one.logits_BlV, other.logits_BlV, rtol=0, atol=2e-5)
        torch.testing.assert_close(one.f_hat_BChw, other.f_hat_BChw, rtol=0, atol=2e-5)


def rows_computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each scale's forward pass gets from now on."""
    seen: list[int] = []
    forward = ScaleTransformer.forward_scale

    def counted(self: ScaleTransformer, k: int, *args: Any, **options: Any) -> Tensor:
        hidden = forward(self, k, *args, **options)
        seen.append(hidden.shape[0] * hidden.shape[1])
        return hidden

    monkeypatch.setattr(ScaleTransformer, "forward_scale", counted)
    return seen


# --------------------------------------------------------------------- guidance


@pytest.mark.parametrize("name", MODELS)
def test_no_scale_with_guidance_is_guidance_zero(name: str) -> None:
    model = random_transformer(**MODELS[name])
    assert_same(generate(model, unguided_scales=len(SIDES)), generate(model, guidance=0.0))


@pytest.mark.parametrize("name", MODELS)
def test_the_last_scales_without_guidance_cost_one_branch_and_give_its_logits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_transformer(**MODELS[name])
    exact = generate(model)
    rows = rows_computed(monkeypatch)
    results = generate(model, unguided_scales=2)
    first = len(results[0].ids_Bl[0]) if model.config.condition == "class" else 1
    assert rows == [4 * first, 4 * 4, 4 * 9, 4 * 16, 2 * 25, 2 * 36]
    assert_same(results[:4], exact[:4])
    # t is 0 there: the same conditional logits as with guidance of 0 after the same ids
    shares = [k / 5 for k in range(4)] + [0.0, 0.0]
    by_scale = generate(model, guidance_by_scale=tuple(shares))
    assert_same(by_scale, results)
    assert not torch.allclose(results[4].logits_BlV, exact[4].logits_BlV, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_the_growing_guidance_by_scale_is_the_default(name: str) -> None:
    model = random_transformer(**MODELS[name])
    shares = [k / 5 for k in range(6)]
    if model.config.residual is not None:
        shares[5] = shares[4]  # HART holds the ratio
    assert_same(generate(model, guidance_by_scale=tuple(shares)), generate(model))


def test_a_scale_between_may_be_unguided_though_later_ones_need_its_keys() -> None:
    model = random_transformer(sides=SIDES)
    results = generate(model, guidance_by_scale=(0.0, 0.2, 0.0, 0.6, 0.8, 0.8))
    quantizer = random_quantizer(sides=SIDES)
    inputs = quantizer.teacher_forcing_input([r.ids_Bl for r in results])
    context = random_context(2)
    logits = []
    for condition in (context, unconditional_context(context)):
        prepared = model.prepare(condition)
        with torch.no_grad():
            logits.append(model.logits(model.forward_all(inputs, prepared).hidden_BTD, prepared))
    parts = [part.split([n * n for n in SIDES], 1) for part in logits]
    for k, t in enumerate((0.0, 0.6, 0.0, 1.8, 2.4, 2.4)):
        torch.testing.assert_close(results[k].logits_BlV, guide(parts[0][k], parts[1][k], t), rtol=0, atol=1e-4)


def test_residual_guidance_of_its_own_still_needs_the_other_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_transformer(sides=SIDES)
    rows = rows_computed(monkeypatch)
    with_it = generate(model, unguided_scales=1, residual_guidance=3.0)
    assert rows[-1] == 2 * 2 * 36
    without = generate(model, unguided_scales=1)
    assert rows[-1] == 2 * 36
    assert torch.equal(with_it[-1].ids_Bl, without[-1].ids_Bl)
    assert not torch.allclose(with_it[-1].f_hat_BChw, without[-1].f_hat_BChw, atol=1e-3)


def test_guidance_of_another_number_of_scales_is_refused() -> None:
    settings = SamplingSettings(guidance_by_scale=(0.0, 1.0))
    with pytest.raises(UserError, match="has 2 numbers; the model has 6 scales"):
        guidance_strengths(settings, 6, hold_last=True)


# --------------------------------------------------------------------- attention


@given(k=st.integers(0, 13), attended=st.integers(1, 14), prefix=st.integers(1, 300))
def test_spans_hold_context_coarse_scales_and_those_just_before(k: int, attended: int, prefix: int) -> None:
    lengths = [prefix, *SCHEDULE.lengths[1:]]
    owner = [scale for scale, length in enumerate(lengths[: max(k, 1)]) for _ in range(length)]
    spans = attended_spans(SCHEDULE, prefix, k, attended)
    chosen = owner if spans is None else [scale for start, end in spans for scale in owner[start:end]]
    expected = [scale for scale in owner if scale < 7 or scale >= k - attended]
    assert chosen == expected


def test_attending_to_all_scales_before_is_exact() -> None:
    model = random_transformer(sides=SIDES)
    assert_same(generate(model, attended_scales=5), generate(model))
    assert attended_spans(SCHEDULE, 300, 13, None) is None


def test_skipped_scales_are_as_if_they_had_never_been_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scale 6 of 6 with one attended scale reads scales 1 to 3 and 5."""
    model = random_transformer(sides=SIDES)
    seen: dict[str, Tensor] = {}
    forward = ScaleTransformer.forward_scale

    def last_anew(self: ScaleTransformer, k: int, x: Any, condition: Any, cache: Any, **options: Any) -> Tensor:
        if k == 5:
            assert options["spans"] == ((0, 5 + 4 + 9), (5 + 4 + 9 + 16, 5 + 4 + 9 + 16 + 25))
            shorter = copy.deepcopy(cache)
            for tensors in (shorter.keys, shorter.values):
                tensors[:] = [torch.cat([t[:, :, a:b] for a, b in options["spans"]], 2) for t in tensors]
            shorter.lengths = [tensor.shape[2] for tensor in shorter.keys]
            seen["expected"] = forward(self, k, x, condition, shorter)
            seen["all"] = forward(self, k, x, condition, copy.deepcopy(cache))
            seen["own"] = forward(self, k, x, condition, cache, **options)
            return seen["own"]
        return forward(self, k, x, condition, cache, **options)

    monkeypatch.setattr(ScaleTransformer, "forward_scale", last_anew)
    generate(model, attended_scales=1)
    torch.testing.assert_close(seen["own"], seen["expected"], rtol=0, atol=1e-5)
    assert not torch.allclose(seen["own"], seen["all"], atol=1e-4)


# --------------------------------------------------------------------- the last scale's cells


@pytest.mark.parametrize("name", MODELS)
def test_cells_left_out_add_nothing_and_the_others_are_what_training_with_subsampling_sees(name: str) -> None:
    model = random_transformer(**MODELS[name])
    exact = generate(model)
    results = generate(model, last_scale_share=0.4)
    assert_same(results[:-1], exact[:-1])
    last, cells = results[-1], 15
    kept_Bm = cells_to_compute(results[-2].f_hat_BChw, 0.4)
    assert kept_Bm.shape == (2, cells)
    computed_Bl = torch.zeros(2, 36, dtype=torch.bool).scatter(1, kept_Bm, True)
    assert torch.equal(last.ids_Bl >= 0, computed_Bl)
    assert torch.equal(last.logits_BlV.isfinite().all(-1), computed_Bl)
    if model.config.residual is not None:  # without φ after it, the last scale changes its own cells alone
        change_Bl = (last.f_hat_BChw - results[-2].f_hat_BChw).abs().amax(1).flatten(1)
        assert torch.equal(change_Bl > 0, computed_Bl)
    # the teacher-forced pass that keeps these cells gives the logits
    quantizer = random_quantizer(sides=SIDES)
    ids = [r.ids_Bl for r in results[:-1]] + [last.ids_Bl.clamp(min=0)]
    inputs = quantizer.teacher_forcing_input(ids)
    own: Any = random_context(2) if model.config.condition == "text" else torch.arange(2)
    other: Any = unconditional_context(own) if model.config.condition == "text" else torch.full((2,), 7)
    logits = []
    with torch.no_grad():
        for condition in (own, other):
            prepared = model.prepare(condition)
            logits.append(model.logits(model.forward_all(inputs, prepared, kept_Bm).last_scale_BmD, prepared))
    t = guidance_strengths(SETTINGS, 6, hold_last=model.config.residual is not None)[-1]
    index = kept_Bm[..., None].expand(-1, -1, 32)
    torch.testing.assert_close(last.logits_BlV.gather(1, index), guide(*logits, t), rtol=0, atol=1e-4)


def test_a_kept_cell_draws_with_the_noise_it_has_among_all() -> None:
    """With logits that leave no choice but the noise's, ids of kept cells are those of the whole scale."""
    model = random_transformer(sides=SIDES)
    nn.init.zeros_(model.head.linear.weight)
    exact, results = generate(model), generate(model, last_scale_share=0.5)
    kept_Bl = results[-1].ids_Bl >= 0
    assert kept_Bl.sum() == 2 * 18
    assert torch.equal(results[-1].ids_Bl[kept_Bl], exact[-1].ids_Bl[kept_Bl])


@given(share=st.floats(0.001, 1), seed=st.integers(0, 100))
def test_the_cells_with_most_detail_are_computed(share: float, seed: int) -> None:
    f_hat = torch.zeros(1, 4, 8, 8)
    f_hat[0, :, 3, 5] = torch.randn(4, generator=torch.Generator().manual_seed(seed)) + 5
    kept = cells_to_compute(f_hat, share)[0].tolist()
    assert 3 * 8 + 5 in kept
    assert kept == sorted(set(kept))
    assert len(kept) == -(-int(share * 64 * 1000) // 1000) or abs(len(kept) - share * 64) <= 1


# --------------------------------------------------------------------- all together


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_text_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize("int8", [False, True])
def test_a_fast_picture_does_not_depend_on_its_batch_either(directory: Path, int8: bool) -> None:
    pipe = Pipeline.from_pretrained(directory, device="cpu", int8=int8)
    settings = override(pipe.model.settings, **FAST)
    prompts = ["a red apple", "a cat", "a green apple on a table"]
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    together = list(pipe.generate(requests, settings=settings, batch_size=3))
    for request, item in zip(requests, together, strict=True):
        (alone,) = pipe.generate([request], settings=settings)
        assert alone.image.tobytes() == item.image.tobytes()
    exact = pipe("a red apple", seed=0)[0]
    assert together[0].image.tobytes() != exact.tobytes()
    assert pipe("a red apple", seed=0, fast=True)[0].tobytes() == together[0].image.tobytes()


# --------------------------------------------------------------------- eight bits


@given(rows=st.integers(1, 40), bias=st.booleans(), seed=st.integers(0, 50))
def test_an_eight_bit_product_is_near_the_exact_one_row_by_row(rows: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(96, 64, bias=bias)
    quantized = Int8Linear(linear)
    x = torch.randn(rows, 96) * torch.rand(rows, 1) * 100
    with torch.inference_mode():
        exact, own = linear(x), quantized(x)
    bare = exact - (linear.bias if bias else 0)
    error = (own - exact).norm(dim=1) / bare.norm(dim=1)
    assert error.max() < 0.05
    assert torch.equal(quantized(x[:1]), own[:1])
    if not bias:
        assert torch.equal(quantized(2 * x), 2 * own)  # a step for every row


def test_activations_are_rounded_to_the_nearest_step() -> None:
    """Cut off instead, they would all be half a step too low, which sums up where weights are of one sign."""
    linear = nn.Linear(512, 8, bias=False)
    nn.init.constant_(linear.weight, 0.1)
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    own, step_R1 = Int8Linear(linear)(x), x.abs().amax(1, keepdim=True) / Int8Linear(linear).levels
    shift = ((own - linear(x).detach()) / (step_R1 * 51.2)).mean().item()  # in steps an activation
    assert abs(shift) < 0.1


def test_rows_of_zeros_and_other_shapes_and_types_pass() -> None:
    linear = nn.Linear(32, 16)
    quantized = Int8Linear(linear)
    assert torch.equal(quantized(torch.zeros(2, 3, 32)), linear.bias.detach().expand(2, 3, 16))
    assert quantized(torch.randn(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_every_product_of_the_blocks_is_in_eight_bits_and_the_rest_is_not() -> None:
    for changes in MODELS.values():
        model = quantize_int8(random_transformer(**changes))
        kinds = {type(layer) for layer in model.blocks.modules() if isinstance(layer, nn.Linear | Int8Linear)}
        modulation = changes.get("modulation") == "adaln"
        assert Int8Linear in kinds
        assert len(kinds) == 1 + modulation
        assert isinstance(model.head.linear, nn.Linear)
        generate(model)


def test_what_was_rounded_is_not_saved(directory: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(directory, device="cpu", int8=True)
    with pytest.raises(UserError, match="can't be saved"):
        pipe.save_pretrained(tmp_path / "copy")


def test_eight_bits_are_a_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="on a CPU only"):
        quantize_int8(random_transformer().to("meta"))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(UserError, match="no eight-bit kernels"):
        quantize_int8(random_transformer())
