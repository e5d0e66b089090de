"""Muon: directions are orthogonal, steps are those of PyTorch's own, and only what lies between the edges gets them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.training.config import OptimizerConfig
from hartist.training.muon import Muon, hidden_matrices, orthogonalise
from hartist.training.optimizer import build_optimizer
from hartist.transformer.model import ScaleTransformer
from small import normal, tokenizer_config, transformer_config


@given(rows=st.integers(1, 24), columns=st.integers(1, 24), scale=st.floats(1e-3, 1e3))
def test_all_directions_of_an_update_become_about_as_long(rows: int, columns: int, scale: float) -> None:
    first = normal(rows, columns, seed=rows * 25 + columns)
    updates = torch.stack([first * scale, first.flip(0)])
    for update, direction in zip(updates, orthogonalise(updates), strict=True):
        left, values, right = torch.linalg.svd(update, full_matrices=False)
        clear = values > 0.05 * values.max()  # five rounds do not lift what is almost nothing
        found = torch.diagonal(left.T @ direction.float() @ right.T)[clear]
        assert found.min() > 0.6
        assert found.max() < 1.3


@pytest.mark.parametrize("together", [1, 2 * 12 * 12, 2**20])
def test_matrices_take_the_steps_of_pytorchs_muon_and_the_rest_those_of_adamw(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hartist.training.muon.TOGETHER", together)
    monkeypatch.setattr("hartist.training.muon.computes_bf16", lambda device: True)  # PyTorch's always does

    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Linear(12, 12) for _ in range(3)), nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 6)
        )

    ours, theirs = network(), network()
    config = OptimizerConfig(kind="muon", learning_rate=0.02, weight_decay=0.1)
    optimizer = build_optimizer(ours, config)
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    references = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(vectors, lr=0.02, weight_decay=0.0, betas=config.betas),
    ]
    for step in range(6):
        for model in (ours, theirs):
            model.zero_grad()
            model(normal(8, 12, seed=step)).square().mean().backward()
        optimizer.step()
        for reference in references:
            reference.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


def test_a_kernels_step_does_not_depend_on_its_layout_in_memory() -> None:
    def kernel_after_steps(memory_format: torch.memory_format) -> torch.Tensor:
        torch.manual_seed(0)
        layer = nn.Conv2d(4, 6, 3).to(memory_format=memory_format)  # type: ignore[call-overload]
        optimizer = build_optimizer(layer, OptimizerConfig(kind="muon"))
        for step in range(3):
            layer.weight.grad = normal(6, 4, 3, 3, seed=step).contiguous(memory_format=memory_format)
            optimizer.step()
        return layer.weight.detach().contiguous()

    assert torch.equal(kernel_after_steps(torch.contiguous_format), kernel_after_steps(torch.channels_last))


@pytest.mark.parametrize(
    ("network", "left_out"),
    [
        (
            lambda: HybridTokenizer(tokenizer_config()),
            {"encoder.conv_in.weight", "decoder.conv_out.weight", "quantizer.codebook"},
        ),
        (
            lambda: ScaleTransformer(transformer_config()),
            {"head.linear.weight", "residual_mlp.final.linear.weight"},
        ),
    ],
)
def test_edges_tables_and_vectors_stay_with_adamw(network, left_out: set[str]) -> None:
    module = network()
    chosen = set(hidden_matrices(module))
    names = {name for name, p in module.named_parameters() if p not in chosen and p.ndim >= 2}
    tables = {n for n in names if "embed" in n or n.endswith("table") or "pos" in n}
    assert names - tables == left_out
    optimizer = build_optimizer(module, OptimizerConfig(kind="muon"))
    assert isinstance(optimizer, Muon)
    in_groups = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(in_groups) == len(set(in_groups)) == sum(1 for _ in module.parameters())


def test_frozen_layers_are_left_alone() -> None:
    layers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    layers[0].requires_grad_(False)
    assert list(hidden_matrices(layers)) == [layers[1].weight]
