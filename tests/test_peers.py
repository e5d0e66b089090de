"""The comparison with diffusion models, at tiny sizes: all are built, denoise, decode and are counted alike."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import peers
from peer_models import PEERS, tiny

CPU = torch.device("cpu")
needs_diffusers = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed")


def flags(*given: str) -> argparse.Namespace:
    common = ["--tiny", "--size", "64", "--warmup", "0", "--measured", "2", "--repeats", "1"]
    return peers.make_parser().parse_args([*common, *given])


@needs_diffusers
@pytest.mark.parametrize("name", list(PEERS))
def test_a_peer_denoises_and_decodes(name: str) -> None:
    args = flags("--batch", "2", "--steps", "5")
    figures = peers.measure_peer(tiny(PEERS[name]), args, CPU, torch.float32)
    assert len(figures["step_seconds"]) == 2
    low, high = sorted(figures["step_seconds"])
    assert low <= figures["generate_seconds"] / 5 <= high
    assert figures["decode_seconds"] > 0
    alone = peers.peer_macs(tiny(PEERS[name]), 64, 1)
    assert figures["macs"]["total"] == alone[0].total * 2 * 5  # two pictures, five steps
    assert figures["decode_macs"]["total"] == alone[1].total * 2
    assert 0 < figures["macs"]["attention"] < figures["macs"]["total"]
    whole = peers.measure_peer(tiny(PEERS[name]), flags("--whole", "--steps", "3"), CPU, torch.float32)
    assert whole["generate_seconds"] == sum(whole["step_seconds"])
    assert len(whole["step_seconds"]) == 3


@needs_diffusers
@pytest.mark.parametrize(
    ("name", "tera", "decoder"),
    [
        ("PixArt-Σ", 25.8, 1.26),
        ("Sana-0.6B", 6.3, 1.05),
        pytest.param("SD3-medium", 50.5, 1.26, marks=pytest.mark.slow),
        pytest.param("SDXL", 31.8, 1.26, marks=pytest.mark.slow),
    ],
)
def test_the_published_sizes_take_the_known_work(name: str, tera: float, decoder: float) -> None:
    step, decoding = peers.peer_macs(PEERS[name], 512, 1)
    assert step.total * PEERS[name].steps / 1e12 == pytest.approx(tera, rel=0.01)
    assert decoding.total / 1e12 == pytest.approx(decoder, rel=0.01)


def test_ours_run_alone_and_make_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["--tiny", "--models", ",".join(peers.OURS), "--device", "cpu", "--dtype", "float32", "--threads", "1"]
    assert peers.main([*call, "--repeats", "1", "--json", str(tmp_path / "peers.json")]) == 0
    exact, fast, _ = json.loads((tmp_path / "peers.json").read_text())["models"]
    assert fast["macs"]["total"] < exact["macs"]["total"]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in table] == ["model", "-" * 17, *peers.OURS]
    assert [cell.strip() for cell in table[2].split("|")][8] == "1.00"  # times ours


def test_a_model_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "PEERS", {**PEERS, "broken": None})  # unknown to the process that is to run it
    args = flags("--models", "broken,Hartist", "--device", "cpu", "--dtype", "float32", "--threads", "1")
    peers.check(args)
    found = peers.run_all(args, ["--tiny", "--repeats", "1", "--device", "cpu", "--dtype", "float32"])
    assert [figures["model"] for figures in found] == ["Hartist"]
    assert "broken at 64 px failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "named"), [("--models=none", "none"), ("--sizes=100", "100"), ("--batch=0", "batch"), ("--dtype=x", "x")]
)
def test_mistakes_are_told_before_anything_runs(
    given: str, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers.subprocess, "run", pytest.fail)
    assert peers.main([given, "--device", "cpu"]) == 2
    assert named in capsys.readouterr().err
