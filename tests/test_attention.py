"""Attention: the blocked form against the fused kernel, both against float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hartist.transformer.attend import STRIDE, attend, blocked_attention


@pytest.mark.parametrize("size", [0.3, 3.0, 30.0], ids=["flat", "peaked", "one-hot"])
def test_blocked_attention_is_as_accurate_as_the_fused_kernel(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both in bfloat16 against float32, for scores from small to far beyond exp's range."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, length, 64, generator=generator).bfloat16() for length in (300, 700, 700))
    q = q * size
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=0.25)
    with torch.inference_mode():
        monkeypatch.setattr("hartist.transformer.attend.multiplies_tiles", lambda: False)
        blocked = attend(q, (k,), (v,), 0.25)
        monkeypatch.setattr("hartist.transformer.attend.multiplies_tiles", lambda: True)
        chosen = attend(q, (k,), (v,), 0.25)
        fused = F.scaled_dot_product_attention(q, k, v, scale=0.25)
    assert torch.equal(blocked, blocked_attention(q, (k,), (v,), 0.25))
    assert torch.equal(chosen, fused)
    assert blocked.isfinite().all()

    def error(y: torch.Tensor) -> float:
        return float((y.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    assert error(blocked) < 2 * error(fused) + 1e-3


def test_a_key_that_no_sample_saw_may_stand_out_by_any_amount() -> None:
    """Every query's largest score is that of a key between the sampled ones, beyond exp's range above theirs."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 1, length, 64, generator=generator).bfloat16() for length in (300, 700, 700))
    for strength in (1.0, 10.0, 1e3, 1e6):
        outlier = k.clone()
        outlier[..., STRIDE * 40 + 3, :] = strength * q.mean(2)
        q_towards = (q + 2 * q.mean(2, keepdim=True)).contiguous()
        exact = F.scaled_dot_product_attention(q_towards.float(), outlier.float(), v.float(), scale=1.0)
        with torch.inference_mode():
            found = blocked_attention(q_towards, (outlier,), (v,), 1.0)
        assert (found.float() - exact).square().mean().sqrt() < 0.02 * exact.square().mean().sqrt(), strength


def test_blocked_attention_splits_queries_and_takes_keys_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hartist.transformer.attend.BLOCK_BYTES", 4 * 64 * 90)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, 200, 2, 32, generator=generator).transpose(1, 2)
    k, v = (torch.randn(1, 2, 120, 32, generator=generator)[:, :, :90] for _ in range(2))
    exact = F.scaled_dot_product_attention(q, k, v, scale=0.5)
    with torch.inference_mode():
        for cuts in ([90], [10, 79, 1]):
            found = blocked_attention(q, k.split(cuts, 2), v.split(cuts, 2), 0.5)
            torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5)
