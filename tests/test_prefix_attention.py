"""Attention of each scale to its prefix: the arithmetic of the masked form, and its gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hartist.transformer import prefix_attention as module
from hartist.transformer.block_causal import Runs, block_causal_attention, dense_mask
from hartist.transformer.prefix_attention import prefix_attention
from small import normal


def masked(q: Tensor, k: Tensor, v: Tensor, scale: float, lengths: tuple[int, ...]) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(lengths), scale=scale)


def qkv(tokens: int, dtype: torch.dtype, spread: float = 1.0) -> list[Tensor]:
    found = [normal(2, 3, tokens, 8, seed=seed) * (spread if seed < 2 else 1) for seed in range(3)]
    return [x.to(dtype).requires_grad_() for x in found]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from([0, 5, 128]))
def test_equals_attention_with_a_mask(lengths: list[int], small: int) -> None:
    inputs = qkv(sum(lengths), torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SMALL", small)
        ours = prefix_attention(*inputs, 0.3, tuple(lengths))
        gradients = torch.autograd.grad(ours.square().sum(), inputs)
    reference = masked(*inputs, 0.3, tuple(lengths))
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(gradients, torch.autograd.grad(reference.square().sum(), inputs))


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_in_bfloat16_it_is_about_as_accurate_as_the_fused_kernel(spread: float) -> None:
    lengths = (20, 4, 9, 40, 100)
    inputs = qkv(sum(lengths), torch.bfloat16, spread)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    gradient = normal(2, 3, sum(lengths), 8, seed=9).bfloat16()
    results = []
    for attention, given_to in ((prefix_attention, inputs), (masked, inputs), (masked, exact)):
        y = attention(*given_to, 0.35, lengths)
        results.append([y, *torch.autograd.grad(y, given_to, gradient.to(y.dtype))])
    for ours, fused, reference in zip(*results, strict=True):
        error, allowed = (((x.double() - reference).norm() / reference.norm()).item() for x in (ours, fused))
        assert error < 3 * allowed + 2**-9


@pytest.mark.parametrize(("dtype", "form"), [(torch.bfloat16, prefix_attention), (torch.float32, masked)])
def test_the_form_goes_by_the_type_it_computes_in(dtype: torch.dtype, form: Callable[..., Tensor]) -> None:
    inputs = qkv(14, dtype)
    assert torch.equal(block_causal_attention(*inputs, 0.3, Runs((1, 4, 9))), form(*inputs, 0.3, (1, 4, 9)))
    with torch.autocast("cpu", torch.bfloat16):
        given_to = [x.float() for x in inputs]
        half = prefix_attention(*(x.bfloat16() for x in given_to), 0.3, (1, 4, 9))
        assert torch.equal(block_causal_attention(*given_to, 0.3, Runs((1, 4, 9))), half)
