"""Attention: the blocked form against the fused kernel, both against float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hartist.transformer.attend import attend, blocked_attention


@pytest.mark.parametrize("size", [0.3, 3.0, 30.0], ids=["flat", "peaked", "one-hot"])
def test_blocked_attention_is_as_accurate_as_the_fused_kernel(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both in bfloat16 against float32, for scores from small to far beyond exp's range."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, length, 64, generator=generator).bfloat16() for length in (300, 700, 700))
    q = q * size
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=0.25)
    with torch.inference_mode():
        monkeypatch.setattr("hartist.transformer.attend.multiplies_tiles", lambda: False)
        blocked = attend(q, k, v, 0.25)
        monkeypatch.setattr("hartist.transformer.attend.multiplies_tiles", lambda: True)
        chosen = attend(q, k, v, 0.25)
        fused = F.scaled_dot_product_attention(q, k, v, scale=0.25)
    assert torch.equal(blocked, blocked_attention(q, k, v, 0.25))
    assert torch.equal(chosen, fused)
    assert blocked.isfinite().all()

    def error(y: torch.Tensor) -> float:
        return float((y.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    assert error(blocked) < 2 * error(fused) + 1e-3


def test_blocked_attention_splits_queries_and_respects_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hartist.transformer.attend.BLOCK_BYTES", 2 * 64 * 90)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, 200, 2, 32, generator=generator).transpose(1, 2)
    k, v = (torch.randn(1, 2, 120, 32, generator=generator)[:, :, :90] for _ in range(2))
    with torch.inference_mode():
        torch.testing.assert_close(
            blocked_attention(q, k, v, 0.5), F.scaled_dot_product_attention(q, k, v, scale=0.5), atol=1e-5, rtol=1e-5
        )
