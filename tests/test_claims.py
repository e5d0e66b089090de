"""The benchmarks of the paper's claims: the diffusion transformer's parts by closed forms, the commands end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hartist.scales import ScaleSchedule
from hartist.text.encoder import context_from_states
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.training.token_shards import Texts, TextTable, TokenCache
from small_ablations import STEPS, fake_network, tiny_sizes, write_dataset

pytest.importorskip("diffusers")
import ablation_runs
import claims
import claims_diffusion
import claims_judge
import dit

SIZE = dit.DitSize(heads=2, depth=2, head_dim=16)
TEXT = 3, 12


def tiny_dit(channels: int = 4, side: int = 8) -> dit.Dit:
    torch.manual_seed(1)
    built = dit.Dit(SIZE, channels, side, TEXT[1]).eval()
    torch.nn.init.normal_(built.net.proj_out.weight, std=0.3)
    return built


def contexts(count: int) -> object:
    states = torch.randn(count, *TEXT)
    mask = torch.tensor([[True, True, False], [True, True, True]]).repeat(count, 1)[:count]
    return context_from_states(states, mask)


def test_the_cache_gives_back_the_latents() -> None:
    torch.manual_seed(0)
    tokenizer = HybridTokenizer(tiny_sizes().tokenizer).eval().requires_grad_(False)
    f_BChw = torch.randn(3, 4, 8, 8)
    tokens = tokenizer.quantizer.encode(f_BChw)
    one = torch.ones(1, dtype=torch.long)
    texts = Texts(torch.zeros(1, *TEXT), torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, dtype=torch.uint8), one)
    last_NmC = tokens.residual_BlC + tokenizer.quantizer.lookup(tokens.ids[-1])
    captions = torch.zeros(3, dtype=torch.long), torch.arange(3), one.expand(3)
    cache = TokenCache(torch.cat(tokens.ids, 1), last_NmC, *captions, TextTable((texts,)))
    found = dit.latents(tokenizer.quantizer, ScaleSchedule.from_sides(tokenizer.config.sides), cache)
    torch.testing.assert_close(found, f_BChw, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 5])
def test_a_straight_flow_is_followed_to_its_end(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_dit()
    model.deviation.fill_(3.0)
    noise, end = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    monkeypatch.setattr(model, "forward", lambda x, t, context: (noise - end).repeat(len(x) // 2, 1, 1, 1))
    for guidance in (1.0, 4.0):
        torch.testing.assert_close(model.sample(noise, contexts(2), steps, guidance), 3 * end)


def test_guidance_goes_beyond_the_condition() -> None:
    model, noise, context = tiny_dit(), torch.randn(2, 4, 8, 8), contexts(2)
    plain, one, two = (model.sample(noise, context, 1, guidance) for guidance in (1.0, 1.0 + 1e-6, 2.0))
    torch.testing.assert_close(plain, one, rtol=1e-4, atol=1e-4)
    other = model.sample(noise, dit.unconditional_context(context), 1, 1.0)
    torch.testing.assert_close(two, plain + (plain - other), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, other, atol=1e-3)


def test_what_a_mask_hides_changes_nothing() -> None:
    model, noise, context = tiny_dit(), torch.randn(2, 4, 8, 8), contexts(2)
    states = context.states_BSC.clone()
    states[0, 2] = 100.0
    changed = replace(context, states_BSC=states)
    torch.testing.assert_close(model.sample(noise, changed, 2, 1.0)[0], model.sample(noise, context, 2, 1.0)[0])


def test_operations_grow_with_steps_and_branches() -> None:
    model = tiny_dit()
    one = model.sampling_macs(4, 8, TEXT, 1, 1.0)
    assert model.sampling_macs(4, 8, TEXT, 6, 1.0).total == 6 * one.total
    assert model.sampling_macs(4, 8, TEXT, 1, 3.0).total == pytest.approx(2 * one.total)
    width, tokens = 32, 64
    assert one.total > SIZE.depth * tokens * 14 * width**2


def test_both_commands_and_what_is_finished_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(tmp_path)
    for module in (claims_judge, claims_diffusion, ablation_runs):
        monkeypatch.setattr(module, "find_model", lambda _: dataset)
    monkeypatch.setattr("hartist.training.run.find_model", lambda _: dataset)
    monkeypatch.setattr(claims_judge, "load_feature_network", fake_network)
    monkeypatch.setattr(claims_diffusion, "DIT_STEPS", (1, 2))
    monkeypatch.setattr(claims_diffusion, "PROBE_STEPS", 2)
    common = ["--data", str(dataset / "data"), "--out", str(tmp_path / "runs"), "--pictures", "5"]
    common += ["--tokenizer-steps", str(STEPS), "--generator-steps", str(STEPS)]

    assert claims.main(["residual", *common], tiny_sizes()) == 0
    out = capsys.readouterr().out
    lines = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("| ")]
    rows = {cells[0].strip(): cells[1:] for cells in lines[2:]}
    assert list(rows) == ["HART, with residual tokens", "HART, without", "VAR, discrete tokens alone"]
    assert "…" in rows["HART, without"][2]
    results = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert len({figures["kernel"] for name, figures in results.items() if name.startswith("claims: ")}) == 3

    plot = tmp_path / "curve.png"
    assert claims.main(["diffusion", *common, "--rounds", "1", "--plot", str(plot)], tiny_sizes()) == 0
    printed = capsys.readouterr()
    assert "equal training:" in printed.err
    assert "| diffusion transformer, 2 steps" in printed.out
    assert plot.read_bytes().startswith(b"\x89PNG")
    known = json.loads((tmp_path / "runs" / "results.json").read_text())

    monkeypatch.setattr(claims_diffusion, "train", None)
    monkeypatch.setattr(ablation_runs, "train_generator", None)
    assert claims.main(["residual", *common], tiny_sizes()) == 0
    assert capsys.readouterr().out == out
    assert json.loads((tmp_path / "runs" / "results.json").read_text()) == known
