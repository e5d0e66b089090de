"""Long runs of tokens go through a block in pieces, and come out as they do whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hartist.transformer import pieces
from small import random_transformer
from test_shortcuts import MODELS, assert_same, generate


@given(batch=st.integers(1, 9), length=st.integers(1, 300), most=st.integers(1, 200))
def test_pieces_cover_every_token_once_and_are_not_too_large(batch: int, length: int, most: int) -> None:
    seen_Bl = torch.zeros(batch, length, dtype=torch.int)
    for rows, tokens in pieces.cut(batch, length, most):
        assert seen_Bl[rows, tokens].numel() <= most
        seen_Bl[rows, tokens] += 1
    assert bool((seen_Bl == 1).all())


@pytest.mark.parametrize("most", [3, 8, 20])
@pytest.mark.parametrize("name", MODELS)
def test_a_generation_in_pieces_is_the_same(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_transformer(**MODELS[name])
    whole = generate(model, (0, 1, 2))
    cuts: list[int] = []
    plain = pieces.cut

    def counted(batch: int, length: int) -> list[tuple[slice, slice]]:
        found = list(plain(batch, length, most))
        cuts.append(len(found))
        return found

    monkeypatch.setattr(pieces, "TOKENS", most)
    monkeypatch.setattr(pieces, "cut", counted)
    assert_same(generate(model, (0, 1, 2)), whole)
    assert max(cuts) > 3
