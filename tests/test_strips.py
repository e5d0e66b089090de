"""Decoding in strips is decoding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hartist.tokenizer import strips
from hartist.tokenizer.hybrid import HybridTokenizer
from small import tokenizer_config


@pytest.fixture(scope="module", autouse=True)
def no_map_is_small() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strips, "MIN_CELLS", 1)
        yield


def tokenizer(**changes: object) -> HybridTokenizer:
    torch.manual_seed(0)
    built = HybridTokenizer(tokenizer_config(**changes)).eval().requires_grad_(False)
    for parameter in built.decoder.parameters():
        if parameter.ndim == 1:
            parameter.copy_(torch.rand_like(parameter) + 0.3)
    return built


SHAPES = {
    "two levels, stem": tokenizer(),
    "three levels of other widths": tokenizer(stem=1, channels=32, channel_multipliers=(1, 2, 4)),
    "one level": tokenizer(channel_multipliers=(2,), blocks_per_level=2),
}


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=15)
@given(
    height=st.integers(1, 7),
    width=st.integers(4, 9),  # of two cells group norm can divide by a deviation near zero, and magnify rounding
    batch=st.integers(1, 2),
    rows=st.integers(1, 9),
    last=st.booleans(),
)
def test_strips_give_what_the_decoder_gives(
    name: str, height: int, width: int, batch: int, rows: int, last: bool
) -> None:
    decoder = SHAPES[name].decoder
    latent = torch.randn(batch, 4, height, width) * 3 + 1
    if last:
        latent = latent.contiguous(memory_format=torch.channels_last)
    before = latent.clone()
    expected = decoder(latent)
    own = strips.decode_in_strips(decoder, latent, rows)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
    assert expected.abs().max() > 0.1
    assert torch.equal(latent, before)


def test_statistics_do_not_suffer_from_a_large_mean() -> None:
    norm = torch.nn.GroupNorm(2, 4)
    x = torch.randn(2, 4, 10, 6) + 1000
    gain, shift = strips._normalisation(norm, x, 3)
    torch.testing.assert_close(x * gain + shift, norm(x), rtol=0, atol=2e-3)


def test_bfloat16_is_as_near_to_float32_as_the_decoder_is() -> None:
    built = SHAPES["two levels, stem"]
    latent = torch.randn(1, 4, 6, 6)
    exact = built.decoder(latent)
    rounded = tokenizer().to(torch.bfloat16).decoder
    plain = (rounded(latent.bfloat16()).float() - exact).abs().mean()
    own = (strips.decode_in_strips(rounded, latent.bfloat16(), 2).float() - exact).abs().mean()
    assert own < 1.3 * plain


def test_a_latent_becomes_the_same_picture() -> None:
    built = SHAPES["two levels, stem"]
    latent = torch.randn(2, 4, 5, 6)
    expected = built.decode_latent(latent)
    torch.testing.assert_close(strips.decode_latent_in_strips(built, latent), expected, rtol=1e-4, atol=1e-4)
