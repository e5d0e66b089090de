"""Block-causal attention: every form of it against PyTorch's own with the mask written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hartist.training.batches import MicroBatch
from hartist.transformer.block_causal import Runs, attend_flex, block_causal_attention, dense_mask, flex_mask
from small import make_generator_stage, normal, random_context, random_transformer, randomise, run_config


def inputs(tokens: int) -> list[Tensor]:
    """Queries, keys and values of two images and three heads."""
    return [normal(2, 3, tokens, 16, seed=i).requires_grad_() for i in range(3)]


def with_gradients(y_BNtE: Tensor, qkv: list[Tensor]) -> list[Tensor]:
    weight = normal(*y_BNtE.shape, seed=9).to(y_BNtE)
    return [y_BNtE.detach(), *torch.autograd.grad((y_BNtE * weight).sum(), qkv)]


def reference(lengths: tuple[int, ...]) -> list[Tensor]:
    qkv = inputs(sum(lengths))
    y = F.scaled_dot_product_attention(*qkv, attn_mask=dense_mask(lengths), scale=0.25)
    return with_gradients(y, qkv)


def test_a_scale_sees_itself_and_all_before_it() -> None:
    rows = ["110000", "110000", "111000", "111111", "111111", "111111"]
    assert dense_mask((2, 1, 3)).int().tolist() == [list(map(int, row)) for row in rows]


LENGTHS = [(5,), (3, 1, 4), (7, 1, 4, 9, 16), (100, 1, 4, 60)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("lengths", LENGTHS)
def test_flex_attention_computes_the_same(lengths: tuple[int, ...]) -> None:
    """Its outputs: on a CPU it has no gradients."""
    q, k, v = (x.detach() for x in inputs(sum(lengths)))
    flexible = attend_flex(q, k, v, 0.25, flex_mask(lengths))
    torch.testing.assert_close(flexible, reference(lengths)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", LENGTHS)
def test_flex_attention_has_the_same_gradients(lengths: tuple[int, ...]) -> None:
    qkv = [x.detach().cuda().requires_grad_() for x in inputs(sum(lengths))]
    flexible = with_gradients(block_causal_attention(*qkv, 0.25, Runs(lengths)), qkv)
    for a, b in zip(flexible, reference(lengths), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-2, atol=1e-2)


def test_the_transformer_hands_its_runs_to_attention_in_either_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast takes the form for bfloat16; what it computes is float32's, but for rounding."""
    monkeypatch.setattr("hartist.precision.computes_bf16", lambda device: True)
    stage = make_generator_stage(run_config(1), tmp_path)
    transformer = randomise(stage.transformer).requires_grad_(True)
    found = []
    for bf16 in (False, True):
        object.__setattr__(stage.run, "bf16", bf16)
        micro = MicroBatch(0, 0, 1, 4, seed=0)
        micro.seed_global_generator()
        loss = stage.loss(micro).loss
        weight = transformer.blocks[0].attn.qkv.weight  # type: ignore[union-attr]
        found.append((loss, torch.autograd.grad(loss, weight)[0]))  # type: ignore[arg-type]
    (loss, gradient), (rounded_loss, rounded_gradient) = found
    assert rounded_loss.item() != loss.item()
    assert rounded_loss.item() == pytest.approx(loss.item(), rel=0.03)
    assert float((rounded_gradient - gradient).norm() / gradient.norm()) < 0.15


def test_a_mask_first_made_for_looking_serves_for_learning_too() -> None:
    model = random_transformer(sides=(1, 2, 5)).requires_grad_(True)  # lengths that no other test has
    latents = normal(2, 29, 4)

    def total() -> Tensor:
        return model.forward_all(latents, model.prepare(random_context(2))).hidden_BTD.square().sum()

    with torch.inference_mode():
        looked = total().item()
    total().backward()
    assert total().item() == pytest.approx(looked)
    assert model.word_embed.weight.grad is not None
