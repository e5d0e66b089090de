"""The transformer: cached steps and teacher-forced pass are one function; who sees whom; positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hartist.config import ResidualConfig, TransformerConfig, from_dict, to_dict
from hartist.errors import UserError
from hartist.layers import Linear, sinusoidal_embedding
from hartist.scales import ScaleSchedule
from hartist.text.encoder import TextContext
from hartist.transformer.cache import KVCache
from hartist.transformer.model import Condition, ScaleTransformer
from hartist.transformer.positions import Rope, apply_rope, cell_coordinates, rope_image, rope_text
from small import DIM, RECTANGLES, TOKENS, VAR, normal, random_context, random_transformer, transformer_config

TEXT: dict[str, dict[str, Any]] = {
    "released": {},
    "axial": {"rope": "axial"},
    "no modulation": {"modulation": "none", "step_embedding": "table", "context_norm": False},
    "adaln of the maximum": {"modulation": "adaln"},
    "adaln of the mean": {"modulation": "adaln", "pooling": "mean", "step_embedding": "table"},
    "shared adaln, l2 norm": {"modulation": "shared_adaln", "pooling": "mean", "l2_norm": True},
    "absolute": {"positions": "absolute"},
    "plain layer norm, gelu": {"norm": "layer", "mlp": "gelu", "context_norm": False, "residual": None},
    "rectangles, axial, l2 norm": {"sides": RECTANGLES, "rope": "axial", "l2_norm": True},
    "one scale": {"sides": (1,)},
}
CLASS: dict[str, dict[str, Any]] = {
    "var": VAR,
    "var with residual tokens": VAR | {"residual": ResidualConfig(width=32, depth=1)},
    "shared adaln": VAR | {"modulation": "shared_adaln", "l2_norm": False},
    "table, sinusoidal": VAR | {"modulation": "table", "step_embedding": "sinusoidal"},
    "several start tokens": VAR | {"sides": (2, 3, 4)},
    "rope": VAR | {"positions": "rope", "rope": "axial", "sides": (2, (2, 3), (4, 3))},
    "rms, swiglu": VAR | {"norm": "rms", "mlp": "swiglu", "positions": "rope", "modulation": "none"},
}
VARIANTS = TEXT | CLASS


def condition_for(model: ScaleTransformer, rows: int = 2, seed: int = 0) -> TextContext | Tensor:
    if model.config.condition == "text":
        return random_context(rows, seed)
    return torch.arange(seed, seed + rows) % 8


def inputs_for(model: ScaleTransformer, rows: int = 2, seed: int = 3) -> Tensor:
    return normal(rows, sum(model.schedule.lengths[1:]), 4, seed=seed)


def cached_pass(model: ScaleTransformer, condition: Condition, input_BLC: Tensor, cache: KVCache) -> list[Tensor]:
    """Hidden states scale by scale, as generation computes them."""
    inputs = [None, *input_BLC.split(model.schedule.lengths[1:], 1)]
    with torch.inference_mode():
        return [model.forward_scale(k, x, condition, cache) for k, x in enumerate(inputs)]


# --------------------------------------------------------------------- one function in two forms


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_steps_are_the_teacher_forced_pass(name: str) -> None:
    model = random_transformer(**VARIANTS[name])
    condition, inputs = model.prepare(condition_for(model)), inputs_for(model)
    cache = model.new_cache(2)
    hidden = cached_pass(model, condition, inputs, cache)
    full = model.forward_all(inputs, condition)
    assert [h.shape[1] for h in hidden] == list(model.schedule.lengths)
    torch.testing.assert_close(torch.cat(hidden, 1), full.hidden_BTD, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(hidden[-1], full.last_scale_BmD, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(
        model.logits(torch.cat(hidden, 1), condition),
        model.logits(full.hidden_BTD, condition),
        rtol=1e-5,
        atol=1e-4,
    )
    # the capacity is exact: the last scale is joined but not kept
    if len(model.schedule) > 1:
        assert cache.lengths == [cache.keys[0].shape[2]] * model.config.depth


@torch.inference_mode()
@pytest.mark.parametrize("name", VARIANTS)
def test_rows_of_a_batch_do_not_touch_each_other(name: str) -> None:
    model = random_transformer(**VARIANTS[name])
    condition, inputs = condition_for(model, rows=3), inputs_for(model, rows=3)
    together = cached_pass(model, model.prepare(condition), inputs, model.new_cache(3))
    for i in range(3):
        row = condition.select([i]) if isinstance(condition, TextContext) else condition[i : i + 1]
        alone = cached_pass(model, model.prepare(row), inputs[i : i + 1], model.new_cache(1))
        for k, hidden in enumerate(alone):
            torch.testing.assert_close(hidden[0], together[k][i], rtol=1e-5, atol=2e-5)


def test_a_full_cache_says_so() -> None:
    cache = KVCache(layers=1, batch=1, heads=1, capacity=3, head_dim=4)
    cache.join(0, normal(1, 1, 2, 4), normal(1, 1, 2, 4), keep=True)
    with pytest.raises(ValueError, match="holds 3 tokens, 4 are needed"):
        cache.join(0, normal(1, 1, 2, 4), normal(1, 1, 2, 4), keep=True)
    keys, _ = cache.join(0, normal(1, 1, 5, 4), normal(1, 1, 5, 4), keep=False)
    assert [part.shape[2] for part in keys] == [2, 5]


def test_a_layer_that_is_joined_for_the_last_time_frees_its_memory() -> None:
    cache = KVCache(layers=2, batch=1, heads=1, capacity=3, head_dim=4)
    for layer in (0, 1):
        cache.join(layer, normal(1, 1, 2, 4), normal(1, 1, 2, 4), keep=True)
    cache.join(0, normal(1, 1, 5, 4), normal(1, 1, 5, 4), keep=False)
    assert [tensor.numel() for tensor in (*cache.keys, *cache.values)] == [0, 12, 0, 12]
    assert cache.lengths == [0, 2]


def test_a_cache_gives_back_what_was_put_in_layer_by_layer() -> None:
    cache = KVCache(layers=2, batch=1, heads=1, capacity=4, head_dim=4)
    pieces = [normal(1, 1, 2, 4, seed=i) for i in range(4)]
    for i, piece in enumerate(pieces):
        keys, values = cache.join(i % 2, piece, -piece, keep=True)
        (kept,), (kept_values,) = keys, values
        assert torch.equal(kept, torch.cat(pieces[i % 2 : i + 1 : 2], 2))
        assert torch.equal(kept_values, -kept)


def test_rows_that_are_left_behind_take_no_memory() -> None:
    cache = KVCache(layers=2, batch=3, heads=1, capacity=4, head_dim=4)
    for layer in (0, 1):
        k = normal(3, 1, 2, 4, seed=layer)
        cache.join(layer, k, -k, keep=True)
    cache.select([2, 0])
    assert {len(tensor.untyped_storage()) for tensor in (*cache.keys, *cache.values)} == {2 * 4 * 4 * 4}
    (keys,), (values,) = cache.join(1, normal(2, 1, 1, 4), normal(2, 1, 1, 4), keep=True)
    assert torch.equal(keys[:, :, :2], normal(3, 1, 2, 4, seed=1)[[2, 0]])
    assert torch.equal(values[:, :, :2], -keys[:, :, :2])


# --------------------------------------------------------------------- subsampling


@pytest.mark.parametrize("name", ["released", "axial", "absolute", "rectangles, axial, l2 norm", "var", "rope"])
def test_all_cells_kept_in_any_order_is_the_full_pass(name: str) -> None:
    model = random_transformer(**VARIANTS[name])
    condition, inputs = model.prepare(condition_for(model)), inputs_for(model)
    kept = torch.stack([torch.randperm(model.schedule.lengths[-1]) for _ in range(2)])
    full, kept_pass = model.forward_all(inputs, condition), model.forward_all(inputs, condition, kept)
    wanted = full.last_scale_BmD.gather(1, kept[..., None].expand(-1, -1, 32))
    torch.testing.assert_close(kept_pass.last_scale_BmD, wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["released", "var"])
def test_dropped_cells_are_unseen_and_earlier_scales_do_not_notice(name: str) -> None:
    model = random_transformer(**VARIANTS[name])
    condition, inputs = model.prepare(condition_for(model)), inputs_for(model)
    last = model.schedule.lengths[-1]
    kept = torch.tensor([[0, 3, 7], [2, 5, 11]])
    full, part = model.forward_all(inputs, condition), model.forward_all(inputs, condition, kept)
    earlier = model.schedule.num_tokens - last
    torch.testing.assert_close(part.hidden_BTD[:, :earlier], full.hidden_BTD[:, :earlier], rtol=0, atol=1e-5)
    assert part.hidden_BTD.shape[1] == earlier + 3
    assert torch.equal(part.hidden_BTD[:, earlier:], part.last_scale_BmD)
    wanted = full.last_scale_BmD.gather(1, kept[..., None].expand(-1, -1, 32))
    assert (part.last_scale_BmD - wanted).abs().max() > 1e-3  # kept cells see kept cells only

    changed = inputs.clone()
    for row in range(2):
        dropped = [earlier - model.schedule.lengths[0] + i for i in range(last) if i not in kept[row]]
        changed[row, dropped] += 10
    assert torch.equal(model.forward_all(changed, condition, kept).hidden_BTD, part.hidden_BTD)


# --------------------------------------------------------------------- who sees whom


@pytest.mark.parametrize("name", ["released", "axial", "var", "several start tokens"])
def test_a_scale_influences_itself_and_later_ones_only(name: str) -> None:
    model = random_transformer(**VARIANTS[name])
    condition, inputs = model.prepare(condition_for(model)), inputs_for(model)
    before = model.forward_all(inputs, condition).hidden_BTD
    start = model.schedule.lengths[0]
    for length in model.schedule.lengths[1:]:
        changed = inputs.clone()
        changed[:, start - model.schedule.lengths[0]] += 1  # the scale's first cell
        after = model.forward_all(changed, condition).hidden_BTD
        assert torch.equal(after[:, :start], before[:, :start])
        differences = (after - before)[:, start:].abs().amax(-1)
        assert (differences > 1e-5).all()  # its own cells see each other, and all later ones see it
        start += length


def test_padding_is_attended_to_and_the_mask_is_not_read_by_attention() -> None:
    model = random_transformer(modulation="none")
    context, inputs = random_context(2), inputs_for(random_transformer())
    padded = ~context.mask_BS
    assert padded.any(1).all()
    before = model.forward_all(inputs, model.prepare(context)).hidden_BTD
    states = context.states_BSC.clone()
    states[padded] += 1
    changed = TextContext(states, context.mask_BS, context.position_ids_BS)
    after = model.forward_all(inputs, model.prepare(changed)).hidden_BTD
    assert ((after - before).abs().amax(-1) > 1e-4).all()

    unmasked = TextContext(context.states_BSC, torch.ones_like(context.mask_BS), context.position_ids_BS)
    assert torch.equal(model.forward_all(inputs, model.prepare(unmasked)).hidden_BTD, before)


def test_pooling_of_the_condition() -> None:
    """The head takes the maximum over all tokens, padding included; the table the mean over real tokens."""
    context = random_context(2)
    states = context.states_BSC.clone()
    states[~context.mask_BS] += 5
    padded_differently = TextContext(states, context.mask_BS, context.position_ids_BS)
    for changes, blocks_change in [
        ({"modulation": "table"}, False),
        ({"modulation": "adaln", "pooling": "mean"}, False),
        ({"modulation": "adaln", "pooling": "max"}, True),
        ({"modulation": "shared_adaln", "pooling": "max"}, True),
    ]:
        model = random_transformer(**changes)
        one, other = model.prepare(context), model.prepare(padded_differently)
        embedded = model.context_embed(model.context_norm(context.states_BSC))
        torch.testing.assert_close(one.head_BD, embedded.amax(1))
        assert not torch.allclose(one.head_BD, other.head_BD)
        for a, b in zip(one.modulations, other.modulations, strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b) is not blocks_change


def test_modulation_of_the_table_is_the_table_plus_the_mean() -> None:
    model = random_transformer()
    context = random_context(3)
    embedded = model.context_embed(model.context_norm(context.states_BSC))
    weight = context.mask_BS.float()[..., None]
    mean = (embedded * weight).sum(1) / weight.sum(1)
    for block, modulation in zip(model.blocks, model.prepare(context).modulations, strict=True):
        torch.testing.assert_close(modulation, block.modulation.table + mean[:, None])


@pytest.mark.parametrize("name", ["released", "var"])
def test_each_step_embedding_belongs_to_one_scale(name: str) -> None:
    model = random_transformer(**(VARIANTS[name] | {"step_embedding": "table"}))
    labels, inputs = condition_for(model), inputs_for(model)
    before = model.forward_all(inputs, model.prepare(labels)).hidden_BTD
    start, table = 0, model.step_embed.weight.clone()
    for k, length in enumerate(model.schedule.lengths):
        model.step_embed.weight[k] += normal(32, seed=9)
        after = model.forward_all(inputs, model.prepare(labels)).hidden_BTD
        model.step_embed.weight.copy_(table)
        changed = ((after - before).abs().amax(-1) > 1e-5).all(0).tolist()
        assert changed == [False] * start + [True] * (model.schedule.num_tokens - start)
        start += length


# --------------------------------------------------------------------- positions


def test_position_ids_of_the_text_shift_the_image() -> None:
    schedule = ScaleSchedule.from_sides(RECTANGLES)
    coordinates = cell_coordinates(schedule, 2)
    torch.testing.assert_close(coordinates, torch.tensor([[i * 1.5, j * 5 / 3] for i in range(2) for j in range(3)]))
    for form in ("released", "axial"):
        shifted = rope_image(coordinates, torch.tensor([7]), 16, form)
        moved = rope_image(coordinates + 7, torch.tensor([0]), 16, form)
        torch.testing.assert_close(shifted.cos_B1lE, moved.cos_B1lE, rtol=0, atol=1e-6)
        torch.testing.assert_close(shifted.sin_B1lE, moved.sin_B1lE, rtol=0, atol=1e-6)
    context = random_context(3)
    assert random_transformer().prepare(context).offset_B.tolist() == context.position_ids_BS[:, -1].tolist()


def test_subsampled_cells_keep_their_own_rotation() -> None:
    rope = rope_image(cell_coordinates(ScaleSchedule.from_sides((3,)), 0), torch.tensor([2, 4]), 16, "axial")
    chosen = rope.select(torch.tensor([[8, 0], [4, 5]]))
    assert torch.equal(chosen.cos_B1lE[0, 0, 0], rope.cos_B1lE[0, 0, 8])
    assert torch.equal(chosen.sin_B1lE[1, 0, 1], rope.sin_B1lE[1, 0, 5])


def score(q: Tensor, k: Tensor, rope_q: Rope, rope_k: Rope) -> float:
    return float((apply_rope(q, rope_q) * apply_rope(k, rope_k)).sum())


def image_score(form: str, q_at: tuple, k_at: tuple, seed: int) -> float:
    q, k = normal(1, 1, 1, 16, seed=seed), normal(1, 1, 1, 16, seed=seed + 1)
    ropes = [rope_image(torch.tensor([at]).float(), torch.tensor([0]), 16, form) for at in (q_at, k_at)]
    return score(q, k, ropes[0], ropes[1])


cells = st.tuples(st.integers(0, 64), st.integers(0, 64))


@settings(max_examples=50, deadline=None)
@given(cells, cells, cells, st.integers(0, 1000))
def test_axial_rope_depends_on_the_difference_of_coordinates_only(
    q_at: tuple, k_at: tuple, shift: tuple, seed: int
) -> None:
    moved = [(at[0] + shift[0], at[1] + shift[1]) for at in (q_at, k_at)]
    here, there = image_score("axial", q_at, k_at, seed), image_score("axial", *moved, seed)
    assert here == pytest.approx(there, abs=2e-3)


def test_axial_rope_keeps_lengths_and_the_released_form_has_neither_property() -> None:
    shifts = [(3, 0), (0, 3), (5, 2)]
    here = image_score("released", (1, 2), (4, 0), 0)
    there = [image_score("released", (1 + a, 2 + b), (4 + a, 0 + b), 0) for a, b in shifts]
    assert max(abs(value - here) for value in there) > 0.1

    x, at = normal(1, 1, 1, 16), torch.tensor([[3.0, 10.0]])
    lengths = {
        form: float(apply_rope(x, rope_image(at, torch.tensor([0]), 16, form)).norm()) for form in ("axial", "released")
    }
    assert lengths["axial"] == pytest.approx(float(x.norm()), rel=1e-5)
    assert abs(lengths["released"] - float(x.norm())) > 0.01


def test_the_two_forms_agree_where_row_and_column_are_equal() -> None:
    at = torch.arange(4.0)[:, None].expand(4, 2)
    forms = [rope_image(at, torch.tensor([1]), 16, form) for form in ("axial", "released")]
    # released: [row, row, column, column]; axial: [row, column, row, column]
    torch.testing.assert_close(forms[0].cos_B1lE, forms[1].cos_B1lE)
    apart = torch.tensor([[1.0, 2.0]])
    forms = [rope_image(apart, torch.tensor([0]), 16, form) for form in ("axial", "released")]
    a, r = forms[0].sin_B1lE[0, 0, 0].chunk(4), forms[1].sin_B1lE[0, 0, 0].chunk(4)
    for axial, released in zip((0, 2, 1, 3), range(4), strict=True):
        assert torch.equal(a[axial], r[released])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100), st.integers(0, 1000))
def test_text_rope_depends_on_the_distance_only(q_at: int, k_at: int, shift: int, seed: int) -> None:
    q, k = normal(1, 1, 1, 16, seed=seed), normal(1, 1, 1, 16, seed=seed + 1)

    def at(position: int) -> Rope:
        return rope_text(torch.tensor([[position]]), 16)

    here = score(q, k, at(q_at), at(k_at))
    assert here == pytest.approx(score(q, k, at(q_at + shift), at(k_at + shift)), abs=2e-3)


# --------------------------------------------------------------------- layers, precision, configuration


@torch.inference_mode()
@pytest.mark.parametrize("width", [4, 32, 96])
def test_a_row_of_a_float32_product_has_the_same_bits_alone_and_in_a_batch(width: int) -> None:
    layer = Linear(width, 64)
    x = normal(48, width)
    whole = layer(x)
    for rows in (1, 2, 3, 7, 15, 16, 17, 31):
        assert torch.equal(layer(x[:rows]), whole[:rows]), rows
        assert torch.equal(layer(x[None, -rows:])[0], whole[-rows:]), rows


def test_padding_a_product_does_not_stop_gradients_and_is_the_plain_product() -> None:
    layer, x = Linear(8, 8), normal(3, 8)
    with torch.inference_mode():
        padded = layer(x)
    plain = layer(x)
    torch.testing.assert_close(padded.clone(), plain.detach(), rtol=0, atol=1e-6)
    plain.sum().backward()
    assert layer.weight.grad is not None


def test_sinusoids_are_cosines_then_sines_of_raw_indices() -> None:
    embedding = sinusoidal_embedding(torch.tensor([0, 5]))
    assert embedding[0].tolist() == [1.0] * 128 + [0.0] * 128
    frequency = 10000 ** (-torch.arange(128).double() / 128)
    wanted = torch.cat([(5 * frequency).cos(), (5 * frequency).sin()]).float()
    torch.testing.assert_close(embedding[1], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["released", "var"])
def test_bfloat16_weights_give_float32_logits_near_the_float32_ones(name: str) -> None:
    model = random_transformer(**VARIANTS[name])
    exact = {n: p.to(torch.bfloat16).float() for n, p in model.state_dict().items()}
    model.load_state_dict(exact)
    inputs = inputs_for(model)
    condition = model.prepare(condition_for(model))
    full = model.logits(model.forward_all(inputs, condition).hidden_BTD, condition)
    half = random_transformer(**VARIANTS[name]).bfloat16()
    half.load_state_dict(exact)
    condition = half.prepare(condition_for(half))
    hidden = cached_pass(half, condition, inputs, half.new_cache(2))
    logits = half.logits(torch.cat(hidden, 1), condition)
    assert logits.dtype == torch.float32
    assert (logits - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize("name", VARIANTS)
def test_initial_logits_are_nearly_uniform_and_every_weight_is_set(name: str) -> None:
    torch.manual_seed(0)
    model = ScaleTransformer(transformer_config(**VARIANTS[name]))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
        model.head.linear.bias.fill_(0)
        for module in model.modules():  # what torch's own constructors set is not `initialise`'s business
            if isinstance(module, torch.nn.LayerNorm):
                module.reset_parameters()
        for n, p in model.named_parameters():
            if "norm" in n or n.endswith(("q_bias", "v_bias", "log_scale")):
                p.fill_(1)
    model.initialise()
    assert all(p.isfinite().all() for p in model.parameters())
    condition = model.prepare(condition_for(model))
    logits = model.logits(model.forward_all(inputs_for(model), condition).hidden_BTD, condition)
    assert logits.log_softmax(-1).exp().max() < 2 / 32


def test_class_models_add_start_position_and_step_embeddings_to_the_first_tokens() -> None:
    model = random_transformer(**VAR)
    prepared = model.prepare(torch.tensor([3, 7]))  # 7 is the unconditional class
    wanted = (
        model.class_embed.weight[[3, 7]]
        + model.start_position[0, 0]
        + model.position_embed[0, 0]
        + model.step_embed.weight[0]
    )
    torch.testing.assert_close(prepared.prefix_BSD[:, 0], wanted)


@pytest.mark.parametrize("name", VARIANTS)
def test_configs_survive_json(name: str) -> None:
    import json

    config = transformer_config(**VARIANTS[name])
    assert from_dict(TransformerConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "width 32 is not divisible by 3"),
        ({"width": 12, "heads": 2}, "divisible by 4"),
        ({"sides": (2, 4)}, "first side must be 1"),
        ({"norm": "layer"}, "context_norm"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        transformer_config(**changes)


def test_a_foreign_field_is_named() -> None:
    with pytest.raises(UserError, match="unknown field 'colour'"):
        from_dict(TransformerConfig, {"colour": 1}, "config.json")


def test_the_released_sizes_have_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = ScaleTransformer(TransformerConfig())
    total = sum(p.numel() for p in model.parameters())
    assert model.config.mlp_hidden == 4096
    assert abs(total - 732.6e6) < 0.5e6
    assert sum(p.numel() for p in model.residual_mlp.parameters()) == pytest.approx(37e6, rel=0.02)


def test_context_width_is_the_encoders() -> None:
    model = random_transformer()
    assert model.context_embed.weight.shape == (32, DIM)
    assert model.config.prefix_tokens == TOKENS


@pytest.mark.parametrize("name", VARIANTS)
def test_a_pass_over_the_first_scales_is_the_beginning_of_the_whole_pass(name: str) -> None:
    """Training on coarse scales alone sees exactly what the full pass sees."""
    model = random_transformer(**VARIANTS[name])
    condition = model.prepare(condition_for(model))
    input_BLC = inputs_for(model)
    whole = model.forward_all(input_BLC, condition).hidden_BTD
    lengths = model.schedule.lengths
    for scales in range(1, len(lengths) + 1):
        part = model.forward_all(input_BLC[:, : sum(lengths[1:scales])], condition).hidden_BTD
        assert part.shape[1] == sum(lengths[:scales])
        torch.testing.assert_close(part, whole[:, : part.shape[1]], atol=1e-5, rtol=1e-5)
